"""The CUDA graphs of all steps: bodies by number of tokens, with and without chunks of prompts, and heads by number of
rows. A step takes the smallest that holds it. All are captured at start, so no request waits for one.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokenllm.engine.device_step import DeviceStep
from tokenllm.models.weights import Track

TOKENS_PER_CHUNK = 32  # graphs of mixed steps hold a chunk for as many tokens: one without work costs programs, too
LEAST_CHUNKS = 8


def decode_buckets(rows: int) -> list[int]:
    """Sizes of batches up to `rows`: padding is at most a quarter, and an eighth from 128 rows on."""
    sizes = {1, 2, 4, rows}
    for step, upto in ((8, 64), (16, 256), (32, 512), (64, 1024), (128, 4096)):
        sizes |= set(range(step, min(rows, upto) + 1, step))
    return sorted(sizes)


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
    context_tokens: int


class Graphs:
    """Captured steps of a `DeviceStep` over its KV memory, on the current stream."""

    def __init__(self, step: DeviceStep, kv: Sequence[Tensor], track: Track[int]) -> None:
        self._step, self._kv = step, kv
        limits = step.limits
        self._decode_sizes, self._mixed_sizes = decode_buckets(limits.rows), mixed_buckets(limits.tokens)
        self._replays: dict[tuple[str, int], Callable[[], None]] = {}
        self._run_eagerly()
        kinds = [("mixed", size) for size in self._mixed_sizes]
        kinds += [(kind, size) for size in self._decode_sizes for kind in ("decode", "head")]
        kinds.sort(key=lambda kind: -kind[1])  # the largest first: the others fit in its memory
        prepare = self._captured(torch.cuda.graph_pool_handle()) if step.words.is_cuda else self._uncaptured
        for i in track(range(len(kinds))):
            self._replays[kinds[i]] = prepare(*kinds[i])

    def _compute(self, kind: str, size: int) -> None:
        limits = self._step.limits
        match kind:
            case "head":
                self._step.head(size)
            case "decode":
                self._step.body(self._kv, size, size, 0, gather=False)
            case "mixed":
                chunks, samples = min(limits.chunks, chunks_of(size)), min(size, limits.rows)
                self._step.body(self._kv, size, samples, chunks, gather=self._step.gathers)

    def _captured(self, pool: Any) -> Callable[[str, int], Callable[[], None]]:
        stream = torch.cuda.current_stream()

        def capture(kind: str, size: int) -> Callable[[], None]:
            self._compute(kind, size)  # compiles what this size needs
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                self._compute(kind, size)
            graph.replay()  # the first sends it to the device
            return graph.replay

        return capture

    def _uncaptured(self, kind: str, size: int) -> Callable[[], None]:
        """Where Triton's interpreter plays the GPU."""
        return partial(self._compute, kind, size)

    def body(self, shape: StepShape) -> None:
        """Launch all layers of the step in `words`."""
        if not shape.chunks:
            return self._replays["decode", _at_least(self._decode_sizes, shape.tokens)]()
        if self._step.gathers and shape.context_tokens > self._step.limits.context_tokens:
            return self._run_eagerly()
        wanted = max(shape.tokens, shape.chunks * TOKENS_PER_CHUNK if shape.chunks > LEAST_CHUNKS else 0)
        return self._replays["mixed", _at_least(self._mixed_sizes, wanted)]()

    def _run_eagerly(self) -> None:
        """A step with more context than is ever copied together: prefill reads it straight from the pool."""
        limits = self._step.limits
        self._step.body(self._kv, limits.tokens, limits.rows, limits.chunks, gather=False)

    def head(self, rows: int) -> None:
        """Launch logits and sampling of the first `rows` rows that sample, and of padding up to `padded(rows)`."""
        self._replays["head", self.padded(rows)]()

    def padded(self, rows: int) -> int:
        return _at_least(self._decode_sizes, rows)


def _at_least(sizes: list[int], wanted: int) -> int:
    return sizes[bisect_left(sizes, wanted)]
