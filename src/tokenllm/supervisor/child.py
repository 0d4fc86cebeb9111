"""A child process: born with its settings on standard input, watched through a pidfd, reaped once."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterable, Sequence

import msgspec


class Child:
    """Spawned from the supervisor's main thread: a child's life is bound to the thread that spawned it."""

    def __init__(self, name: str, command: Sequence[str], birth: msgspec.Struct, fds: Iterable[int]) -> None:
        self.name = name
        # a process group of its own: Ctrl-C in a terminal is for the supervisor alone, which drains
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=tuple(fds), process_group=0)
        self.pid = self._process.pid
        self.pidfd = os.pidfd_open(self.pid)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:  # its pidfd tells that it died
            stdin.write(msgspec.json.encode(birth))

    def kill(self) -> None:
        self._process.kill()

    def reap(self) -> int:
        """Its exit code, negative for a signal. The child is dead or has been killed."""
        code = self._process.wait()
        os.close(self.pidfd)
        return code


def told(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def exit_code(code: int) -> int:
    """The code to end with on account of a child that ended so: never 0."""
    return 128 - code if code < 0 else code or 1
