"""What a ring promises to one process: an example to read first, then the promises one by one."""

import asyncio
import os
import resource
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenllm import ring as ring_module
from tokenllm.messages import Abort, Inbound, Sampling, Submit
from tokenllm.ring import (
    FrameTooLarge,
    Receiver,
    RingCorrupt,
    RingFds,
    RingFull,
    RingMemoryError,
    Sender,
    close_ring,
    create_ring,
)

HEAD_AT, DATA_AT = 0, 128


@pytest.fixture
def ring() -> Iterator[RingFds]:
    fds = create_ring(4096)
    yield fds
    close_ring(fds)


def store(fds: RingFds, at: int, value: int) -> None:
    os.pwrite(fds.memory, value.to_bytes(8, "little"), at)


def test_messages_cross_the_ring(ring: RingFds):
    gateway, scheduler = Sender[Inbound](ring), Receiver[Inbound](ring, Inbound)
    submit = Submit(uid=1, prompt=b"\1\0\0\0", max_tokens=5, sampling=Sampling(seed=3, temperature=0.0))

    gateway.send(submit)
    gateway.send(Abort(uid=1))

    assert scheduler.sleep(timeout_s=None) == {scheduler.fileno()}
    assert list(scheduler.receive()) == [submit, Abort(uid=1)]
    assert not scheduler.waiting
    assert scheduler.sleep(timeout_s=0) == set()


def test_a_loop_left_early_has_taken_the_message_in_hand(ring: RingFds):
    sender, receiver = Sender[Abort](ring), Receiver[Abort](ring, Abort)
    for uid in range(3):
        sender.send(Abort(uid))
    for message in receiver.receive():
        assert message == Abort(0)
        break
    assert list(receiver.receive()) == [Abort(1), Abort(2)]


def test_a_message_of_another_kind_is_refused_and_does_not_come_twice(ring: RingFds):
    sender, receiver = Sender[Abort | Submit](ring), Receiver[Submit](ring, Submit)
    sender.send(Abort(1))
    with pytest.raises(msgspec.ValidationError):
        list(receiver.receive())
    assert list(receiver.receive()) == []


def test_a_reading_takes_what_waits_when_it_begins(ring: RingFds):
    sender, receiver = Sender(ring), Receiver(ring, Abort)
    sender.put(b"0")
    for frame in receiver.drain():
        assert frame == b"0"
        sender.put(b"a fast producer does not hold the reader for ever")
    assert len(list(receiver.drain())) == 1


def test_a_frame_larger_than_half_the_ring_is_told_how_much_fits(ring: RingFds):
    sender = Sender(ring)
    sender.put(bytes(2040))
    with pytest.raises(FrameTooLarge, match="2041 bytes in a ring that carries 2040"):
        sender.put(bytes(2041))


def test_a_full_ring_says_how_full(ring: RingFds):
    sender = Sender(ring)
    sender.put(bytes(2040))
    sender.put(bytes(2032))
    with pytest.raises(RingFull, match="needs 24 bytes and 8 of 4096 are free"):
        sender.put(b"12345678")
    sender.put(b"")
    assert sender.used_bytes == sender.capacity == 4096


class Held:
    """Counters that hold back what is stored to them."""

    def __init__(self, counters: memoryview) -> None:
        self.counters, self.stored = counters, {}

    def __getitem__(self, index: int) -> int:
        return self.counters[index]

    def __setitem__(self, index: int, value: int) -> None:
        self.stored[index] = value


def test_a_counter_is_one_aligned_8_byte_store(ring: RingFds):
    """Else another process sees half of it; racing for that is left to a slow test, which needs two idle cores."""
    sender, receiver = Sender(ring), Receiver(ring, Abort)
    sender.put(b"hello")
    held = Held(receiver._counters)
    receiver._counters = sender._counters = held  # type: ignore[assignment]
    before = os.pread(ring.memory, DATA_AT, 0)
    sender.put(b"world!")
    assert len(list(receiver.drain())) == 1
    assert os.pread(ring.memory, DATA_AT, 0) == before, "nothing else stores there"
    assert held.stored == {0: 32, 8: 16}
    assert (held.counters.format, held.counters.itemsize) == ("Q", 8)


def test_the_bell_rings_after_the_frame_is_there(ring: RingFds, monkeypatch: pytest.MonkeyPatch):
    sender, receiver, seen = Sender(ring), Receiver(ring, Abort), []
    monkeypatch.setattr(os, "eventfd_write", lambda *_: seen.append([bytes(frame) for frame in receiver.drain()]))
    sender.put(b"hello")
    assert seen == [[b"hello"]]


@pytest.mark.parametrize("when", ["before the bell is cleared", "after"])
def test_a_frame_that_comes_while_the_sleeper_turns_over_is_not_slept_through(
    ring: RingFds, monkeypatch: pytest.MonkeyPatch, when: str
):
    sender, receiver, clear = Sender(ring), Receiver(ring, Abort), os.eventfd_read

    def clear_and_publish(bell: int) -> int:
        monkeypatch.undo()
        if when == "after":
            rung = clear(bell)
            sender.put(b"hello")
            return rung
        sender.put(b"hello")
        return clear(bell)

    monkeypatch.setattr(os, "eventfd_read", clear_and_publish)  # the Sender has rung, for nothing
    assert receiver.sleep(5) == {ring.bell}
    assert [bytes(frame) for frame in receiver.drain()] == [b"hello"]


def test_the_bell_of_frames_already_read_wakes_nobody(ring: RingFds):
    sender, receiver = Sender(ring), Receiver(ring, Abort)
    sender.put(b"read while busy")
    assert len(list(receiver.drain())) == 1
    began = time.monotonic()
    assert receiver.sleep(0.05) == set()
    assert time.monotonic() - began >= 0.05


def test_other_descriptors_wake_too(ring: RingFds):
    receiver, (readable, writable) = Receiver(ring, Abort), os.pipe()
    os.write(writable, b"x")
    assert receiver.sleep(5, also=[readable]) == {readable}
    Sender(ring).put(b"both")
    assert receiver.sleep(5, also=[readable]) == {readable, ring.bell}
    os.close(readable)
    os.close(writable)


def test_a_successor_is_woken_for_what_its_predecessor_left(ring: RingFds):
    Sender(ring).put(b"left")
    Receiver(ring, Abort).clear_bell()  # and died
    successor = Receiver(ring, Abort)
    assert select.select([ring.bell], [], [], 0)[0]
    successor.clear_bell()
    Sender(ring)  # its predecessor may have died before ringing
    assert select.select([ring.bell], [], [], 0)[0]


def test_nobody_sleeps_while_a_frame_waits_whose_bell_is_cleared(ring: RingFds):
    Sender(ring).put(b"left")
    receiver = Receiver(ring, Abort)
    receiver.clear_bell()
    began = time.monotonic()
    assert receiver.sleep(10) == {ring.bell}
    assert time.monotonic() - began < 5


def test_asyncio_waits_for_the_bell(ring: RingFds):
    sender, receiver = Sender[Abort](ring), Receiver[Abort](ring, Abort)

    async def read(number: int) -> list[Abort]:
        loop, messages, enough = asyncio.get_running_loop(), [], asyncio.Event()

        def on_bell() -> None:
            receiver.clear_bell()
            messages.extend(receiver.receive())
            if len(messages) == number:
                enough.set()

        loop.add_reader(receiver.fileno(), on_bell)
        for uid in range(number):
            loop.call_later(0.001 * uid, sender.send, Abort(uid))
        await asyncio.wait_for(enough.wait(), 5)
        loop.remove_reader(receiver.fileno())
        return messages

    assert asyncio.run(read(10)) == [Abort(uid) for uid in range(10)]


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_a_flipped_bit_is_reported_and_not_delivered(data: st.DataObject):
    fds = create_ring(128)
    sender, receiver = Sender(fds), Receiver(fds, Abort)
    before_the_end = data.draw(st.booleans(), label="the frame begins with a marker at the end of the data")
    if before_the_end:
        sender.put(bytes(56))
        sender.put(bytes(24))
        assert len(list(receiver.drain())) == 2
    sender.put(b"a frame of 32 bytes: some words.")
    bit = data.draw(st.integers(0, 40 * 8 - 1))
    at = DATA_AT + bit // 8 + (96 if before_the_end and bit < 64 else 0)  # the marker, or the frame behind it
    byte = os.pread(fds.memory, 1, at)[0]
    os.pwrite(fds.memory, bytes([byte ^ 1 << bit % 8]), at)
    with pytest.raises(RingCorrupt, match="does not match its checksum"):
        next(receiver.drain())
    os.pwrite(fds.memory, bytes([byte]), at)
    assert [bytes(frame) for frame in receiver.drain()] == [b"a frame of 32 bytes: some words."]
    close_ring(fds)


def test_zeros_of_a_new_ring_are_no_frame(ring: RingFds):
    store(ring, HEAD_AT, 8)
    with pytest.raises(RingCorrupt):
        next(Receiver(ring, Abort).drain())


def test_last_laps_frame_is_no_frame(ring: RingFds):
    sender, receiver = Sender(ring), Receiver(ring, Abort)
    for _ in range(2):
        sender.put(bytes(2040))
    assert len(list(receiver.drain())) == 2
    store(ring, HEAD_AT, 4096 + 2048)  # as if the bytes of the next frame, a twin, were still under way
    with pytest.raises(RingCorrupt):
        next(receiver.drain())


def test_a_head_that_no_sender_could_store_is_corrupt(ring: RingFds):
    store(ring, HEAD_AT, 4104)
    with pytest.raises(RingCorrupt, match="head 4104 and tail 0"):
        next(Receiver(ring, Abort).drain())


def test_bytes_that_arrive_after_their_head_are_waited_for(ring: RingFds, monkeypatch: pytest.MonkeyPatch):
    Sender(ring).put(b"late")
    arrived = os.pread(ring.memory, 16, DATA_AT)
    os.pwrite(ring.memory, bytes(16), DATA_AT)
    looks = iter([None, None, lambda: os.pwrite(ring.memory, arrived, DATA_AT)])
    monkeypatch.setattr(ring_module.time, "sleep", lambda _: (arrive := next(looks)) and arrive())
    assert [bytes(frame) for frame in Receiver(ring, Abort).drain()] == [b"late"]


def test_the_memory_of_a_ring_is_taken_when_it_is_made():
    fds = create_ring(1 << 20)
    assert os.fstat(fds.memory).st_blocks * 512 >= 1 << 20
    close_ring(fds)


def test_more_memory_than_there_is_is_refused():
    with pytest.raises(RingMemoryError, match=f"a ring needs {1 << 50} bytes of memory, but only [0-9]+ are available"):
        create_ring(1 << 50)


LIMITED = """
import os, resource, sys
from tokenllm.ring import RingFds, RingMemoryError, Sender, create_ring
pages = int(open("/proc/self/statm").read().split()[0])
limit_bytes = pages * resource.getpagesize() + (1 << 25)
resource.setrlimit(int(sys.argv[1]), (limit_bytes, limit_bytes))
before = os.listdir("/proc/self/fd")
try:
    ring = Sender(RingFds(int(sys.argv[2]), int(sys.argv[3]))) if len(sys.argv) > 2 else create_ring(1 << 27)
except RingMemoryError as error:
    assert os.listdir("/proc/self/fd") == before
    print(error)
"""


def limited(limit: int, *fds: int) -> str:
    command = [sys.executable, "-c", LIMITED, *map(str, (limit, *fds))]
    return subprocess.run(command, pass_fds=fds, check=True, capture_output=True, text=True, timeout=30).stdout.strip()


def test_memory_the_kernel_refuses_is_named():
    assert limited(resource.RLIMIT_FSIZE) == "a ring needs 134217728 bytes of memory: File too large"


def test_address_space_the_kernel_refuses_is_named():
    fds = create_ring(1 << 27)
    answer = limited(resource.RLIMIT_AS, fds.memory, fds.bell)
    assert answer == f"mapping a ring needs {(1 << 27) + DATA_AT} bytes of address space: Cannot allocate memory"
    close_ring(fds)


def test_a_closed_ring_leaves_no_descriptor_and_no_mapping():
    before = sorted(Path("/proc/self/fd").iterdir())
    fds = create_ring(4096)
    sender, receiver = Sender(fds), Receiver(fds, Abort)
    sender.put(b"unread")
    reading = receiver.drain()
    next(reading)
    reading.close()
    sender.close()
    receiver.close()
    close_ring(fds)
    assert sorted(Path("/proc/self/fd").iterdir()) == before
