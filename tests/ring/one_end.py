"""One end of a ring in a process of its own: python one_end.py ROLE MEMORY_FD BELL_FD SEED FRAMES [LENGTH]

Both ends make the same frames from the same seed: of random lengths, or all of one length, so that each lap lies
exactly on the last one.
"""

import os
import random
import sys
import time
from collections.abc import Iterator
from itertools import count

from tokenllm.messages import Abort
from tokenllm.ring import Receiver, RingFds, RingFull, Sender

LOST_S = 10.0


def frames(seed: int, capacity: int, length: int | None) -> Iterator[bytes]:
    """Frame n begins with n; what follows it differs from frame to frame."""
    rng = random.Random(seed)
    noise = rng.randbytes(capacity)
    for n in count():
        size = length or rng.randint(8, capacity // 2 - 8)
        start = n % (capacity // 4)
        yield n.to_bytes(8, "little") + noise[start : start + size - 8]


def produce(fds: RingFds, seed: int, number: int, length: int | None) -> None:
    sender = Sender(fds)
    for frame, _ in zip(frames(seed, sender.capacity, length), range(number), strict=False):
        put(sender, frame)


def put(sender: Sender, frame: bytes) -> None:
    while True:
        try:
            return sender.put(frame)
        except RingFull:
            time.sleep(0)


def check(fds: RingFds, seed: int, number: int, length: int | None, sleeps: bool) -> None:
    """Read so many frames and compare every byte."""
    receiver, read = Receiver(fds, Abort), 0
    expected = frames(seed, receiver.capacity, length)
    while read < number:
        wait(receiver, sleeps, read)
        for frame in receiver.drain():
            assert frame == next(expected), f"frame {read} is another one"
            read += 1


def wait(receiver: Receiver, sleeps: bool, read: int) -> None:
    deadline = time.monotonic() + LOST_S
    while not sleeps and not receiver.waiting:
        assert time.monotonic() < deadline, f"frame {read} did not come"
    if sleeps:
        assert receiver.sleep(LOST_S) and receiver.waiting, f"slept through frame {read}"


def tell(fds: RingFds) -> None:
    """Print the number of each frame before giving it back."""
    receiver = Receiver(fds, Abort)
    while True:
        for frame in receiver.drain():
            os.write(1, b"%d\n" % int.from_bytes(frame[:8], "little"))
        receiver.sleep(LOST_S)


def churn(fds: RingFds) -> None:
    """Both ends at once, for ever: the counters move all the time."""
    sender, receiver = Sender(fds), Receiver(fds, Abort)
    while True:
        sender.put(b"")
        next(receiver.drain())


def main(role: str, memory: str, bell: str, seed: str, number: str, length: str | None = None) -> None:
    fds, work = RingFds(int(memory), int(bell)), (int(seed), int(number), int(length) if length else None)
    match role:
        case "produce":
            produce(fds, *work)
        case "poll" | "sleep":
            check(fds, *work, sleeps=role == "sleep")
        case "tell":
            tell(fds)
        case "churn":
            churn(fds)


if __name__ == "__main__":
    main(*sys.argv[1:])
