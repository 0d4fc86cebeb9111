"""What the supervisor and a gateway tell each other, and how: one packet per message on a Unix SOCK_SEQPACKET socket.

Packets are JSON of the tagged Structs below; `Attach` carries the descriptors of a gateway's two rings beside it, as
SCM_RIGHTS. Reading the end of the channel means that the other process is gone.
"""

import socket
from collections.abc import Sequence
from types import UnionType
from typing import NamedTuple, TypeAlias

import msgspec

LARGEST_PACKET = 4096
RING_DESCRIPTORS = 4


class ControlMessage(msgspec.Struct, frozen=True, tag=True):
    """One packet, tagged by its class name."""


class ModelReady(ControlMessage, frozen=True):
    """`Ready` came round to this gateway."""

    generation: int
    kv_tokens_capacity: int
    max_model_len: int


class Attach(ControlMessage, frozen=True):
    """Talk to this generation. Beside it: the memory and the bell of ring A, then the memory and the bell of ring C."""

    generation: int


class Lost(ControlMessage, frozen=True):
    """The generation is dead, and what it had not said will never be said."""

    generation: int


class Drain(ControlMessage, frozen=True):
    """Take no new work, let the streams finish, then exit."""


class Serving(ControlMessage, frozen=True):
    """The gateway accepts connections."""


ToGateway: TypeAlias = Attach | Lost | Drain
ToSupervisor: TypeAlias = Serving | ModelReady


class Packet(NamedTuple):
    message: ControlMessage
    descriptors: tuple[int, ...]  # the receiver's own now: it closes them


class ChannelClosed(Exception):
    """The other end is gone."""


def channel() -> tuple[socket.socket, socket.socket]:
    """The two ends; a child is given one of them."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def tell(end: socket.socket, message: ControlMessage, descriptors: Sequence[int] = ()) -> None:
    """Send one message. Raises ChannelClosed, and BlockingIOError on a non-blocking end that nobody reads."""
    try:
        socket.send_fds(end, [msgspec.json.encode(message)], descriptors, socket.MSG_NOSIGNAL)
    except (BrokenPipeError, ConnectionResetError) as error:
        raise ChannelClosed from error


def hear(end: socket.socket, kind: UnionType) -> Packet:
    """Receive one message. Raises ChannelClosed, and BlockingIOError on a non-blocking end with nothing to read."""
    try:
        data, descriptors, flags, _ = socket.recv_fds(end, LARGEST_PACKET, RING_DESCRIPTORS)
    except ConnectionResetError as error:
        raise ChannelClosed from error
    if not data:
        raise ChannelClosed
    assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC), "a packet is small and carries at most two rings"
    return Packet(msgspec.json.decode(data, type=kind), tuple(descriptors))
