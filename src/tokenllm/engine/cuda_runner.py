"""Executes plans on a GPU. The host writes a step's rows, positions and slots into pinned memory and launches; which
tokens were sampled, the device knows, so the next step is launched before the host has seen them.

    host      plan 1 │ launch 1 │ plan 2 │ launch 2 │ collect 1 │ plan 3 │ launch 3 │ collect 2 │ …
    device               copy, body 1, head 1, tokens → host │ copy, body 2, head 2, tokens → host │ …

All work is on one stream, in the order of the launches, and so is all that changes on the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenllm.engine.batch import Chunk, Foretold, Logprob, Plan, Sampled, SharedPrefix
from tokenllm.engine.device_step import DeviceStep
from tokenllm.engine.graphs import Graphs, StepShape
from tokenllm.engine.pooling import Pools
from tokenllm.engine.runner import FORETOLD_AT_ONCE, as_arrays, list_logprobs
from tokenllm.models.weights import Progress
from tokenllm_kernels import top_logprobs
from tokenllm_kernels.gpu.device import on_compilation
from tokenllm_kernels.gpu.inputs import CONTEXT_ALIGNMENT, COUNTS, StepLayout
from tokenllm_kernels.gpu.prefill_hopper import BLOCK_M
from tokenllm_kernels.gpu.sampling import RULE_WORDS, set_generated, set_rules, write_rules
from tokenllm_kernels.gpu.shared_prefix import write_prefixes

Words = NDArray[np.int32]

LOGPROB_ROWS = 32


class Staging:
    """Pinned memory of one step in flight, whose words go to `target`. What a step slices is sliced once, here."""

    def __init__(self, layout: StepLayout, target: Tensor, prefix_words: int) -> None:
        device, self._layout, self._target = target.device, layout, target
        self._words, self._tokens = (
            _pinned(torch.zeros(n, dtype=torch.int32), device) for n in (layout.words, layout.rows)
        )
        self.prefixes = _pinned(torch.zeros(prefix_words, dtype=torch.int32), device)
        self.words, self.tokens = self._words.numpy(), self._tokens.numpy()
        self._decodes, self._target_decodes = (w[: layout.chunk_columns] for w in (self._words, target))
        self.done = torch.get_device_module(device).Event()

    def send(self, shape: StepShape) -> None:
        """Copy what was written to the device."""
        if not shape.chunks:
            self._target_decodes.copy_(self._decodes, non_blocking=True)
        else:
            used = self._layout.prompt + 4 * (shape.tokens - int(self.words[0]))
            self._target[:used].copy_(self._words[:used], non_blocking=True)

    def fetch(self, tokens: Tensor) -> None:
        """Copy the device's tokens here, all of them: it is a few kilobytes, and needs no slice."""
        self._tokens.copy_(tokens, non_blocking=True)

    def wait(self) -> None:
        """Ask again and again: a thread that sleeps, or spins in the driver, comes back with its caches cold."""
        while not self.done.query():
            pass


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory() if device.type == "cuda" else tensor


@dataclass(frozen=True)
class AskedLogprobs:
    """Of the places of a flight whose rows asked: on their way to the host."""

    wanted: dict[int, int]  # place → alternatives
    found: list[tuple[Tensor, ...]]  # of the chosen, of the likeliest, their ids; a few rows each


@dataclass(frozen=True)
class AskedForetold:
    """Of a prompt's tokens: on their way to the host."""

    uid: int
    tokens: list[int]
    found: list[tuple[Tensor, ...]]


@dataclass(frozen=True)
class CudaFlight:
    """A launched step."""

    staging: Staging
    rows: int
    logprobs: AskedLogprobs | None
    foretold: list[AskedForetold]
    vectors: dict[int, Tensor]


class CudaRunner:
    """One model with its KV memory, on the current stream of its device."""

    ahead = 1

    def __init__(self, step: DeviceStep, kv: Sequence[Tensor], progress: Progress) -> None:
        self.compilations = 0  # kernels that a request had to wait for
        self._step, self._layout = step, step.layout
        prefix_words = step.prefixes.layout.words
        self._stagings = [Staging(step.layout, step.words, prefix_words) for _ in range(self.ahead + 1)]
        self._prefixes: tuple[SharedPrefix, ...] = ()  # that the device knows of
        self._logprobs: dict[int, int] = {}  # row → alternatives, of rows that asked
        self._pools = Pools()
        with torch.inference_mode():
            self._graphs = Graphs(step, kv, progress)

    @property
    def most_chunks(self) -> int:
        return self._step.limits.chunks

    @property
    def most_context_tokens(self) -> int:
        return self._step.limits.context_tokens

    def filled(self, decodes: int, prompt_tokens: int) -> int:
        return self._graphs.filled(decodes, prompt_tokens)

    def count_compilations(self) -> None:
        """All is warm: whatever is compiled from now on, somebody waits for."""

        def count() -> None:
            self.compilations += 1

        on_compilation(count)

    @torch.inference_mode()
    def launch(self, plan: Plan) -> CudaFlight:
        staging = self._stagings.pop(0)
        self._stagings.append(staging)
        shape = self._write(staging.words, plan)
        staging.send(shape)
        if plan.decodes.prefixes is not self._prefixes:
            self._send_prefixes(plan.decodes.prefixes, staging.prefixes)
        self._adopt(plan.chunks)
        self._graphs.body(shape)
        foretold = [self._foretell(first, asked) for first, asked in plan.foretold()]
        vectors = self._pools.add(self._step.prompt_hidden, plan)
        if shape.samples:
            self._remember([chunk for chunk in plan.chunks if chunk.samples])
            self._graphs.head(shape)
            staging.fetch(self._step.tokens)
        logprobs = self._ask_logprobs(plan)
        staging.done.record()
        return CudaFlight(staging, shape.samples, logprobs, foretold, vectors)

    def _foretell(self, first: int, asked: Foretold) -> AskedForetold:
        """Always so many tokens at once: less memory, and no shape that would be a new one. The last may repeat."""
        device, count = self._step.words.device, len(asked.tokens)
        order = np.minimum(np.arange(-(-count // FORETOLD_AT_ONCE) * FORETOLD_AT_ONCE), count - 1)
        columns = torch.from_numpy(np.stack((first + order, asked.tokens[order])).astype(np.int64))
        columns = _pinned(columns, device).to(device, non_blocking=True)
        found = []
        for places, tokens in columns.split(FORETOLD_AT_ONCE, 1):
            logprobs = top_logprobs(self._step.logits_at(places), tokens, asked.alternatives)
            found.append(tuple(t.to("cpu", non_blocking=True) for t in logprobs))
        return AskedForetold(asked.uid, asked.tokens.tolist(), found)

    def _send_prefixes(self, prefixes: tuple[SharedPrefix, ...], words: Tensor) -> None:
        partials, kv_heads = self._step.prefixes, self._step.decoder.kv_heads
        groups = [(prefix.row, prefix.tokens, prefix.members) for prefix in prefixes]
        write_prefixes(words.numpy(), partials.layout, groups, partials.splits(groups, kv_heads))
        partials.words.copy_(words, non_blocking=True)
        self._prefixes = prefixes

    def _write(self, words: Words, plan: Plan) -> StepShape:
        """The step as `StepLayout` says."""
        decodes, n, rows = plan.decodes, len(plan.decodes.rows), self._layout.rows
        words[COUNTS : COUNTS + n] = decodes.rows
        words[COUNTS + rows : COUNTS + rows + n] = decodes.positions
        words[COUNTS + 2 * rows : COUNTS + 2 * rows + n] = decodes.slots
        words[0] = n
        words[1:4] = 0
        if not plan.chunks:
            return StepShape(n, n, 0, 0, shares=bool(decodes.prefixes))
        contexts = self._write_chunks(words, plan.chunks, n)
        samples = n + self._write_last_chunks(words, plan.chunks, n)
        words[1:4] = plan.tokens - n, contexts, samples - n
        return StepShape(plan.tokens, samples, len(plan.chunks), contexts)

    def _write_last_chunks(self, words: Words, chunks: Sequence[Chunk], place: int) -> int:
        """Returns how many prompts end in this step."""
        layout, ending = self._layout, [chunk.samples for chunk in chunks]
        last = [chunk for chunk in chunks if chunk.samples]
        columns, rows = words[layout.last_chunks : layout.rules].reshape(3, -1), [chunk.row for chunk in last]
        columns[0, : len(last)] = rows
        columns[1, : len(last)] = place - 1 + np.cumsum([chunk.tokens for chunk in chunks])[ending]
        columns[2, : len(last)] = [chunk.end for chunk in last]
        rules = words[layout.rules : layout.rules + RULE_WORDS * len(last)].reshape(-1, RULE_WORDS)
        write_rules(rules, rows, [chunk.rule for chunk in last], self._step.table.vocab)
        return len(last)

    def _write_chunks(self, words: Words, chunks: Sequence[Chunk], place: int) -> int:
        """Returns the room that all contexts take together."""
        layout, most, used = self._layout, self._layout.chunks, len(chunks)
        columns = words[layout.chunk_columns : layout.chunk_columns + 5 * most].reshape(5, -1)
        rows, counts, ends = np.array([(chunk.row, chunk.tokens, chunk.end) for chunk in chunks], np.int32).T
        upto, room = np.cumsum(counts), -(-ends // CONTEXT_ALIGNMENT) * CONTEXT_ALIGNMENT
        contexts = np.cumsum(room)
        columns[:4, used:], columns[4, used:] = 0, contexts[-1]
        columns[:, :used] = rows, place + upto - counts, counts, ends, contexts - room
        tiles = words[layout.chunk_columns + 5 * most :][: most + 1]
        tiles[0] = 0
        tiles[1 : used + 1] = np.cumsum(-(-counts // BLOCK_M))
        tiles[used + 1 :] = tiles[used]
        prompt = words[layout.prompt : layout.prompt + 4 * upto[-1]].reshape(4, -1)
        np.concatenate([chunk.ids for chunk in chunks], out=prompt[0])
        prompt[1] = np.repeat(rows, counts)
        prompt[2] = np.arange(upto[-1]) + np.repeat(ends - upto, counts)
        np.concatenate([chunk.slots for chunk in chunks], out=prompt[3])
        return int(contexts[-1])

    def _adopt(self, chunks: Sequence[Chunk]) -> None:
        """Rows that begin with what others have computed learn where it lies."""
        device = self._step.index.device
        for chunk in chunks:
            if len(chunk.prefix):
                slots = _pinned(torch.from_numpy(chunk.prefix), device)
                self._step.index[chunk.row, : len(slots)].copy_(slots, non_blocking=True)

    def _remember(self, chunks: Sequence[Chunk]) -> None:
        """What of these prompts' wishes does not travel with the step."""
        for chunk in chunks:
            if chunk.logprobs is None:
                self._logprobs.pop(chunk.row, None)
            else:
                self._logprobs[chunk.row] = chunk.logprobs
        listing = [chunk for chunk in chunks if chunk.rule.has_lists]
        if listing:
            set_rules(self._step.table, [chunk.row for chunk in listing], [chunk.rule for chunk in listing])
        for chunk in chunks:
            if chunk.rule.adjusts and len(chunk.generated):
                set_generated(self._step.table, chunk.row, chunk.rule, chunk.generated)

    def _ask_logprobs(self, plan: Plan) -> AskedLogprobs | None:
        if not self._logprobs:
            return None
        rows = enumerate(plan.sampling_rows.tolist())
        wanted = {place: self._logprobs[row] for place, row in rows if row in self._logprobs}
        if not wanted:
            return None
        device, most = self._step.words.device, max(wanted.values())
        places = _pinned(torch.tensor(list(wanted), dtype=torch.int32), device).to(device, non_blocking=True)
        parts = [self._logprobs_at(part, most) for part in places.split(LOGPROB_ROWS)]
        return AskedLogprobs(wanted, parts)

    def _logprobs_at(self, places: Tensor, alternatives: int) -> tuple[Tensor, ...]:
        """Of so few rows at a time that the memory it takes is no matter."""
        logits, tokens = self._step.logits.index_select(0, places), self._step.tokens.index_select(0, places)
        return tuple(t.to("cpu", non_blocking=True) for t in top_logprobs(logits, tokens.long(), alternatives))

    def collect(self, flight: CudaFlight) -> Sampled:
        flight.staging.wait()
        tokens = flight.staging.tokens[: flight.rows].copy()
        foretold = {asked.uid: _foretold(asked) for asked in flight.foretold}
        logprobs = _logprobs(flight.logprobs) if flight.logprobs else {}
        return Sampled(tokens, logprobs, foretold, as_arrays(flight.vectors))


def _foretold(asked: AskedForetold) -> list[tuple[int, Logprob]]:
    count = len(asked.tokens)
    return list_logprobs(asked.tokens, [torch.cat(parts)[:count] for parts in zip(*asked.found, strict=True)])


def _logprobs(asked: AskedLogprobs) -> dict[int, Logprob]:
    chosen, top, ids = (torch.cat(parts).tolist() for parts in zip(*asked.found, strict=True))
    return {
        place: Logprob(chosen[i], tuple(zip(ids[i][:count], top[i][:count], strict=True)))
        for i, (place, count) in enumerate(asked.wanted.items())
    }
