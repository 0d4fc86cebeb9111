"""The ring against a deque: whatever is put in, read, left half read or attached to anew, both say the same."""

import os
from collections import deque
from collections.abc import Generator
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tokenllm.messages import Abort
from tokenllm.ring import FrameTooLarge, Receiver, RingFds, RingFull, Sender, close_ring, create_ring

HEADER_BYTES, DATA_AT = 8, 128


def start_counters_at(fds: RingFds, counter: int) -> None:
    os.pwrite(fds.memory, counter.to_bytes(8, "little"), 0)
    os.pwrite(fds.memory, counter.to_bytes(8, "little"), 64)


class RingMachine(RuleBasedStateMachine):
    @initialize(capacity=st.sampled_from([64, 128, 512]), start=st.integers(0, 2**37))
    def create(self, capacity: int, start: int) -> None:
        self.fds = create_ring(capacity)
        start_counters_at(self.fds, start * 8)
        self.head = start * 8
        self.sender, self.receiver = Sender(self.fds), Receiver(self.fds, Abort)
        self.frames: deque[tuple[bytes, int]] = deque()  # what waits, and the bytes it takes with its padding
        self.reading: Generator[memoryview, None, None] | None = None
        self.view = memoryview(b"")
        self.to_read = 0
        self.dead: list[
            Generator[memoryview, None, None]
        ] = []  # reads of processes that died in the middle: never closed

    @rule(share=st.floats(0, 0.6), byte=st.integers(0, 255))
    def put(self, share: float, byte: int) -> None:
        payload = bytes((byte + i) % 256 for i in range(int(share * self.sender.capacity)))
        size = (HEADER_BYTES + len(payload) + 7) // 8 * 8
        to_the_end = -self.head % self.sender.capacity or self.sender.capacity
        needed = size + (to_the_end if size > to_the_end else 0)
        before = self.memory()
        try:
            self.sender.put(payload)
        except FrameTooLarge:
            assert size > self.sender.capacity // 2
            assert self.memory() == before
        except RingFull:
            assert needed > self.sender.capacity - self.used
            assert self.frames, "an empty ring is never full"
            assert self.memory() == before
        else:
            assert size <= self.sender.capacity // 2
            assert needed <= self.sender.capacity - self.used
            self.frames.append((payload, needed))
            self.head += needed

    @precondition(lambda self: self.reading is None)
    @rule()
    def begin_reading(self) -> None:
        self.reading, self.to_read = self.receiver.drain(), len(self.frames)
        self.view = next(self.reading, memoryview(b""))
        if not self.frames:
            self.reading = None

    @precondition(lambda self: self.reading is not None)
    @rule()
    def read_on(self) -> None:
        """The frame in hand leaves the ring; what was put in since the reading began is left for the next one."""
        assert self.reading
        self.frames.popleft()
        self.to_read -= 1
        kept, self.view = self.view, next(self.reading, memoryview(b""))
        self.assert_unreadable(kept)
        if not self.to_read:
            assert self.view == b""
            self.reading = None

    @precondition(lambda self: self.reading is not None)
    @rule()
    def close_reading(self) -> None:
        assert self.reading
        self.reading.close()
        self.frames.popleft()
        self.reading = None
        self.assert_unreadable(self.view)

    @rule()
    def get_all(self) -> None:
        """Also in the middle of another read, which is overtaken: the frame in its hand is read again."""
        assert [bytes(view) for view in self.receiver.drain()] == [payload for payload, _ in self.frames]
        self.frames.clear()
        if self.reading:
            self.assert_unreadable(self.view)
            assert next(self.reading, None) is None
            self.reading = None

    @rule()
    def sender_dies(self) -> None:
        self.sender = Sender(self.fds)

    @rule()
    def receiver_dies(self) -> None:
        if self.reading:
            self.dead.append(self.reading)
            self.reading = None
        self.receiver = Receiver(self.fds, Abort)
        assert self.receiver.sleep(0) == ({self.fds.bell} if self.frames else set())

    @invariant()
    def the_ring_is_the_deque(self) -> None:
        assert self.sender.used_bytes == self.receiver.used_bytes == self.used
        assert 0 <= self.used <= self.sender.capacity
        assert self.receiver.waiting == bool(self.frames)

    @invariant()
    def the_frame_in_hand_is_whole(self) -> None:
        if self.reading:
            assert self.view == self.frames[0][0]

    @property
    def used(self) -> int:
        return sum(needed for _, needed in self.frames)

    def memory(self) -> bytes:
        return os.pread(self.fds.memory, DATA_AT + self.sender.capacity, 0)

    @staticmethod
    def assert_unreadable(view: memoryview) -> None:
        with pytest.raises(ValueError, match="released"):
            view[0:0]

    def teardown(self) -> None:
        with suppress(AttributeError):  # hypothesis may stop before `create`
            close_ring(self.fds)


def run_model(examples: int, steps: int) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    run_state_machine_as_test(
        RingMachine,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=checks, database=None
        ),
    )


def test_ring_equals_a_deque():
    run_model(examples=60, steps=40)


@pytest.mark.slow
def test_ring_equals_a_deque_for_long():
    run_model(examples=600, steps=80)
