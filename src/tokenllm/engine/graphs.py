"""The CUDA graphs of all steps: whole ones of decodes by number of rows; bodies of decodes that share prefixes and of
steps that read prompts by number of tokens, and heads for these by number of rows. A step takes the smallest that holds
it. All are captured at start, so no request waits for one.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tokenllm.engine.device_step import DeviceStep
from tokenllm.models.weights import Progress

Kind: TypeAlias = tuple[str, int]  # decode, shared (decodes that share prefixes), mixed or head, and its size

TOKENS_PER_CHUNK = 32  # graphs of mixed steps hold a chunk for as many tokens: one without work costs programs, too
LEAST_CHUNKS = 8


def decode_buckets(rows: int) -> list[int]:
    """Sizes of batches up to `rows`: padding is at most a quarter, and an eighth from 128 rows on."""
    sizes = {size for size in (1, 2, 4) if size < rows} | {rows}
    for step, upto in ((8, 64), (16, 256), (32, 512), (64, 1024), (128, 4096)):
        sizes |= set(range(step, min(rows, upto) + 1, step))
    return sorted(sizes)


def shared_buckets(rows: int) -> list[int]:
    """Sizes of batches that share prefixes: two in each octave."""
    sizes = {size for power in range(3, 12) for size in (1 << power, 3 << power - 1)}
    return sorted({size for size in sizes if size < rows} | {rows})


def mixed_buckets(tokens: int) -> list[int]:
    """Tokens of steps that read prompts, up to `tokens`."""
    sizes = {tokens}
    for step, upto in ((64, 256), (128, 1024), (256, 4096), (1024, 1 << 20)):
        sizes |= set(range(step, min(tokens, upto) + 1, step))
    return sorted(sizes)


def chunks_of(tokens: int) -> int:
    """The chunks that the graph of a mixed step has room for."""
    return max(LEAST_CHUNKS, tokens // TOKENS_PER_CHUNK)


@dataclass(frozen=True)
class StepShape:
    """What a body has to hold."""

    tokens: int
    samples: int
    chunks: int
    context_room: int
    shares: bool = False  # decodes share prefixes

    @property
    def is_whole(self) -> bool:
        """Whether one graph computes all of it."""
        return not self.chunks and not self.shares


class Graphs:
    """Captured steps of a `DeviceStep` over its KV memory, on the current stream."""

    def __init__(self, step: DeviceStep, kv: Sequence[Tensor], progress: Progress) -> None:
        self._step, self._kv = step, kv
        self._decode_sizes, self._mixed_sizes = decode_buckets(step.limits.rows), mixed_buckets(step.limits.tokens)
        self._shared_sizes = shared_buckets(step.limits.rows)
        kinds = [("mixed", size) for size in self._mixed_sizes] + [("shared", size) for size in self._shared_sizes]
        kinds += [(kind, size) for size in self._decode_sizes for kind in ("decode", "head")]
        kinds.sort(key=lambda kind: -kind[1])  # the largest first: the others fit in its memory
        self._replays = self._capture(kinds, progress) if step.words.is_cuda else self._uncaptured(kinds)

    def _capture(self, kinds: Sequence[Kind], progress: Progress) -> dict[Kind, Callable[[], None]]:
        for i in progress("compiling kernels")(range(len(kinds))):
            self._compute(*kinds[i])
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # from here on the memory of a step is that of the graphs
        pool = torch.cuda.graph_pool_handle()
        return {kinds[i]: self._captured(kinds[i], pool) for i in progress("capturing CUDA graphs")(range(len(kinds)))}

    def _captured(self, kind: Kind, pool: Any) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
            self._compute(*kind)
        graph.replay()  # the first sends it to the device
        return graph.replay

    def _uncaptured(self, kinds: Sequence[Kind]) -> dict[Kind, Callable[[], None]]:
        """Where Triton's interpreter plays the GPU."""
        return {kind: partial(self._compute, *kind) for kind in kinds}

    def _compute(self, kind: str, size: int) -> None:
        limits = self._step.limits
        match kind:
            case "decode":
                self._step.decode(self._kv, size)
            case "shared":
                self._step.body(self._kv, size, size, 0, gather=False)
            case "mixed":
                chunks, samples = min(limits.chunks, chunks_of(size)), min(size, limits.rows)
                self._step.body(self._kv, size, samples, chunks, gather=self._step.gathers)
            case "head":
                self._step.head(size)

    def filled(self, decodes: int, prompt_tokens: int) -> int:
        """As many as fill a graph, since padding costs as much; all of them, where that were less than half."""
        fill = self._mixed_sizes[bisect_right(self._mixed_sizes, decodes + prompt_tokens) - 1] - decodes
        return fill if prompt_tokens <= 2 * fill <= 2 * prompt_tokens else prompt_tokens

    def body(self, shape: StepShape) -> None:
        """Launch all layers of the step in `words`; of decodes that share nothing also the head."""
        if shape.is_whole:
            return self._replays["decode", _at_least(self._decode_sizes, shape.tokens)]()
        if not shape.chunks:
            return self._replays["shared", _at_least(self._shared_sizes, shape.tokens)]()
        assert shape.context_room <= self._step.limits.context_room, (
            "prompts are read in order: one goes on, others begin"
        )
        wanted = max(shape.tokens, shape.chunks * TOKENS_PER_CHUNK if shape.chunks > LEAST_CHUNKS else 0)
        return self._replays["mixed", _at_least(self._mixed_sizes, wanted)]()

    def head(self, shape: StepShape) -> None:
        """Launch logits and sampling, unless they came with the body."""
        if not shape.is_whole:
            self._replays["head", _at_least(self._decode_sizes, shape.samples)]()


def _at_least(sizes: list[int], wanted: int) -> int:
    return sizes[bisect_left(sizes, wanted)]
