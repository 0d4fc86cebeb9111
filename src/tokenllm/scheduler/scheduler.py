"""The books of the running server: who waits, who runs, which token slots and rows each holds. No tensors, no text.

`accept` takes a message from a gateway, `plan` says what the next step computes, `settle` enters what it gave. Planning
may run ahead of settling: a token planned past a stop or a pause is dropped, and slots given back serve only steps
planned later. Who is admitted, read and paused is the router's word; it is asked when something can change.
"""

import time
from collections.abc import Callable, Iterable

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from tokenllm.engine.batch import Chunk, Column, Decodes, Plan, Sampled
from tokenllm.engine.runner import all_of
from tokenllm.memory.prefix_tree import NO_SLOTS
from tokenllm.memory.token_memory import TokenMemory
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
from tokenllm.routing.columns import Columns, Ints
from tokenllm.routing.learned_pace import LearnedPace
from tokenllm.routing.router import Router
from tokenllm.scheduler.backlog import Backlog
from tokenllm.scheduler.queue import Queue
from tokenllm.scheduler.request import Request
from tokenllm.scheduler.rows import Places, Rows, Uids

FINISHED: dict[FinishReason, int] = {reason: 1 + code for code, reason in enumerate(FINISH_REASONS)}
TIMED_EVERY = 8  # steps
LOOKS = 32  # waiting requests whose prefix is looked for again at a decision, at most:
FRUITLESS_LOOKS = 2  # of these that find what was known end it


class Planned(Struct, frozen=True):
    """A step, and whose tokens it samples: when they are known, a row may belong to somebody else."""

    plan: Plan
    rows: Places  # `plan.sampling_rows`
    uids: Uids  # in their order
    stays: Ints  # likewise; somebody who was paused may have come back to the same row


class Scheduler:
    """Continuous batching: requests join and leave at every step."""

    def __init__(
        self,
        memory: TokenMemory,
        router: Router,
        *,
        rows: int,
        max_positions: int,
        prefill_chunk_tokens: int,
        most_chunks: int,
        most_context_tokens: int,
        max_queued_requests: int,
        max_queued_tokens: int,
        eos_ids: frozenset[int],
        filled: Callable[[int, int], int] = all_of,
        pace: LearnedPace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.memory = memory
        self.router = router
        self.rows = Rows(rows, max_positions)
        self.waiting = Queue()
        self.pauses = 0  # so far
        self._pace, self._clock = pace, clock
        self._backlog = Backlog(pace, memory.capacity) if pace else None
        self._untimed = 0  # steps without prompts since the pace was told of one
        self._requests: dict[int, Request] = {}  # all that wait or run, by uid
        self._reading: list[Request] = []  # those who run and whose texts are not planned to the end
        self._changed = False  # somebody came or went since the router was last asked
        self._passed_over = False  # it left somebody waiting
        self._looked = 0  # place in the queue
        self._meetings = 0  # in the prefix tree, when it was last asked what each row shares
        self._prefill_chunk_tokens, self._most_chunks, self._filled = prefill_chunk_tokens, most_chunks, filled
        self._most_context_tokens = most_context_tokens
        self._max_queued = max_queued_requests, max_queued_tokens
        self._is_eos = _table_of(eos_ids)

    @property
    def predicted_peak(self) -> int:
        """The most tokens that those who run are expected to hold together."""
        return int(self.router.policy.peak(self.rows.columns(self.rows.staying())))

    @property
    def retry_after_s(self) -> int:
        """When it is worth coming back to a full queue."""
        return self._backlog.retry_after_s(self.waiting.columns()) if self._backlog else 1

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
        request = Request(submit, self._clock())
        if refusal := self._refusal(submit, request):
            return refusal
        request.kind = self.router.policy.kind(request.application, request.max_tokens)
        self._requests[submit.uid] = request
        self._wait(request)
        return Begin(submit.uid, len(request.prompt), submit.telling)

    def _refusal(self, submit: Submit, request: Request) -> Refused | None:
        most, longest = request.most, min(self.memory.capacity, self.rows.max_positions)
        if most > longest:
            word = f"prompt and max_tokens need {most} tokens of KV memory, a request may have {longest}"
            return Refused(submit.uid, 400, "context_length_exceeded", word)
        if submit.adapter or submit.media:
            return Refused(submit.uid, 400, "unsupported_parameter", "adapters and media are not served")
        if not len(request.prompt):
            return Refused(submit.uid, 400, "invalid_value", "the prompt is empty")
        if not self._may_wait(request):
            requests, tokens = len(self.waiting), self.waiting.prompt_tokens
            word = f"the queue is full: {requests} requests with {tokens} prompt tokens wait"
            return Refused(submit.uid, 429, "queue_full", word, self.retry_after_s)
        return None

    def _may_wait(self, request: Request) -> bool:
        """Whether the queue takes one more; a prompt of any length may stand in an empty one.

        If nobody was left waiting, those who have come since may be about to start, and do not count.
        """
        most_requests, most_tokens = self._max_queued
        if not self._passed_over:
            most_requests, most_tokens = most_requests + self.rows.free, most_tokens + self.memory.available
        short = not self.waiting or self.waiting.prompt_tokens + len(request.prompt) <= most_tokens
        return len(self.waiting) < most_requests and short

    def _wait(self, request: Request) -> None:
        self.waiting.add(request, *self._look(request))
        self._changed = True

    def _look(self, request: Request) -> tuple[int, int]:
        """What would be left to compute if it were admitted now, and what of the rest others hold anyway."""
        look = self.memory.prefixes.look(request.realm, request.adoptable)
        return len(request.text) - look.cached, look.active

    def _abort(self, uids: Iterable[int]) -> list[Begin | Refused | Step]:
        known = tuple(uid for uid in uids if uid in self._requests)
        for uid in known:
            self._finish(self._requests[uid])
        return [_last_words(known, "abort")] if known else []

    def _finish(self, request: Request, *, broken: bool = False) -> None:
        del self._requests[request.uid]
        self._changed = True
        if request.row is None:
            self.waiting.remove(request)
            return
        length = int(self.rows.generated[request.row])
        if length and not broken:
            self.router.finished(request.kind, length)
            if self._backlog:
                self._backlog.finished(length)
        known = len(self.rows.written(request.row)[0])
        self._leave(request, request.row, request.shared_tokens if broken else known)

    def _leave(self, request: Request, row: int, keep: int) -> None:
        """The row and what it holds are given up, but for the first tokens that the prefix tree is to keep."""
        held, prefixes, shared = self.rows.held(row), self.memory.prefixes, request.shared_tokens
        assert request.node, "who runs holds a node"
        surplus = prefixes.insert(request.node, self.rows.ids(row)[shared:keep], held[shared:keep])
        prefixes.unlock(request.node)
        if not self.rows.decodes[row]:
            self._reading.remove(request)
        request.row = request.node = None
        request.shared_tokens = 0
        self.memory.give_back(np.concatenate((surplus, held[keep:])))
        self.rows.release(row)

    def _pause(self, request: Request, row: int) -> None:
        """Back to the queue. What it has generated it will read again, as far as the prefix tree has not kept it.

        Nothing is kept of its newest token: what that one leads to is not known to be a number.
        """
        request.text, request.cached = self.rows.ids(row).copy(), int(self.rows.cached[row])
        request.was_paused = True
        keep = max(request.shared_tokens, min(int(self.rows.planned[row]), len(request.text) - 1))
        self._leave(request, row, keep)
        self._wait(request)
        self.pauses += 1

    def plan(self) -> Planned | None:
        """The next step; None when there is nothing to compute."""
        if self._must_decide():
            return self._decide()
        streams = self.rows.wanting_a_token()
        if len(streams) > self.memory.available:
            return self._decide()
        return self._planned(self._decode(streams), ())

    def _must_decide(self) -> bool:
        """Otherwise the batch goes on as it is, while there is room."""
        return self._changed or bool(self._reading) or (self.router.policy.retries and bool(self.waiting))

    def _decide(self) -> Planned | None:
        """Ask the router, and do what it says."""
        for request in self._reading:
            self._catch_up(request)
        self._look_again()
        self._see_who_shares()
        rows = self.rows.staying()
        running, waiting = self.rows.columns(rows), self.waiting.columns()
        leaving, now = self.rows.running - len(rows), self._clock()
        decision = self.router.decide(now, running, waiting, self.memory.available, leaving)
        self._note(now, waiting, decision.admit)
        for place in decision.pause.tolist():
            request = self._requests[int(running.uid[place])]
            assert request.row is not None, "who runs has a row"
            self._pause(request, request.row)
        streams = self.rows.wanting_a_token()
        decodes = self._decode(streams[: self.memory.available])  # room may come with those who leave
        to_read = decision.tokens - len(streams)
        self._admit(decision.admit)
        planned = self._planned(decodes, tuple(self._chunks(self._prompt_tokens(to_read, len(decodes.rows)))))
        # who was admitted on old news may have left no room to read in: somebody gives way
        return planned or (self.plan() if len(decision.pause) or len(decision.admit) else None)

    def _see_who_shares(self) -> None:
        """Ask anew what each row shares when somebody came to share what another had alone, or left it alone again."""
        if self._meetings != self.memory.prefixes.meetings:
            self._meetings = self.memory.prefixes.meetings
            for uid in self.rows.uids[self.rows.stays >= 0].tolist():
                self._see_what_is_shared(self._requests[uid])

    def _see_what_is_shared(self, request: Request) -> None:
        assert request.row is not None and request.node, "who runs holds a row and a node"
        self.rows.shared[request.row] = request.shared_tokens - self.memory.prefixes.sole(request.node)

    def _look_again(self) -> None:
        """Some of those who wait, each time others: what they will find is more by now, or forgotten. While that is
        so, the next ones are looked at too.
        """
        count = len(self.waiting)
        fruitless = 0
        for place in range(self._looked, self._looked + min(LOOKS, count)):
            fruitless += not self.waiting.see(place % count, *self._look(self.waiting.requests[place % count]))
            self._looked = (place + 1) % count
            if fruitless == FRUITLESS_LOOKS:
                break

    def _note(self, now: float, waiting: Columns, admit: Ints) -> None:
        """Who of those who wait is about to join."""
        if self._backlog and len(admit):
            self._backlog.admitted(now, waiting.take(admit))
        self._changed = bool(len(admit))
        self._passed_over = len(waiting) > len(admit)

    def _admit(self, places: Ints) -> None:
        for request in self.waiting.take(places):
            request.row = self.rows.admit(request)
            self._reading.append(request)
            self._catch_up(request)

    def _decode(self, rows: Places) -> Decodes:
        return self.rows.decode(rows, self.memory.take(len(rows)))

    def _prompt_tokens(self, wanted: int, decodes: int) -> int:
        """How many a step reads: with the decodes no more than a step without any, but at least a quarter of that."""
        most = self._prefill_chunk_tokens
        return self._filled(decodes, min(wanted, max(most - decodes, most // 4, 1)))

    def _chunks(self, budget: int) -> Iterable[Chunk]:
        """The next parts of texts, in the policy's order: so many tokens, texts and contexts in one step."""
        left, context = self._most_chunks, self._most_context_tokens
        budget = min(budget, self._prefill_chunk_tokens)
        for request in self._in_reading_order():
            row = request.row
            assert row is not None, "who reads has a row"
            self._catch_up(request)
            planned = int(self.rows.planned[row])
            tokens = min(budget, len(request.text) - planned, context - planned, self.memory.available)
            if tokens > 0 and left:
                chunk = self._chunk(request, row, tokens)
                left, budget, context = left - 1, budget - tokens, context - chunk.end
                yield chunk

    def _in_reading_order(self) -> list[Request]:
        unread = [len(request.text) - int(self.rows.planned[request.row]) for request in self._reading]
        order = self.router.policy.reading_order(np.array(unread, np.int64))
        return [self._reading[place] for place in order.tolist()]

    def _chunk(self, request: Request, row: int, tokens: int) -> Chunk:
        start, slots = int(self.rows.planned[row]), self.memory.take(tokens)
        prefix = self.rows.held(row).copy() if request.adopted else NO_SLOTS
        self.rows.read(row, slots)
        request.adopted = False
        self._share(request, *self.rows.written(row))
        if self.rows.decodes[row]:
            self._reading.remove(request)
            self._changed = True  # a step has more room for others' prompts
        return request.chunk(row, start, slots, prefix)

    def _catch_up(self, request: Request) -> None:
        """Adopt what others have computed of its text by now, be it in a chunk that this very step reads before."""
        prefixes, row, node = self.memory.prefixes, request.row, request.node
        assert row is not None, "who reads has a row"
        if node and not prefixes.goes_on(node, request.text[request.shared_tokens :]):
            return
        match = prefixes.match(request.realm, request.adoptable)
        if node and len(match) <= self.rows.planned[row]:
            return
        prefixes.lock(match.node)
        if node:
            prefixes.unlock(node)
        request.node, request.shared_tokens = match.node, len(match)
        self._see_what_is_shared(request)
        adopted = self.rows.adopt(row, match.slots)
        request.adopted |= adopted > 0
        if not request.was_paused:
            self.rows.cached[row] += adopted

    def _share(self, request: Request, ids: Column, slots: Column) -> None:
        """From this plan on others may begin with these tokens: what they read is computed before they read it.

        Where somebody else has shared the same since the prefix was found (as all twins have the last token of their
        prompt, which each computes for itself), the row keeps its own to the end, and nothing is held twice.
        """
        shared, node = request.shared_tokens, request.node
        assert node, "a row that reads has found its prefix"
        if further := self.memory.prefixes.extend(node, ids[shared:], slots[shared:]):
            request.node, request.shared_tokens = further, len(ids)

    def _planned(self, decodes: Decodes, chunks: tuple[Chunk, ...]) -> Planned | None:
        if not len(decodes.rows) and not chunks:
            return None
        plan = Plan(decodes, chunks)
        rows = plan.sampling_rows.astype(np.intp)
        return Planned(plan, rows, self.rows.uids[rows], self.rows.stays[rows])

    def settle(self, planned: Planned, sampled: Sampled) -> Step:
        """Enter what a step sampled, finish who is done, and tell the detokenizer."""
        # who ended or was paused after the launch is told nothing of it
        lives = self.rows.stays[planned.rows] == planned.stays
        rows, uids, tokens = planned.rows[lives], tuple(planned.uids[lives].tolist()), sampled.tokens[lives]
        self.rows.learn(rows, tokens)
        cached = tuple(self.rows.cached[rows].tolist())
        finished, valid = self._finished(rows, tokens), tokens >= 0
        ended = finished.nonzero()[0].tolist()
        for place in sorted(ended, key=lambda place: self.rows.stays[rows[place]]):  # so the policy learns from them
            self._finish(self._requests[uids[place]], broken=not valid[place])
        step = Step(
            uids=uids,
            counts=tuple(valid.view(np.int8).tolist()),
            ids=tokens[valid].tobytes(),
            finished=tuple(finished.tolist()),
            cached_tokens=cached,
            logprobs=_logprobs(planned.uids, sampled, lives) if sampled.logprobs else {},
            prompt_logprobs=_prompt_logprobs(sampled) if sampled.foretold else {},
        )
        return self._with_vectors(step, sampled) if sampled.vectors else step

    def _with_vectors(self, step: Step, sampled: Sampled) -> Step:
        """The same, in which those end too whose vectors are whole, unless they were aborted meanwhile."""
        ended = [self._requests[uid] for uid in sampled.vectors if uid in self._requests]
        valid = [bool(np.isfinite(sampled.vectors[request.uid]).all()) for request in ended]
        cached = [int(self.rows.cached[request.row]) for request in ended]
        for request, is_valid in zip(ended, valid, strict=True):
            self._finish(request, broken=not is_valid)
        return replace(
            step,
            uids=(*step.uids, *(request.uid for request in ended)),
            counts=(*step.counts, *(0 for _ in ended)),
            finished=(*step.finished, *(FINISHED["stop" if is_valid else "error"] for is_valid in valid)),
            cached_tokens=(*step.cached_tokens, *cached),
        )

    def took(self, planned: Planned, seconds: float) -> None:
        """What a step took: the router's pace is learned from it. Of steps that only decode, a few will do."""
        plan = planned.plan
        decodes = len(plan.decodes.rows)
        self._untimed = 0 if plan.chunks else (self._untimed + 1) % TIMED_EVERY
        if self._pace and not self._untimed:
            held = int(plan.decodes.positions.sum()) + decodes
            self._pace.took(seconds, held, decodes, plan.tokens - decodes)

    def _finished(self, rows: Places, tokens: Column) -> NDArray[np.int8]:
        """How each row ends with this token, its newest, in the numbers of `Step.finished`."""
        finished = np.zeros(len(rows), np.int8)
        finished[self.rows.generated[rows] == self.rows.max_tokens[rows]] = FINISHED["length"]
        finished[self._is_eos.take(tokens, mode="clip") & self.rows.heeds_eos[rows]] = FINISHED["stop"]
        if own := self.rows.stop_ids:
            stops = [token in own.get(row, ()) for row, token in zip(rows.tolist(), tokens.tolist(), strict=True)]
            finished[stops] = FINISHED["stop"]
        finished[tokens < 0] = FINISHED["error"]
        return finished


def _table_of(eos_ids: frozenset[int]) -> NDArray[np.bool_]:
    """Whether an id is among them. The last entry never is: it stands for all higher ids."""
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


def _prompt_logprobs(sampled: Sampled) -> dict[int, tuple[TokenLogprob, ...]]:
    """Also of those who were paused or aborted meanwhile: nobody listens for the latter any more."""
    return {
        uid: tuple(TokenLogprob(token, found.chosen, found.top) for token, found in foretold)
        for uid, foretold in sampled.foretold.items()
    }


def _last_words(uids: tuple[int, ...], reason: FinishReason) -> Step:
    none = (0,) * len(uids)
    return Step(uids=uids, counts=none, ids=b"", finished=(FINISHED[reason],) * len(uids), cached_tokens=none)
