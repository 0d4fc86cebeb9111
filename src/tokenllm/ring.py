"""A single-producer single-consumer ring of variable-length frames between two processes, and its two ends.

It owns a nameless piece of shared memory (memfd) and a bell (eventfd), which children inherit. It relies on aligned
8-byte stores being whole, and on one thread at each end. An end may die at any instruction: what it had not published
does not exist, and a successor attaches to the same ring and goes on.

    0 head: bytes ever published, stored by the producer alone
    64 tail: bytes ever given back, stored by the consumer alone
    128 data: a power of two; the place of a counter is its remainder

    frame: u32 length | u32 crc32 | payload | zero to seven bytes up to a multiple of 8

A frame never straddles the end of the data: a header whose length is WRAP fills up the rest, and the frame begins
again at place 0. So a frame of up to half the capacity always fits into an empty ring.
"""

import mmap
import os
import select
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from struct import Struct
from types import UnionType
from typing import Generic, TypeVar
from zlib import crc32

import msgspec

from tokenllm.host_memory import available_bytes

M = TypeVar("M", bound=msgspec.Struct)

HEAD, TAIL, DATA = 0, 64, 128  # byte offsets
SMALLEST_CAPACITY = 64
HEADER = Struct("<II")  # length, crc32
SEAL = Struct("<IQ")  # length, counter
WRAP = 0xFFFF_FFFF
LOOKS, LOOK_AGAIN_S = 100, 0.0001


class RingFull(Exception):
    """There is no room now; nothing has changed."""


class FrameTooLarge(ValueError):
    """More than half the capacity: there may never be room."""


class RingCorrupt(Exception):
    """What was published is not what lies in the ring."""


class RingMemoryError(MemoryError):
    """There is not enough memory for a ring."""


class RingFds(msgspec.Struct, frozen=True):
    """A ring as two file descriptors, which a child keeps under the same numbers (`pass_fds` of subprocess)."""

    memory: int
    bell: int


def create_ring(capacity_bytes: int) -> RingFds:
    """A new empty ring, of at least this capacity rounded up to a power of two."""
    capacity = 1 << (max(capacity_bytes, SMALLEST_CAPACITY) - 1).bit_length()
    available = available_bytes()
    if capacity > available:
        raise RingMemoryError(f"a ring needs {capacity} bytes of memory, but only {available} are available")
    memory = os.memfd_create("tokenllm-ring")
    try:
        os.posix_fallocate(memory, 0, DATA + capacity)  # a page that is missing later would be a SIGBUS
    except OSError as error:
        os.close(memory)
        raise RingMemoryError(f"a ring needs {capacity} bytes of memory: {error.strerror}") from error
    return RingFds(memory=memory, bell=os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))


def close_ring(fds: RingFds) -> None:
    """Let go of the descriptors; the memory is gone when the last process has let go and closed its ends."""
    os.close(fds.memory)
    os.close(fds.bell)


class _End:
    def __init__(self, fds: RingFds) -> None:
        size = os.fstat(fds.memory).st_size
        try:
            self._map = mmap.mmap(fds.memory, size)
        except OSError as error:
            raise RingMemoryError(f"mapping a ring needs {size} bytes of address space: {error.strerror}") from error
        view = memoryview(self._map)
        # an item of this view is one aligned 8-byte store or load; Struct.pack_into stores byte by byte, which tears
        self._counters = view[:DATA].cast("Q")
        self._data = view[DATA:]
        self._bell = fds.bell
        self.capacity = size - DATA
        view.release()

    @property
    def used_bytes(self) -> int:
        """Bytes of frames and padding that wait, or are being read."""
        return self._counters[HEAD // 8] - self._counters[TAIL // 8]

    def close(self) -> None:
        """Unmap the memory; the descriptors stay open (`close_ring`)."""
        self._counters.release()
        self._data.release()
        self._map.close()


class Sender(_End, Generic[M]):
    """The producing end. A successor may attach once its predecessor is dead."""

    def __init__(self, fds: RingFds) -> None:
        super().__init__(fds)
        self._encode = msgspec.msgpack.Encoder().encode
        os.eventfd_write(self._bell, 1)  # a predecessor may have died between publishing and ringing

    def send(self, message: M) -> None:
        """Put a message in. Raises RingFull, having changed nothing, and FrameTooLarge."""
        self.put(self._encode(message))

    def put(self, payload: bytes | bytearray) -> None:
        """Put raw bytes in, publish them and ring the bell."""
        counters, data = self._counters, self._data
        length = len(payload)
        size = _padded(length)
        if size > self.capacity // 2:
            raise FrameTooLarge(f"a frame of {length} bytes in a ring that carries {self.capacity // 2 - HEADER.size}")
        head = counters[HEAD // 8]
        place = head & self.capacity - 1
        skipped = self.capacity - place if place + size > self.capacity else 0
        free = self.capacity - (head - counters[TAIL // 8])
        if skipped + size > free:
            raise RingFull(f"a frame needs {skipped + size} bytes and {free} of {self.capacity} are free")
        if skipped:
            HEADER.pack_into(data, place, WRAP, _seal(head, WRAP))
            head, place = head + skipped, 0
        HEADER.pack_into(data, place, length, crc32(payload, _seal(head, length)))
        data[place + HEADER.size : place + HEADER.size + length] = payload
        counters[HEAD // 8] = head + size  # published: the consumer may see it from here on
        os.eventfd_write(self._bell, 1)


class Receiver(_End, Generic[M]):
    """The consuming end. A successor may attach once its predecessor is dead, and reads its last frame again.

    In asyncio: `loop.add_reader(receiver.fileno(), ...)`, and the callback clears the bell before it drains.
    """

    def __init__(self, fds: RingFds, kind: type[M] | UnionType) -> None:
        super().__init__(fds)
        self._decode = msgspec.msgpack.Decoder(kind).decode
        self._lent = memoryview(b"")
        if self.waiting:  # a predecessor may have died between clearing the bell and draining
            os.eventfd_write(self._bell, 1)

    @property
    def waiting(self) -> bool:
        """Whether a frame waits; costs no system call."""
        return self._counters[HEAD // 8] != self._counters[TAIL // 8]

    def receive(self) -> Iterator[M]:
        """Every message that waits now; each leaves the ring when the next is asked for or the iteration is closed."""
        with closing(self.drain()) as frames:
            for frame in frames:
                yield self._decode(frame)

    def drain(self) -> Generator[memoryview, None, None]:
        """Every frame that waits now, in place: its view dies when the frame leaves the ring.

        A read that is neither continued nor closed, since its process died or another read began, is read again.
        """
        counters = self._counters
        tail, head = counters[TAIL // 8], counters[HEAD // 8]
        if not 0 <= head - tail <= self.capacity:
            raise RingCorrupt(f"head {head} and tail {tail} cannot belong to a ring of {self.capacity} bytes")
        while tail < head and tail == counters[TAIL // 8]:  # ... else another read went on from here
            self._lent.release()
            self._lent, following = self._look(tail, head) or self._look_again(tail, head)
            try:
                yield self._lent
            finally:
                self._give_back(tail, following)
            tail = following

    def _give_back(self, tail: int, following: int) -> None:
        if self._counters[TAIL // 8] == tail:  # another read may have done it
            self._lent.release()
            self._counters[TAIL // 8] = following

    def _look(self, tail: int, head: int) -> tuple[memoryview, int] | None:
        """The frame at `tail` and the counter behind it, if its checksum agrees."""
        place = tail & self.capacity - 1
        length, crc = HEADER.unpack_from(self._data, place)
        if length == WRAP:
            wrapped = tail + self.capacity - place
            return self._look(wrapped, head) if crc == _seal(tail, WRAP) and wrapped < head else None
        if _padded(length) > min(self.capacity - place, head - tail):
            return None
        payload = self._data[place + HEADER.size : place + HEADER.size + length]
        return (payload, tail + _padded(length)) if crc32(payload, _seal(tail, length)) == crc else None

    def _look_again(self, tail: int, head: int) -> tuple[memoryview, int]:
        """On x86 the first look finds every published frame, and this is for corruption only.

        aarch64 may show the new head before the bytes that were stored earlier, and Python has no fence: there the
        checksum tells that they have not arrived, and another look finds them. The seal makes it sure, since what
        lies there meanwhile is intact too: last lap's frame, or the zeros of a new ring.
        """
        for _ in range(LOOKS):
            time.sleep(LOOK_AGAIN_S)
            if found := self._look(tail, head):
                return found
        raise RingCorrupt(f"the frame at {tail} does not match its checksum ({head - tail} bytes were waiting)")

    def fileno(self) -> int:
        """The bell: readable after something was published."""
        return self._bell

    def clear_bell(self) -> None:
        """Always before draining: a frame published in between rings again, and is not slept through."""
        try:
            os.eventfd_read(self._bell)
        except BlockingIOError:  # it had not been rung
            return

    def sleep(self, timeout_s: float | None, also: Sequence[int] = ()) -> set[int]:
        """`wait_for_any` for this one."""
        return wait_for_any((self,), timeout_s, also)

    def close(self) -> None:
        self._lent.release()
        super().close()


def wait_for_any(receivers: Sequence[Receiver], timeout_s: float | None, also: Sequence[int] = ()) -> set[int]:
    """Sleep until frames wait in one of the rings or a descriptor in `also` can be read, and say which: their numbers.

    The bells have been cleared, so drain now. Nothing fired means that the time is over; None waits for ever.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    bells = {receiver.fileno(): receiver for receiver in receivers}
    poller = select.poll()
    for fd in (*bells, *also):
        poller.register(fd, select.POLLIN)
    while True:
        looking = any(receiver.waiting for receiver in receivers)
        left_ms = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        ready = {fd for fd, _ in poller.poll(0 if looking else left_ms)}
        for bell in ready & bells.keys():
            bells[bell].clear_bell()
        # a bell may be a stale one: rung for frames that a busy consumer has drained without touching it
        fired = ready - bells.keys() | {bell for bell, receiver in bells.items() if receiver.waiting}
        if fired or left_ms == 0:
            return fired


def _padded(length: int) -> int:
    return HEADER.size + length + 7 & ~7


def _seal(counter: int, length: int) -> int:
    """What a frame's checksum starts from: no frame of an earlier lap, and no zeros, look like this one."""
    return crc32(SEAL.pack(length, counter))
