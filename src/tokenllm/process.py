"""What every child process does first: read what it was born with, and bind its life to its parent's."""

import ctypes
import os
import signal
import sys
from typing import TypeVar

import msgspec

Birth = TypeVar("Birth", bound=msgspec.Struct)

PR_SET_PDEATHSIG = 1


def read_birth(kind: type[Birth]) -> Birth:
    """The settings a child was given on its standard input, as JSON: unlike an argument, nobody sees them in `ps`."""
    return msgspec.json.decode(sys.stdin.buffer.read(), type=kind)


def die_with(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent is gone, however the parent went."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before the line above
        os._exit(1)
