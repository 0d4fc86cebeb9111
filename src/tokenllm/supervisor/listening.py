"""The port of one server: one socket per gateway, and nobody else on it.

The sockets share the port by SO_REUSEPORT, so that the kernel spreads connections evenly. That flag alone would
let a second server share it too: a first bind without the flag, and an instance lock, refuse that.
"""

import contextlib
import socket
from typing import Any, NamedTuple, TypeAlias

from tokenllm.supervisor import StartError

BACKLOG = 1024

Place: TypeAlias = tuple[Any, ...]  # what bind takes: host and port, and for IPv6 two more


class Port(NamedTuple):
    number: int
    sockets: tuple[socket.socket, ...]
    lock: socket.socket  # held while it is open

    def listen(self) -> None:
        """From now on connections wait for gateways, also for those that are still to come."""
        for one in self.sockets:
            one.listen(BACKLOG)

    def close(self) -> None:
        for one in (*self.sockets, self.lock):
            one.close()


def reserve(host: str, port: int, count: int) -> Port:
    """That many sockets bound to one port, which is ours alone; 0 takes a free one."""
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with contextlib.ExitStack() as undo:
            with _bound(family, place, shared=False) as probe:
                port = probe.getsockname()[1]
            place = (place[0], port, *place[2:])
            lock = undo.enter_context(_locked(f"{place[0]}:{port}"))
            sockets = tuple(undo.enter_context(_bound(family, place, shared=True)) for _ in range(count))
            undo.pop_all()
    except OSError as error:
        raise StartError(f"cannot listen on {host} port {port}: {error.strerror}") from error
    return Port(port, sockets, lock)


def _bound(family: int, place: Place, shared: bool) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    with contextlib.ExitStack() as undo:
        undo.enter_context(bound)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of a predecessor may linger
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)
        bound.bind(place)
        undo.pop_all()
    return bound


def _locked(name: str) -> socket.socket:
    """A name that one process has: the first bind does not see a server that does not listen yet.

    It is abstract, so that nothing is left behind, however the process ends.
    """
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        lock.bind(f"\0tokenllm:{name}")
    except OSError as error:
        lock.close()
        raise StartError(f"another tokenllm is starting on {name}") from error
    return lock
