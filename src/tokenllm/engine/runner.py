"""Executes plans: owns KV memory, the index table and everything else that lives where the model does.

`launch(plan)` returns a flight, `collect(flight)` what it sampled. Flights are collected in the order of their launch,
and all state belongs to that one order. What a row asks for when it samples comes with the last chunk of its prompt and
is remembered here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenllm.engine.batch import Chunk, Decodes, Foretold, Logprob, Plan, Pooled, Sampled
from tokenllm.engine.pooling import Pools
from tokenllm.models.decoder import Decoder
from tokenllm_kernels import LogitsRule, attention, plan_attention, sample, top_logprobs

F = TypeVar("F")

FORETOLD_AT_ONCE = 32  # tokens of prompts whose logprobs are computed together


class Runner(Protocol[F]):
    """Who computes steps. A row samples by the rule of its newest prompt, until that row gets another."""

    @property
    def ahead(self) -> int:
        """How many steps may be in flight when the next is launched."""
        ...

    @property
    def most_chunks(self) -> int:
        """How many prompts one step may read of."""
        ...

    @property
    def most_context_tokens(self) -> int:
        """How long the prompts that one step reads may be together, what was computed before included."""
        ...

    def filled(self, decodes: int, prompt_tokens: int) -> int:
        """Of so many prompt tokens that wait beside so many decodes, how many make a good step."""
        ...

    @property
    def compilations(self) -> int:
        """Kernels compiled since the runner was warm; none, if all is well."""
        ...

    def launch(self, plan: Plan) -> F: ...

    def collect(self, flight: F) -> Sampled: ...


@dataclass(frozen=True)
class Wish:
    """What a row asks for when it samples."""

    rule: LogitsRule
    logprobs: int | None
    counts: Tensor | None  # [vocab] how often each token was generated; for rules that penalize
    said: list[int]  # what was generated; for rules with bad words


@dataclass(frozen=True)
class Flight:
    """A launched step, in the order of the rows that sample."""

    logprobs: tuple[int | None, ...]
    tokens: Tensor  # [rows]
    logits: Tensor  # [rows, vocab]
    foretold: dict[int, list[tuple[int, Logprob]]]
    vectors: dict[int, Tensor]


def all_of(decodes: int, prompt_tokens: int) -> int:
    """For a runner to whom every step is as good."""
    return prompt_tokens


class CpuRunner:
    """One model with `slots` tokens of KV memory and `rows` requests of at most `max_positions` tokens.

    The work is done when `launch` returns, and none runs ahead: computing a step before the last one is known would
    waste rows and keep newcomers waiting.
    """

    ahead = 0
    most_chunks = 1 << 20
    most_context_tokens = 1 << 40
    filled = staticmethod(all_of)
    compilations = 0

    def __init__(self, decoder: Decoder, slots: int, rows: int, max_positions: int) -> None:
        self._decoder = decoder
        self._padding_slot = slots
        self._kv = decoder.kv_memory(slots)
        self._index = torch.full((rows, max_positions), slots, dtype=torch.int32)  # [row, position] → slot
        self._last_token = torch.zeros(rows, dtype=torch.int64)
        self._wishes: dict[int, Wish] = {}  # by row
        self._pools = Pools()

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Flight:
        decodes, chunks = plan.decodes, plan.chunks
        rows = [*decodes.rows.tolist(), *(chunk.row for chunk in chunks)]
        starts = [*decodes.positions.tolist(), *(chunk.start for chunk in chunks)]
        counts = [*[1] * len(decodes.rows), *(chunk.tokens for chunk in chunks)]
        positions = _end_to_end(decodes.positions, *(np.arange(chunk.start, chunk.end) for chunk in chunks))
        slots = _end_to_end(decodes.slots, *(chunk.slots for chunk in chunks))
        for chunk in chunks:
            self._index[chunk.row, : len(chunk.prefix)] = torch.from_numpy(chunk.prefix)
        self._index[np.repeat(rows, counts), positions] = slots.int()
        attention_plan = plan_attention(self._index, rows, starts, counts, self._padding_slot, self._decoder.dtype)
        last = _last_places(plan, counts)
        x = self._decoder.hidden(self._ids(plan), positions, slots, self._kv, partial(attention, plan=attention_plan))
        logits = self._decoder.logits(x.index_select(0, last)).float()
        foretold = dict(self._foretell(x, plan))
        self._wishes.update((chunk.row, self._wish(chunk)) for chunk in chunks if chunk.samples)
        wishes = [self._wishes[row] for row in plan.sampling_rows.tolist()]
        tokens = self._sample(logits, wishes, positions[last] + 1)
        self._last_token[plan.sampling_rows] = tokens
        return Flight(tuple(wish.logprobs for wish in wishes), tokens, logits, foretold, self._pools.add(x, plan))

    def _foretell(self, x: Tensor, plan: Plan) -> Iterator[tuple[int, list[tuple[int, Logprob]]]]:
        """Of so few tokens at a time that the memory it takes is no matter."""
        for first, foretold in plan.foretold():
            tokens, found = torch.from_numpy(foretold.tokens.astype(np.int64)), []
            for place in range(0, len(tokens), FORETOLD_AT_ONCE):
                part = tokens[place : place + FORETOLD_AT_ONCE]
                logits = self._decoder.logits(x[first + place :][: len(part)]).float()
                found += list_logprobs(part.tolist(), top_logprobs(logits, part, foretold.alternatives))
            yield foretold.uid, found

    def _ids(self, plan: Plan) -> Tensor:
        prompts = _end_to_end(*(chunk.ids for chunk in plan.chunks))
        return torch.cat((self._last_token[plan.decodes.rows], prompts)).clamp_(0, self._decoder.vocab_size - 1)

    def _wish(self, chunk: Chunk) -> Wish:
        counts = None
        if chunk.rule.penalizes:
            generated = torch.from_numpy(chunk.generated.astype(np.int64))
            counts = generated.bincount(minlength=self._decoder.vocab_size).float()
        return Wish(chunk.rule, chunk.logprobs, counts, chunk.generated.tolist())

    def _sample(self, logits: Tensor, wishes: Sequence[Wish], positions: Tensor) -> Tensor:
        counts = [wish.counts for wish in wishes]
        said = [wish.said for wish in wishes]
        tokens = sample(logits, [wish.rule for wish in wishes], positions.tolist(), counts, said)
        for token, wish in zip(tokens.tolist(), wishes, strict=True):
            if wish.rule.bad_words:
                wish.said.append(token)
        for token, count in zip(tokens, counts, strict=True):
            if count is not None:
                count[token] += 1
        return tokens

    @torch.inference_mode()
    def collect(self, flight: Flight) -> Sampled:
        tokens = flight.tokens.numpy().astype(np.int32)
        return Sampled(tokens, _logprobs(flight), flight.foretold, as_arrays(flight.vectors))


def as_arrays(vectors: dict[int, Tensor]) -> dict[int, NDArray[np.float32]]:
    return {uid: vector.numpy() for uid, vector in vectors.items()}


def _end_to_end(*parts: NDArray[np.integer]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *parts], dtype=np.int64))


def _last_places(plan: Plan, counts: Sequence[int]) -> Tensor:
    """Where in the batch the last tokens of the sequences that sample stand."""
    samples = [*[True] * len(plan.decodes.rows), *(chunk.samples for chunk in plan.chunks)]
    return torch.from_numpy(np.cumsum(counts)[samples] - 1)


def _logprobs(flight: Flight) -> dict[int, Logprob]:
    """By place in the flight, for those who asked."""
    wanted = {place: count for place, count in enumerate(flight.logprobs) if count is not None}
    if not wanted:
        return {}
    asked = list(wanted)
    found = top_logprobs(flight.logits[asked], flight.tokens[asked], max(wanted.values()))
    return {
        place: Logprob(chosen, tuple(zip(ids[:count], values[:count], strict=True)))
        for (place, count), chosen, values, ids in zip(wanted.items(), *(t.tolist() for t in found), strict=True)
    }


def list_logprobs(tokens: Sequence[int], found: Sequence[Tensor]) -> list[tuple[int, Logprob]]:
    """Of each token what `top_logprobs` found."""
    columns = zip(tokens, *(column.tolist() for column in found), strict=True)
    return [(token, Logprob(chosen, tuple(zip(ids, top, strict=True)))) for token, chosen, top, ids in columns]


def warm_up(runner: Runner[Any], tokens: int, rule: LogitsRule, logprobs: int | None = None) -> None:
    """One prompt and one step after it, so that the first request finds everything prepared."""
    slots, row = np.arange(tokens, dtype=np.int32), np.zeros(1, np.int32)
    ids = np.zeros(tokens - 1, np.int32)
    foretold = Foretold(0, 0, ids[1:FORETOLD_AT_ONCE], logprobs or 0) if len(ids) > 1 else None
    pooled = Pooled(0, 0, begins=True, ends=True)
    chunk = Chunk(0, 0, slots[:-1], ids, True, rule, logprobs, foretold=foretold, pooled=pooled)
    prompt = Plan(Decodes.none(), (chunk,))
    decode = Plan(Decodes(row, row + len(ids), slots[-1:]))
    for plan in (prompt, decode) if tokens > 1 else ():
        runner.collect(runner.launch(plan))
