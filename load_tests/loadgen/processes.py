"""Server processes as a benchmark needs them: started, waited for, weighed, stopped; and how quiet the machine is."""

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import msgspec
import psutil

START_LIMIT_S = 120.0
STOP_LIMIT_S = 20.0
POLL_S = 0.02
LOG_END_CHARACTERS = 2000


class ProcessError(Exception):
    """A process that did not start or died; the message has the end of its log."""


class Memory(msgspec.Struct, frozen=True):
    """One process. `pss` divides shared pages among those who share them."""

    name: str
    rss_bytes: int
    pss_bytes: int


class Child:
    """A process with its descendants, whose output goes to a log file. A context manager: it is gone at the end.

    A piped child is written to and answers by lines; only its errors go to the log.
    """

    def __init__(self, command: Sequence[str], log: Path, piped: bool = False) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self.began = time.monotonic()
        pipe = subprocess.PIPE if piped else None
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command, stdin=pipe or subprocess.DEVNULL, stdout=pipe or out, stderr=out, start_new_session=True
            )

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *raised: object) -> None:
        self.process.terminate()
        if self.process.stdin:
            self.process.stdin.close()
        try:
            self.process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def wait_until_ready(self, url: str, limit_s: float = START_LIMIT_S) -> float:
        """Seconds from the start of the process until the URL answers 200."""
        while not answers(url):
            if self.process.poll() is not None:
                raise self._fault(f"ended with exit code {self.process.returncode}")
            if time.monotonic() - self.began > limit_s:
                raise self._fault(f"does not answer {url} after {limit_s:g} s")
            time.sleep(POLL_S)
        return time.monotonic() - self.began

    def write_line(self, line: str) -> None:
        assert self.process.stdin, "this child was not piped"
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def read_line(self) -> str:
        assert self.process.stdout, "this child was not piped"
        if line := self.process.stdout.readline():
            return line.decode()
        raise self._fault("has closed its output")

    def _fault(self, what: str) -> ProcessError:
        end = self.log.read_text(errors="replace")[-LOG_END_CHARACTERS:]
        return ProcessError(f"{self.process.args} {what}; its log {self.log} ends:\n{end}")

    def memory(self) -> list[Memory]:
        found = psutil.Process(self.process.pid)
        return [_weigh(process) for process in [found, *found.children(recursive=True)]]


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _weigh(process: psutil.Process) -> Memory:
    full = process.memory_full_info()
    return Memory(process_name(process.cmdline()), full.rss, full.pss)


def process_name(words: list[str]) -> str:
    """What runs: the module after -m, else the script of an interpreter, else the program."""
    if "-m" in words[:-1]:
        return words[words.index("-m") + 1]
    scripts = [word for word in words[1:2] if Path(words[0]).name.startswith("python") and not word.startswith("-")]
    return Path(scripts[0] if scripts else words[0]).name if words else "?"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class OthersClock:
    """The cores that others than this process and its descendants use from now on; the hypervisor is one of them."""

    def __init__(self) -> None:
        self.began, self.busy, self.own = time.monotonic(), busy_s(), own_s()

    def cores(self) -> float:
        others = (busy_s() - self.busy) - (own_s() - self.own)
        return max(0.0, others / (time.monotonic() - self.began))


def busy_s() -> float:
    times = psutil.cpu_times()
    return times.user + times.system + times.nice + times.irq + times.softirq + times.steal


def own_s() -> float:
    own = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in [own, *own.children(recursive=True)])


def wait_until_quiet(limit_cores: float, patience_s: float) -> None:
    """Return when the others have used less than the limit for two seconds, or when patience is over."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        others = OthersClock()
        time.sleep(2)
        if others.cores() < limit_cores:
            return
