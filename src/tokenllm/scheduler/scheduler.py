"""The books of the running server: who waits, who runs, which token slots and rows each holds. No tensors, no text.

`accept` takes a message from a gateway, `plan` says what the next step computes, `settle` enters what it gave. Planning
may run ahead of settling: a token planned past a stop is dropped, and slots given back serve only steps planned later.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenllm.engine.batch import Chunk, Column, Decodes, Plan, Sampled
from tokenllm.memory.prefix_tree import NO_SLOTS
from tokenllm.memory.token_memory import TokenMemory
from tokenllm.memory.token_slots import Slots
from tokenllm.messages import (
    FINISH_REASONS,
    Abort,
    Begin,
    FinishReason,
    GatewayLost,
    Inbound,
    Refused,
    Step,
    Submit,
    TokenLogprob,
    gateway_of,
)
from tokenllm.routing.policy import Conservative
from tokenllm.scheduler.request import Request
from tokenllm.scheduler.rows import Rows, Uids

FINISHED: dict[FinishReason, int] = {reason: 1 + code for code, reason in enumerate(FINISH_REASONS)}


@dataclass(frozen=True)
class Planned:
    """A step, and whose tokens it samples: when they are known, a row may belong to somebody else."""

    plan: Plan
    uids: Uids  # in the order of `plan.sampling_rows`


class Scheduler:
    """Continuous batching: requests join and leave at every step."""

    def __init__(
        self,
        memory: TokenMemory,
        policy: Conservative,
        *,
        rows: int,
        max_positions: int,
        prefill_chunk_tokens: int,
        most_chunks: int,
        most_context_tokens: int,
        max_queued_requests: int,
        max_queued_tokens: int,
        eos_ids: frozenset[int],
    ) -> None:
        self.memory = memory
        self.policy = policy
        self.rows = Rows(rows, max_positions)
        self.waiting: deque[Request] = deque()
        self.waiting_tokens = 0
        self._reading: deque[Request] = deque()  # those who run and whose prompts are not planned to the end
        self._requests: dict[int, Request] = {}  # all that wait or run, by uid
        self._may_admit = False  # somebody came or went since the policy was last asked
        self._prefill_chunk_tokens, self._most_chunks = prefill_chunk_tokens, most_chunks
        self._most_context_tokens = most_context_tokens
        self._max_queued = max_queued_requests, max_queued_tokens
        self._is_eos = _table_of(eos_ids)

    @property
    def predicted_peak(self) -> int:
        return self.policy.predicted_peak(self.rows.demands())

    def accept(self, message: Inbound) -> list[Begin | Refused | Step]:
        """Take a message; what it returns is for the detokenizer."""
        match message:
            case Submit():
                return [self._enqueue(message)]
            case Abort(uid=uid):
                return self._abort([uid])
            case GatewayLost(slot=slot, incarnation=incarnation):
                return self._abort([uid for uid in self._requests if gateway_of(uid) == (slot, incarnation)])

    def _enqueue(self, submit: Submit) -> Begin | Refused:
        request = Request(submit)
        if refusal := self._refusal(submit, request):
            return refusal
        self._requests[submit.uid] = request
        self.waiting.append(request)
        self.waiting_tokens += len(request.prompt)
        self._may_admit = True
        self._admit()
        return Begin(submit.uid, len(request.prompt), submit.stop)

    def _refusal(self, submit: Submit, request: Request) -> Refused | None:
        most, longest = request.demand.most, min(self.memory.capacity, self.rows.max_positions)
        if most > longest:
            word = f"prompt and max_tokens need {most} tokens of KV memory, a request may have {longest}"
            return Refused(submit.uid, 400, "context_length_exceeded", word)
        if submit.adapter or submit.media:
            return Refused(submit.uid, 400, "unsupported_parameter", "adapters and media are not served")
        if not len(request.prompt):
            return Refused(submit.uid, 400, "invalid_value", "the prompt is empty")
        if not self._may_wait(request) and (self.waiting or not self._may_start(request)):
            word = f"the queue is full: {len(self.waiting)} requests with {self.waiting_tokens} prompt tokens wait"
            return Refused(submit.uid, 429, "queue_full", word)
        return None

    def _may_wait(self, request: Request) -> bool:
        """Whether the queue takes one more; a prompt of any length may stand in an empty one."""
        max_requests, max_tokens = self._max_queued
        short = not self.waiting or self.waiting_tokens + len(request.prompt) <= max_tokens
        return len(self.waiting) < max_requests and short

    def _may_start(self, request: Request) -> bool:
        """Whether there is a row and, by the policy, memory for it."""
        return self.rows.any_free and self.policy.admits(request.demand, self.rows.demands())

    def _admit(self) -> None:
        """First come, first served, as long as rows and the policy allow."""
        while self._may_admit and self.waiting and self._may_start(self.waiting[0]):
            request = self.waiting.popleft()
            self.waiting_tokens -= len(request.prompt)
            request.row = self.rows.admit(request)
            self._reading.append(request)
        self._may_admit = False

    def _abort(self, uids: Iterable[int]) -> list[Begin | Refused | Step]:
        known = tuple(uid for uid in uids if uid in self._requests)
        for uid in known:
            self._finish(uid)
        return [_last_words(known, "abort")] if known else []

    def _finish(self, uid: int, *, broken: bool = False) -> None:
        request = self._requests.pop(uid)
        self._may_admit = True
        if request.row is None:
            self.waiting.remove(request)
            self.waiting_tokens -= len(request.prompt)
            return
        if not self.rows.decodes[request.row]:
            self._reading.remove(request)
        self._give_back(request, request.row, broken)

    def _give_back(self, request: Request, row: int, broken: bool) -> None:
        """What the row holds, but for what the prefix tree keeps of it: of a broken one what it shared before."""
        ids, slots = self.rows.written(row)
        if broken:
            ids, slots = ids[: request.shared_tokens], slots[: request.shared_tokens]
        beyond = self.rows.held(row)[len(slots) :].copy()  # computed past the end, or never to be known
        surplus = self.memory.prefixes.insert(request.realm, ids, slots).surplus if len(ids) else NO_SLOTS
        if request.node:
            self.memory.prefixes.unlock(request.node)
        self.rows.release(row)
        self.memory.give_back(np.concatenate((surplus, beyond)))

    def plan(self) -> Planned | None:
        """The next step; None when there is nothing to compute."""
        self._admit()
        decodes, chunks = self._decodes(), tuple(self._chunks())
        if not len(decodes.rows) and not chunks:
            return None
        plan = Plan(decodes, chunks)
        return Planned(plan, self.rows.uids[plan.sampling_rows])

    def _decodes(self) -> Decodes:
        rows = self.rows.wanting_a_token()
        return self.rows.decode(rows, self.memory.take(len(rows)))

    def _chunks(self) -> Iterable[Chunk]:
        """Prompts are read in the order of admission, so many tokens and so many prompts in one step."""
        budget, context = self._prefill_chunk_tokens, self._most_context_tokens
        for _ in range(self._most_chunks):
            if not (budget and self._reading and len(self._reading[0].prompt) <= context):
                return
            chunk = self._chunk(self._reading[0], budget)
            if chunk.samples:
                self._reading.popleft()
            budget, context = budget - chunk.tokens, context - chunk.end
            yield chunk

    def _chunk(self, request: Request, most_tokens: int) -> Chunk:
        row = request.row
        assert row is not None, "who reads a prompt has a row"
        prefix = NO_SLOTS if request.node else self._find_prefix(request, row)
        left = len(request.prompt) - int(self.rows.planned[row])
        slots = self.memory.take(min(most_tokens, left))
        chunk = request.chunk(row, self.rows.read(row, slots), slots, prefix)
        self._share(request, *self.rows.written(row))
        return chunk

    def _find_prefix(self, request: Request, row: int) -> Slots:
        """What was computed before, be it by the prompt that this very step reads before this one."""
        match = self.memory.prefixes.match(request.realm, request.prompt)
        self.memory.prefixes.lock(match.node)
        request.node, request.shared_tokens = match.node, len(match)
        self.rows.adopt(row, match.slots)
        return match.slots

    def _share(self, request: Request, ids: Column, slots: Slots) -> None:
        """From this plan on others may begin with these tokens: what they read is computed before they read it.

        Where somebody else has shared the same since the prefix was found (as all twins have the last token of their
        prompt, which each computes for itself), the row keeps its own to the end, and nothing is held twice.
        """
        prefixes, node = self.memory.prefixes, request.node
        assert node, "a row that reads has found its prefix"
        if prefixes.known(request.realm, ids) == request.shared_tokens:
            request.node, request.shared_tokens = prefixes.insert(request.realm, ids, slots).node, len(ids)
            prefixes.lock(request.node)
            prefixes.unlock(node)

    def settle(self, planned: Planned, sampled: Sampled) -> Step:
        """Enter what a step sampled, finish who is done, and tell the detokenizer."""
        rows = planned.plan.sampling_rows
        lives = self.rows.uids[rows] == planned.uids  # who ended after the launch has had a last word already
        rows, uids, tokens = rows[lives], tuple(planned.uids[lives].tolist()), sampled.tokens[lives]
        self.rows.learn(rows, tokens)
        cached = tuple(self.rows.cached[rows].tolist())
        finished, valid = self._finished(rows, tokens), tokens >= 0
        for place in finished.nonzero()[0]:
            self._finish(uids[place], broken=bool(tokens[place] < 0))
        return Step(
            uids=uids,
            counts=tuple(valid.view(np.int8).tolist()),
            ids=tokens[valid].tobytes(),
            finished=tuple(finished.tolist()),
            cached_tokens=cached,
            logprobs=_logprobs(planned.uids, sampled, lives) if sampled.logprobs else {},
        )

    def _finished(self, rows: Column, tokens: Column) -> NDArray[np.int8]:
        """How each row ends with this token, its newest, in the numbers of `Step.finished`."""
        at_length = self.rows.generated[rows] == self.rows.max_tokens[rows]
        finished = at_length * np.int8(FINISHED["length"])
        is_eos = self._is_eos[np.minimum(tokens, len(self._is_eos) - 1)]
        finished[is_eos & self.rows.heeds_eos[rows]] = FINISHED["stop"]
        finished[tokens < 0] = FINISHED["error"]
        return finished


def _table_of(eos_ids: frozenset[int]) -> NDArray[np.bool_]:
    """Whether an id is among them. The last entry never is: it stands for all higher ids, and for -1."""
    table = np.zeros(max(eos_ids, default=-1) + 2, bool)
    table[list(eos_ids)] = True
    return table


def _logprobs(uids: Uids, sampled: Sampled, lives: NDArray[np.bool_]) -> dict[int, tuple[TokenLogprob]]:
    """Of those who asked, live, and got a token."""
    told = {}
    for place, found in sampled.logprobs.items():
        token = int(sampled.tokens[place])
        if lives[place] and token >= 0:
            told[int(uids[place])] = (TokenLogprob(token, found.chosen, found.top),)
    return told


def _last_words(uids: tuple[int, ...], reason: FinishReason) -> Step:
    none = (0,) * len(uids)
    return Step(uids=uids, counts=none, ids=b"", finished=(FINISHED[reason],) * len(uids), cached_tokens=none)
