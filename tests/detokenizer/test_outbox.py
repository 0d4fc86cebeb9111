"""Laws of the outbox: whatever the ring's room and the reader's pace, every uid's news arrives whole and in order."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenllm.detokenizer.outbox import BEHIND_BYTES, Outbox, joined
from tokenllm.messages import Delta, Finish, Outbound, Refused, Texts, TokenText
from tokenllm.ring import Receiver, RingFds, Sender, close_ring, create_ring

FINISH = Finish("length", prompt_tokens=3, cached_tokens=0, completion_tokens=9)
TOKEN = st.builds(TokenText, st.text(max_size=3), st.binary(max_size=4), st.just(-1.0), st.just((("x", b"x", -2.0),)))


def deltas(uids: st.SearchStrategy[int]) -> st.SearchStrategy[Delta]:
    return st.builds(
        Delta,
        uids,
        st.text(max_size=5) | st.integers(0, 1500).map("é".__mul__),
        st.integers(0, 3),
        st.lists(TOKEN, max_size=15).map(tuple),
        st.just(FINISH) | st.none(),
        st.binary(max_size=5) | st.integers(0, 1500).map(b"\1\2\3".__mul__),
    )


PUTS = st.lists(deltas(st.integers(0, 4)), max_size=8).map(lambda some: Texts(tuple(some)))
DOINGS = st.lists(PUTS | st.sampled_from(["flush", "drain"]), max_size=20)


@pytest.fixture
def ring() -> Iterator[RingFds]:
    fds = create_ring(1024)
    yield fds
    close_ring(fds)


def lawful(texts: Texts, ended: set[int]) -> Texts:
    """Without what comes after a uid's last word."""
    kept = []
    for delta in texts.deltas:
        if delta.uid not in ended:
            kept.append(delta)
        if delta.finish:
            ended.add(delta.uid)
    return Texts(tuple(kept))


def stories(news: list[Outbound]) -> dict[int, Delta]:
    """All that each uid was told, as one delta."""
    told: dict[int, Delta] = {}
    for texts in news:
        assert isinstance(texts, Texts)
        for delta in texts.deltas:
            earlier = told.get(delta.uid)
            assert earlier is None or earlier.finish is None, "nothing follows a last word"
            told[delta.uid] = joined(earlier, delta) if earlier else delta
    return told


@given(DOINGS)
@settings(max_examples=80, deadline=None)
def test_news_arrives_whole_and_in_order(doings: list[Texts | str]) -> None:
    fds = create_ring(1024)
    with closing(Sender[Outbound](fds)) as sender, closing(Receiver[Outbound](fds, Texts)) as receiver:
        outbox, put, got, ended = Outbox(sender), [], [], set()
        for doing in doings:
            match doing:
                case "flush":
                    outbox.flush()
                case "drain":
                    got += receiver.receive()
                case Texts():
                    put.append(lawful(doing, ended))
                    outbox.put(put[-1])
        while outbox.waiting:
            outbox.flush()
            got += receiver.receive()
        got += receiver.receive()
    close_ring(fds)
    assert stories(got) == stories(put)


def test_what_waits_is_joined(ring: RingFds) -> None:
    with closing(Sender[Outbound](ring)) as sender, closing(Receiver[Outbound](ring, Texts)) as receiver:
        outbox = Outbox(sender)
        for word in ("one ", "step ", "each"):
            outbox.put(Texts((Delta(7, word, 1),)))
        outbox.put(Texts((Delta(7, "", 0, finish=FINISH),)))
        outbox.flush()
        assert list(receiver.receive()) == [Texts((Delta(7, "one step each", 3, finish=FINISH),))]


def test_a_full_ring_delays_and_loses_nothing(ring: RingFds) -> None:
    with closing(Sender[Outbound](ring)) as sender, closing(Receiver[Outbound](ring, Texts | Refused)) as receiver:
        outbox, got = Outbox(sender), defaultdict(str)
        for uid in range(100):
            outbox.put(Texts((Delta(uid, str(uid) * 10, 1),)))
            outbox.flush()
        assert outbox.waiting
        outbox.put(Refused(1000, 429, "queue_full", "full"))
        refusals = []
        while outbox.waiting:
            outbox.flush()
            for message in receiver.receive():
                if isinstance(message, Refused):
                    refusals.append(message.uid)
                else:
                    for delta in message.deltas:
                        got[delta.uid] += delta.text
    assert got == {uid: str(uid) * 10 for uid in range(100)}
    assert refusals == [1000]


def test_what_a_gateway_has_not_read_joins_before_its_ring_is_full() -> None:
    """So what it reads next is never older than a little of what there is."""
    fds = create_ring(1 << 20)
    with closing(Sender[Outbound](fds)) as sender, closing(Receiver[Outbound](fds, Texts)) as receiver:
        outbox = Outbox(sender)
        for _ in range(20_000):
            outbox.put(Texts(tuple(Delta(uid, " word", 1) for uid in range(4))))
            outbox.flush()
        assert BEHIND_BYTES <= sender.used_bytes < BEHIND_BYTES + 200 and outbox.waiting
        behind = stories(list(receiver.receive()))
        outbox.flush()
        [rest] = receiver.receive()
        assert isinstance(rest, Texts) and len(rest.deltas) == 4
        assert all(delta.tokens + behind[delta.uid].tokens == 20_000 for delta in rest.deltas)
    close_ring(fds)
