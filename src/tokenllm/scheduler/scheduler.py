"""The books of the running server: who waits, who runs, which token slots and rows each holds. No tensors, no text.

`accept` takes a message from a gateway, `plan` says what the next step computes, `settle` enters what it gave. Planning
may run ahead of settling: a token planned past a stop is dropped, and slots given back serve only steps planned later.
"""

from collections import deque
from collections.abc import Iterable

from tokenllm.engine.batch import Plan, Sampled
from tokenllm.memory.token_slots import TokenSlots
from tokenllm.messages import (
    FINISH_REASONS,
    STILL_RUNNING,
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

FINISHED = {reason: 1 + code for code, reason in enumerate(FINISH_REASONS)}


class Scheduler:
    """Continuous batching: requests join and leave at every step."""

    def __init__(
        self,
        slots: TokenSlots,
        policy: Conservative,
        *,
        rows: int,
        prefill_chunk_tokens: int,
        max_queued_requests: int,
        max_queued_tokens: int,
        eos_ids: frozenset[int],
    ) -> None:
        self.slots = slots
        self.policy = policy
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.waiting_tokens = 0
        self._requests: dict[int, Request] = {}  # all that wait or run, by uid
        self._free_rows = list(range(rows))[::-1]
        self._prefill_chunk_tokens = prefill_chunk_tokens
        self._max_queued = max_queued_requests, max_queued_tokens
        self._eos_ids = eos_ids

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
        self._admit()
        return Begin(submit.uid, len(request.prompt), submit.stop)

    def _refusal(self, submit: Submit, request: Request) -> Refused | None:
        most, capacity = request.demand.most, self.slots.capacity
        if most > capacity:
            word = f"prompt and max_tokens need {most} tokens of KV memory, the server has {capacity}"
            return Refused(submit.uid, 400, "context_length_exceeded", word)
        if submit.adapter or submit.media:
            return Refused(submit.uid, 400, "unsupported_parameter", "adapters and media are not served")
        if not len(request.prompt):
            return Refused(submit.uid, 400, "invalid_value", "the prompt is empty")
        if not self._may_start(request) and not self._may_wait(request):
            word = f"the queue is full: {len(self.waiting)} requests with {self.waiting_tokens} prompt tokens wait"
            return Refused(submit.uid, 429, "queue_full", word)
        return None

    def _abort(self, uids: Iterable[int]) -> list[Begin | Refused | Step]:
        requests = [self._requests[uid] for uid in uids if uid in self._requests]
        for request in requests:
            self._finish(request)
        return [_last_words(requests, "abort")] if requests else []

    def _finish(self, request: Request) -> None:
        request.finished = True
        del self._requests[request.uid]
        if request in self.running:
            self.running.remove(request)
            self.slots.give_back(request.held_slots)
            self._free_rows.append(request.row)
        else:
            self.waiting.remove(request)
            self.waiting_tokens -= len(request.prompt)

    def plan(self) -> tuple[Plan, tuple[Request, ...]] | None:
        """The next step and the requests of its pieces that sample; None when there is nothing to compute."""
        self._admit()
        shares = [(request, 1) for request in self.running if not request.prompt_left and request.wants_step]
        budget = self._prefill_chunk_tokens
        for request in self.running:
            if budget and request.prompt_left:
                shares.append((request, min(budget, request.prompt_left)))
                budget -= shares[-1][1]
        if not shares:
            return None
        pieces = tuple(request.next_piece(self.slots.take(tokens)) for request, tokens in shares)
        return Plan(pieces), tuple(r for (r, _), piece in zip(shares, pieces, strict=True) if piece.samples)

    def _may_start(self, request: Request) -> bool:
        """Whether there is a row and, by the policy, memory for it."""
        running = (other.demand for other in self.running)
        return bool(self._free_rows) and self.policy.admits(request.demand, running)

    def _may_wait(self, request: Request) -> bool:
        """Whether the queue takes one more; a prompt of any length may stand in an empty one."""
        max_requests, max_tokens = self._max_queued
        short = not self.waiting or self.waiting_tokens + len(request.prompt) <= max_tokens
        return len(self.waiting) < max_requests and short

    def _admit(self) -> None:
        """First come, first served, as long as rows and the policy allow."""
        while self.waiting and self._may_start(self.waiting[0]):
            request = self.waiting.popleft()
            self.waiting_tokens -= len(request.prompt)
            request.start(self._free_rows.pop())
            self.running.append(request)

    def settle(self, requests: tuple[Request, ...], outcome: tuple[Sampled, ...]) -> Step:
        """Enter what a step sampled, finish who is done, and tell the detokenizer."""
        told = [(request, sampled) for request, sampled in zip(requests, outcome, strict=True) if not request.finished]
        reasons = [self._enter(request, sampled.token) for request, sampled in told]
        valid = [(request, sampled) for request, sampled in told if sampled.token >= 0]
        return Step(
            uids=tuple(request.uid for request, _ in told),
            counts=tuple(int(sampled.token >= 0) for _, sampled in told),
            ids=b"".join(sampled.token.to_bytes(4, "little") for _, sampled in valid),
            finished=tuple(FINISHED[reason] if reason else STILL_RUNNING for reason in reasons),
            cached_tokens=(0,) * len(told),
            logprobs={r.uid: (TokenLogprob(s.token, s.logprob, s.top),) for r, s in valid if s.logprob is not None},
        )

    def _enter(self, request: Request, token: int) -> FinishReason | None:
        request.generated += 1
        reason = request.finish_reason(token, self._eos_ids)
        if reason:
            self._finish(request)
        return reason


def _last_words(requests: list[Request], reason: FinishReason) -> Step:
    return Step(
        uids=tuple(request.uid for request in requests),
        counts=(0,) * len(requests),
        ids=b"",
        finished=(FINISHED[reason],) * len(requests),
        cached_tokens=(0,) * len(requests),
    )
