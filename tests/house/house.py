"""A whole server as its own processes, with the fake scheduler or the real one, watched from outside."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import msgspec
import psutil

from tokenllm.config import ServeConfig

FAKE = (sys.executable, str(Path(__file__).with_name("serve_fake.py")))
REAL = (sys.executable, "-m", "tokenllm", "serve")
PATIENCE_S = 60.0
MARKS = {
    "gateway": ("tokenllm.gateway",),
    "scheduler": ("tokenllm.scheduler", "fake_scheduler.py"),
    "detokenizer": ("tokenllm.detokenizer",),
}


def eventually(what: str, holds: Callable[[], object], within_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        time.sleep(0.02)


class House:
    """One server. What it prints goes into a file."""

    def __init__(self, command: list[str], log: Path, environment: Mapping[str, str] = {}) -> None:
        self._log = log
        with log.open("wb") as out:
            environment = {**os.environ, **environment}
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        self.ps = psutil.Process(self.process.pid)
        self._seen: dict[int, psutil.Process] = {}

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def url(self) -> str:
        found = re.search(r"^tokenllm serves at (http://\S+)/v1$", self.log, re.MULTILINE)
        assert found, self.log
        return found[1]

    def wait_greeted(self) -> "House":
        eventually("the greeting", lambda: "\ntokenllm serves at " in self.log or self.process.poll() is not None)
        assert self.process.poll() is None, self.log
        self.wait_ready()
        return self

    def wait_ready(self) -> None:
        """Wait for every gateway: each connection meets any of them."""
        eventually("readiness", lambda: {self.status("/health/ready") for _ in range(12)} == {200})

    def get(self, path: str) -> tuple[int, str]:
        """Over a connection of its own, so that it meets any of the gateways."""
        with closing(HTTPConnection(self.url.removeprefix("http://"), timeout=5)) as connection:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()

    def status(self, path: str) -> int | None:
        try:
            return self.get(path)[0]
        except (OSError, HTTPException):
            return None

    def members(self, role: str) -> list[psutil.Process]:
        """The living processes of one role."""
        found = [child for child in self.family() if _plays(child, role)]
        return sorted(found, key=lambda child: child.pid)

    def family(self) -> list[psutil.Process]:
        """Every process that this server ever started, as far as it was seen, and that still runs."""
        if self.process.poll() is None:
            self._seen |= {child.pid: child for child in self.ps.children(recursive=True)}
        self._seen = {pid: child for pid, child in self._seen.items() if _lives(child)}
        return list(self._seen.values())

    def metrics(self) -> dict[str, float]:
        lines = self.get("/metrics")[1].splitlines()
        pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in pairs}

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, within_s: float = PATIENCE_S) -> int:
        return self.process.wait(within_s)

    def raze(self) -> None:
        self.family()
        self.process.kill()
        self.process.wait()
        eventually("nothing is left", lambda: not self.family(), within_s=5)


def fake_house(
    model: Path, log: Path, environment: Mapping[str, str] = {}, prefix: Sequence[str] = (), **settings: object
) -> House:
    config = ServeConfig(
        **{"model": str(model), "served_model_name": "tiny", "load_format": "dummy", "port": 0, **settings}
    )  # type: ignore[arg-type]
    return House([*prefix, *FAKE, msgspec.json.encode(config).decode()], log, environment)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _plays(process: psutil.Process, role: str) -> bool:
    try:
        return any(mark in part for part in process.cmdline() for mark in MARKS[role])
    except psutil.NoSuchProcess:
        return False
