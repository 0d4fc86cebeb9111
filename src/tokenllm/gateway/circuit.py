"""The gateway's ends of the circle: what it sends into ring A, what comes out of ring C, and the law between the two.

Owns the ledger: every uid that entered ring A stays in it until its last word, also when its client has left. Relies
on living in one event loop; nothing here waits except `Circuit.listen` and whoever reads a `Reply`.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import inf

from tokenllm.counters import Page
from tokenllm.gateway.reply import Reply
from tokenllm.messages import Abort, Delta, Finish, Inbound, Outbound, Ready, Refused, Submit, Texts, make_uid
from tokenllm.ring import FrameTooLarge, Receiver, RingCorrupt, RingFds, RingFull, Sender, close_ring
from tokenllm_schemas.errors import TYPES, ApiError, busy

RETRY_ABORTS_S = 0.01


class _Line:
    """One uid between its submit and its last word."""

    __slots__ = ("arrived_s", "index", "reply", "spoke_s")

    def __init__(self, reply: Reply, index: int, arrived_s: float) -> None:
        self.reply: Reply | None = reply  # None: its client left
        self.index = index
        self.arrived_s = arrived_s
        self.spoke_s: float | None = None  # when its newest token came


class _Rings:
    """The two rings of one generation."""

    def __init__(self, generation: int, outbound: RingFds, inbound: RingFds) -> None:
        self.generation = generation
        self._fds = outbound, inbound
        self.sender: Sender[Inbound] = Sender(outbound)
        self.receiver: Receiver[Outbound] = Receiver(inbound, Outbound)

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()
        for fds in self._fds:
            close_ring(fds)


class Circuit:
    """Submits, aborts, and routes what comes back."""

    def __init__(self, slot: int, incarnation: int, page: Page, on_ready: Callable[[Ready], None]) -> None:
        self._gateway = slot, incarnation
        self._counter = 0
        self._page = page
        self._on_ready = on_ready
        self._rings: _Rings | None = None
        self._ledger: dict[int, _Line] = {}
        self._unsent_aborts: deque[int] = deque()
        self._bell = asyncio.Event()
        self.ready: Ready | None = None
        self.heard_s = 0.0  # when the living generation last said something about a request

    def attach(self, generation: int, ring_a: RingFds, ring_c: RingFds) -> None:
        """Talk to this generation from now on."""
        assert self._rings is None, "the supervisor says that a generation is lost before it brings the next"
        self._rings = _Rings(generation, ring_a, ring_c)
        self.heard_s = 0.0
        asyncio.get_running_loop().add_reader(self._rings.receiver.fileno(), self._bell.set)

    def lose(self, generation: int) -> None:
        """The generation is dead: whoever waits for it gets the last word here."""
        if self._rings is None or self._rings.generation != generation:
            return
        asyncio.get_running_loop().remove_reader(self._rings.receiver.fileno())
        with suppress(RingCorrupt):  # what it had said before stays said
            self._hear(self._rings)
        self._rings.close()
        self._rings = self.ready = None
        self._unsent_aborts.clear()
        for uid in list(self._ledger):
            self._end(uid, "error", ApiError(503, "the model process died; try again", "engine_error"))

    def next_uid(self) -> int:
        self._counter += 1
        return make_uid(*self._gateway, self._counter)

    def submit(self, submits: Sequence[Submit], patience_s: float = inf) -> Reply:
        """All choices of one HTTP request, or none of them. `patience_s`: how long its client waits for a word."""
        if self._rings is None or self.ready is None:
            raise busy("the model is still loading", "loading")
        reply = Reply([submit.uid for submit in submits], submits[0].arrived_s, patience_s)
        for index, submit in enumerate(submits):
            try:
                self._rings.sender.send(submit)
            except (RingFull, FrameTooLarge) as error:
                self.abandon(reply)
                self.count_refused(len(submits) - index)
                raise _unsent(error) from None
            self._ledger[submit.uid] = _Line(reply, index, submit.arrived_s)
        return reply

    def count_refused(self, choices: int) -> None:
        """Choices that never entered ring A have their last word too."""
        self._page.add("tokenllm_requests_finished_total", choices, label="refused")

    def abandon(self, reply: Reply) -> None:
        """Nobody reads this reply any more: abort what has not ended, and keep waiting for its last words."""
        reply.close()
        for uid in reply.uids:
            if line := self._ledger.get(uid):
                line.reply = None
                self._abort(uid)

    def cut(self, error: ApiError) -> None:
        """End every reply that somebody still reads."""
        for line in self._ledger.values():
            if line.reply:
                line.reply.fail(error)

    def waiting_since(self) -> float | None:
        """When the oldest request that has not ended arrived."""
        return next((line.arrived_s for line in self._ledger.values()), None)

    async def listen(self) -> None:
        """Route whatever comes, for ever."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(RETRY_ABORTS_S if self._unsent_aborts else None):
                    await self._bell.wait()
            self._bell.clear()
            self.turn()

    def turn(self) -> None:
        """Route what has come, and send the aborts that had to wait for room."""
        if self._rings is None:
            return
        self._rings.receiver.clear_bell()  # before draining: a frame published in between rings again
        self._hear(self._rings)
        while self._unsent_aborts and self._sent(Abort(self._unsent_aborts[0])):
            self._unsent_aborts.popleft()

    def _hear(self, rings: _Rings) -> None:
        try:
            for message in rings.receiver.receive():
                self._route(message)
        except RingCorrupt:
            self._page.add("tokenllm_ring_corrupt_total")
            raise

    def _route(self, message: Outbound) -> None:
        match message:
            case Texts():
                self.heard_s = time.monotonic()
                self._deliver(message.deltas, self.heard_s)
            case Refused():
                self.heard_s = time.monotonic()
                self._end(message.uid, "refused", _refusal(message))
            case Ready():
                self.ready = message
                self._on_ready(message)

    def _deliver(self, deltas: Sequence[Delta], now_s: float) -> None:
        gaps: dict[tuple[float, int], int] = {}  # those who spoke together before spoke at the same time
        for delta in deltas:
            line = self._ledger.get(delta.uid)
            if line is None:  # a predecessor's
                continue
            if delta.tokens:
                if line.spoke_s is None:
                    self._page.observe("tokenllm_time_to_first_token_seconds", now_s - line.arrived_s)
                else:
                    gap = line.spoke_s, delta.tokens
                    gaps[gap] = gaps.get(gap, 0) + 1
                line.spoke_s = now_s
            if delta.finish:
                self._last_delta(delta, delta.finish)
            elif line.reply:
                line.reply.put(line.index, delta)
        for (spoke_s, tokens), lines in gaps.items():
            self._page.observe("tokenllm_inter_token_latency_seconds", (now_s - spoke_s) / tokens, tokens * lines)

    def _last_delta(self, delta: Delta, finish: Finish) -> None:
        self._end(delta.uid, finish.reason, _failure(finish) or delta)
        if finish.by_stop_string:
            self._abort(delta.uid)

    def _end(self, uid: int, reason: str, last_word: Delta | ApiError) -> None:
        line = self._ledger.pop(uid, None)
        if line is None:
            return
        self._page.add("tokenllm_requests_finished_total", label=reason)
        self._page.observe("tokenllm_request_seconds", time.monotonic() - line.arrived_s)
        match line.reply, last_word:
            case Reply(), Delta():
                line.reply.put(line.index, last_word)
            case Reply(), ApiError():
                line.reply.fail(last_word)

    def _abort(self, uid: int) -> None:
        if not self._sent(Abort(uid)):
            self._unsent_aborts.append(uid)
            self._bell.set()  # `listen` may be asleep without a limit

    def _sent(self, message: Inbound) -> bool:
        assert self._rings, "the ledger is empty without a generation"
        try:
            self._rings.sender.send(message)
        except RingFull:
            return False
        return True


def _unsent(error: RingFull | FrameTooLarge) -> ApiError:
    if isinstance(error, RingFull):
        return busy("the server has no room for another request now")
    return ApiError(400, "the prompt is larger than this server can pass on", "invalid_value")


def _refusal(refused: Refused) -> ApiError:
    status = refused.status if refused.status in TYPES else 500
    headers = {"retry-after": str(refused.retry_after_s or 1)} if status in (429, 503) else {}
    return ApiError(status, refused.message, refused.code, headers=headers)


def _failure(finish: Finish) -> ApiError | None:
    """Clients know no such finish reason: a completion that was cut is an error to them."""
    match finish.reason:
        case "abort":
            return ApiError(503, "the server gave this request up", "aborted", headers={"retry-after": "1"})
        case "error":
            return ApiError(500, "the model failed on this request", "engine_error")
        case _:
            return None
