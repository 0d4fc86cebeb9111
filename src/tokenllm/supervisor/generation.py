"""A generation: the scheduler, the detokenizer and the rings they share with each gateway.

It is never repaired, only replaced as a whole.
"""

import contextlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from tokenllm.config import DetokenizerBirth, SchedulerBirth, ServeConfig
from tokenllm.ring import RingFds, RingMemoryError, close_ring, create_ring
from tokenllm.supervisor import StartError
from tokenllm.supervisor.child import Child

SCHEDULER = (sys.executable, "-m", "tokenllm.scheduler")
DETOKENIZER = (sys.executable, "-m", "tokenllm.detokenizer")


class GatewayRings(NamedTuple):
    """The two rings of one gateway slot."""

    to_scheduler: RingFds  # ring A
    from_detokenizer: RingFds  # ring C

    @property
    def fds(self) -> tuple[int, ...]:
        return tuple(fd for ring in self for fd in (ring.memory, ring.bell))


class Rings(NamedTuple):
    gateways: tuple[GatewayRings, ...]  # by slot
    between: RingFds  # ring B

    def close(self) -> None:
        for ring in (self.between, *(ring for pair in self.gateways for ring in pair)):
            close_ring(ring)


def create_rings(gateways: int, ring_bytes: int) -> Rings:
    with contextlib.ExitStack() as undo:

        def ring() -> RingFds:
            fds = create_ring(ring_bytes)
            undo.callback(close_ring, fds)
            return fds

        try:
            rings = Rings(tuple(GatewayRings(ring(), ring()) for _ in range(gateways)), ring())
        except RingMemoryError as error:
            needed = f"{2 * gateways + 1} rings of {ring_bytes} bytes"
            raise StartError(f"too little memory for {needed} (--ring-bytes): {error}") from error
        undo.pop_all()
    return rings


class Generation:
    """Its two processes and its rings; `ready` once a gateway has heard from the model through all of them."""

    def __init__(
        self,
        number: int,
        config: ServeConfig,
        model_path: str,
        supervisor_pid: int,
        page_fds: tuple[int, int],  # the scheduler's and the detokenizer's
        scheduler_command: Sequence[str],
    ) -> None:
        self.number = number
        self.ready = False
        self.rings = create_rings(config.gateway_processes, config.ring_bytes)
        inboxes = tuple(pair.to_scheduler for pair in self.rings.gateways)
        outboxes = tuple(pair.from_detokenizer for pair in self.rings.gateways)
        between = self.rings.between
        self.members = (
            Child(
                "scheduler",
                scheduler_command,
                SchedulerBirth(config, model_path, number, supervisor_pid, inboxes, between, page_fds[0]),
                (*_fds(*inboxes, between), page_fds[0]),
            ),
            Child(
                "detokenizer",
                DETOKENIZER,
                DetokenizerBirth(config, model_path, number, supervisor_pid, between, outboxes, page_fds[1]),
                (*_fds(*outboxes, between), page_fds[1]),
            ),
        )

    def end(self) -> tuple[int, ...]:
        """Kill what still lives, and the exit codes of all: there is nothing in it worth saving."""
        for member in self.members:
            member.kill()
        codes = tuple(member.reap() for member in self.members)
        self.rings.close()
        return codes


def _fds(*rings: RingFds) -> tuple[int, ...]:
    return tuple(fd for ring in rings for fd in (ring.memory, ring.bell))
