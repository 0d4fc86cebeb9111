"""What one gateway has still to be told: never more than one delta per uid, however long its ring is full.

Owns the waiting messages of one ring C, so that a gateway that reads slowly delays nobody but itself.
"""

from collections import deque
from collections.abc import Iterator, Sequence

import msgspec

from tokenllm.messages import Delta, Outbound, Texts
from tokenllm.ring import HEADER, RingFull, Sender

BEHIND_BYTES = 1 << 15  # unread: enough to keep a gateway busy, and little enough that what waits is told soon

_encode = msgspec.msgpack.Encoder().encode


class Outbox:
    """Joins what waits, cuts it to the size of the ring, and sends it when there is room."""

    def __init__(self, sender: Sender[Outbound]) -> None:
        self._sender = sender
        self._largest = sender.capacity // 2 - HEADER.size
        self._frames: deque[bytes] = deque()
        self._deltas: dict[int, Delta] = {}

    @property
    def waiting(self) -> bool:
        return bool(self._frames or self._deltas)

    def put(self, message: Outbound) -> None:
        if not isinstance(message, Texts):
            self._frames.append(_encode(message))
            return
        for delta in message.deltas:
            earlier = self._deltas.get(delta.uid)
            self._deltas[delta.uid] = joined(earlier, delta) if earlier else delta

    def flush(self) -> None:
        """Send as much as there is room for now. Order holds for each uid: frames are older than deltas."""
        while self.waiting and self._sender.used_bytes < BEHIND_BYTES:
            if not self._frames:
                self._frames.extend(_frames(tuple(self._deltas.values()), self._largest))
                self._deltas.clear()
            try:
                self._sender.put(self._frames[0])
            except RingFull:
                return
            self._frames.popleft()


def joined(earlier: Delta, later: Delta) -> Delta:
    return Delta(
        uid=earlier.uid,
        text=earlier.text + later.text,
        tokens=earlier.tokens + later.tokens,
        logprobs=earlier.logprobs + later.logprobs,
        finish=later.finish,
        vector=earlier.vector + later.vector,
    )


def halves(delta: Delta) -> tuple[Delta, Delta]:
    """The same news in two: joined they are the delta again, and the last word stays last."""
    parts = delta.text, delta.logprobs, delta.vector
    assert any(len(part) > 1 for part in parts), "one token fits into the smallest ring"
    text, logprobs, vector = (len(part) // 2 for part in parts)
    return (
        Delta(delta.uid, delta.text[:text], delta.tokens, delta.logprobs[:logprobs], None, delta.vector[:vector]),
        Delta(delta.uid, delta.text[text:], 0, delta.logprobs[logprobs:], delta.finish, delta.vector[vector:]),
    )


def _frames(deltas: Sequence[Delta], largest: int) -> Iterator[bytes]:
    frame = _encode(Texts(tuple(deltas)))
    if len(frame) <= largest:
        yield frame
        return
    middle = len(deltas) // 2
    smaller = (deltas[:middle], deltas[middle:]) if middle else ((half,) for half in halves(deltas[0]))
    for some in smaller:
        yield from _frames(some, largest)
