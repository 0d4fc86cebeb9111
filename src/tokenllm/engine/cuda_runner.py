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
from torch import Tensor

from tokenllm.engine.batch import Chunk, Foretold, Logprob, Plan, Sampled, SharedPrefix
from tokenllm.engine.device_step import DeviceStep
from tokenllm.engine.graphs import Graphs
from tokenllm.engine.pooling import Pools
from tokenllm.engine.runner import FORETOLD_AT_ONCE, as_arrays, list_logprobs
from tokenllm.engine.step_words import write_step
from tokenllm.models.weights import Progress
from tokenllm_kernels import top_logprobs
from tokenllm_kernels.gpu.device import on_compilation
from tokenllm_kernels.gpu.inputs import StepLayout
from tokenllm_kernels.gpu.sampling import set_generated, set_rules
from tokenllm_kernels.gpu.shared_prefix import write_prefixes

LOGPROB_ROWS = 32
SENT_AT_ONCE = 1024  # words


class Staging:
    """Pinned memory of one step in flight, whose words go to `target`. What a step slices is sliced once, here."""

    def __init__(self, layout: StepLayout, target: Tensor, prefix_words: int) -> None:
        device, runtime = target.device, torch.get_device_module(target.device)
        sent, self._tokens = (_pinned(torch.zeros(n, dtype=torch.int32), device) for n in (layout.words, layout.rows))
        self.prefixes = _pinned(torch.zeros(prefix_words, dtype=torch.int32), device)
        self.words, self.tokens = sent.numpy(), self._tokens.numpy()
        ends = range(SENT_AT_ONCE, layout.words + SENT_AT_ONCE, SENT_AT_ONCE)
        self._parts = [(target[:end], sent[:end]) for end in ends]
        self._done, self._stream = runtime.Event(), runtime.current_stream(device)

    def send(self, count: int) -> None:
        """Copy so many words to the device, and what is between them and the next multiple."""
        target, words = self._parts[(count - 1) // SENT_AT_ONCE]
        target.copy_(words, non_blocking=True)

    def fetch(self, tokens: Tensor) -> None:
        """Copy the device's tokens here, all of them: it is a few kilobytes, and needs no slice."""
        self._tokens.copy_(tokens, non_blocking=True)

    def end(self) -> None:
        """Nothing else belongs to the step."""
        self._done.record(self._stream)

    def wait(self) -> None:
        """Ask again and again: a thread that sleeps, or spins in the driver, comes back with its caches cold."""
        while not self._done.query():
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
        self._step = step
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

    def launch(self, plan: Plan) -> CudaFlight:
        """Not in inference mode: nothing asks for gradients, and to enter it takes longer than to do without."""
        staging = self._stagings.pop(0)
        self._stagings.append(staging)
        shape, count = write_step(staging.words, self._step.layout, plan, self._step.table.vocab)
        staging.send(count)
        if plan.decodes.prefixes is not self._prefixes:
            self._send_prefixes(plan.decodes.prefixes, staging.prefixes)
        self._graphs.body(shape)
        foretold = [self._foretell(first, asked) for first, asked in plan.foretold()]
        vectors = self._pools.add(self._step.prompt_hidden, plan)
        if shape.samples:
            self._remember([chunk for chunk in plan.chunks if chunk.samples])
            self._graphs.head(shape)
            staging.fetch(self._step.tokens)
        logprobs = self._ask_logprobs(plan)
        staging.end()
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
