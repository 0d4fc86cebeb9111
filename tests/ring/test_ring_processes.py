"""The ring between real processes: nothing is lost, mixed up or slept through, whoever is killed and whenever."""

import math
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from tokenllm.messages import Abort
from tokenllm.ring import Receiver, RingFds, RingFull, Sender, close_ring, create_ring, wait_for_any

ONE_END = Path(__file__).parent / "one_end.py"


@pytest.fixture
def ring(request: pytest.FixtureRequest) -> Iterator[RingFds]:
    fds = create_ring(getattr(request, "param", 4096))
    yield fds
    close_ring(fds)


def start(role: str, fds: RingFds, *args: int, stdout: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    command = [sys.executable, ONE_END, role, *map(str, (fds.memory, fds.bell, *args))]
    return subprocess.Popen(command, pass_fds=(fds.memory, fds.bell), stdout=stdout, stderr=subprocess.PIPE)


def torture(fds: RingFds, role: str, frames: int, *length: int) -> None:
    ends = [start(end, fds, 7, frames, *length) for end in (role, "produce")]
    try:
        for end in ends:
            _, complaint = end.communicate(timeout=120)
            assert end.returncode == 0, complaint.decode()
    finally:
        for end in ends:
            end.kill()
            end.wait()


@pytest.mark.parametrize(("ring", "frames"), [(512, 10_000), (4096, 5_000), (65536, 2_000)], indirect=["ring"])
@pytest.mark.parametrize("role", ["poll", "sleep"])
def test_every_byte_arrives_in_order(ring: RingFds, role: str, frames: int):
    torture(ring, role, frames)


@pytest.mark.parametrize("role", ["poll", "sleep"])
@pytest.mark.parametrize("ring", [512], indirect=True)
def test_last_laps_frames_are_not_taken_for_this_laps(ring: RingFds, role: str):
    torture(ring, role, 10_000, 56)


@pytest.mark.slow
@pytest.mark.parametrize("length", [(), (56,)])
@pytest.mark.parametrize("ring", [512, 4096, 65536], indirect=True)
@pytest.mark.parametrize("role", ["poll", "sleep"])
def test_every_byte_arrives_in_order_for_long(ring: RingFds, role: str, length: tuple[int, ...]):
    torture(ring, role, 30_000, *length)


def kill_producers(fds: RingFds, times: int) -> None:
    """One ring, a row of producers that die: what each of them published comes whole, in order and without a gap."""
    rng, receiver = random.Random(1), Receiver(fds, Abort)
    for _ in range(times):
        producer = start("produce", fds, 7, 10**9)
        read = list(numbers_until_death(producer, receiver, kill_after_s=rng.uniform(0, 0.005)))
        assert (producer.wait(10), producer.communicate()[1]) == (-signal.SIGKILL, b"")
        assert read == list(range(len(read)))


def numbers_until_death(producer: subprocess.Popen[bytes], receiver: Receiver, kill_after_s: float) -> Iterator[int]:
    gone, kill_at_s = os.pidfd_open(producer.pid), math.inf
    while gone not in (fired := receiver.sleep(10, also=[gone])) or receiver.waiting:
        assert fired, "nothing came"
        yield from (number_of(frame) for frame in receiver.drain())
        kill_at_s = min(kill_at_s, time.monotonic() + kill_after_s)
        if time.monotonic() >= kill_at_s:
            producer.kill()
    os.close(gone)


def number_of(frame: memoryview) -> int:
    return int.from_bytes(frame[:8], "little")


def test_killed_producers_leave_whole_frames(ring: RingFds):
    kill_producers(ring, times=4)


@pytest.mark.slow
def test_many_killed_producers_leave_whole_frames(ring: RingFds):
    kill_producers(ring, times=100)


def kill_consumers(fds: RingFds, told: Path, times: int) -> None:
    """One ring, a row of consumers that die: every frame is read, and only the one in hand is read again."""
    rng, sender, sent, expected = random.Random(1), Sender(fds), 0, 0
    for _ in range(times):
        with told.open("wb") as file:
            consumer = start("tell", fds, 0, 0, stdout=file)
        while not told.stat().st_size:
            sent += put_if_room(sender, sent)
        kill_at_s = time.monotonic() + rng.uniform(0, 0.005)
        while time.monotonic() < kill_at_s:
            sent += put_if_room(sender, sent)
        consumer.kill()
        assert consumer.communicate(timeout=10)[1] == b""
        read = [int(line) for line in told.read_text().splitlines()]
        assert read[0] in (expected, expected - 1)
        assert read == list(range(read[0], read[0] + len(read)))
        expected = read[-1] + 1
    left = [number_of(frame) for frame in Receiver(fds, Abort).drain()]
    assert left in (list(range(expected, sent)), list(range(expected - 1, sent)))


def put_if_room(sender: Sender, number: int) -> bool:
    try:
        sender.put(number.to_bytes(8, "little") * 9)
    except RingFull:
        return False
    return True


def test_killed_consumers_lose_nothing(ring: RingFds, tmp_path: Path):
    kill_consumers(ring, tmp_path / "told", times=4)


@pytest.mark.slow
def test_many_killed_consumers_lose_nothing(ring: RingFds, tmp_path: Path):
    kill_consumers(ring, tmp_path / "told", times=100)


@pytest.mark.slow
def test_counters_are_never_seen_half_stored(ring: RingFds):
    for at in (0, 64):
        os.pwrite(ring.memory, (2**32 - 4096).to_bytes(8, "little"), at)
    counters = memoryview(mmap.mmap(ring.memory, 128)).cast("Q")
    churning = start("churn", ring, 0, 0)
    while counters[0] < 2**32 + 2**23:
        for counter in (0, 64 // 8):
            seen = [counters[counter] for _ in range(20_000)]
            assert seen == sorted(seen), "a counter went back"
        assert churning.poll() is None
    churning.kill()
    assert churning.communicate()[1] == b""


def test_a_ring_has_no_name_that_a_death_could_leave_behind(ring: RingFds):
    producer = start("produce", ring, 7, 10**9)
    assert Receiver(ring, Abort).sleep(10), "nothing came"
    maps = Path(f"/proc/{producer.pid}/maps").read_text()
    files = [str(link.readlink()) for link in Path(f"/proc/{producer.pid}/fd").iterdir()]
    producer.kill()
    producer.communicate()
    assert "/memfd:tokenllm-ring" in maps
    assert "/dev/shm" not in maps + str(files)


def test_two_rings_are_waited_for_together(ring: RingFds):
    other = create_ring(4096)
    receivers = [Receiver(ring, Abort), Receiver(other, Abort)]
    assert wait_for_any(receivers, 0) == set()
    producer = start("produce", other, 7, 1)
    gone = os.pidfd_open(producer.pid)
    assert wait_for_any(receivers, 10, also=[gone]) == {other.bell}
    assert len(list(receivers[1].drain())) == 1
    assert wait_for_any(receivers, 10, also=[gone]) == {gone}
    assert producer.communicate()[1] == b""
    os.close(gone)
    close_ring(other)
