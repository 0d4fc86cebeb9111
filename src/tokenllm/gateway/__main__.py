"""The gateway process: HTTP on one side, rings A and C on the other, and the supervisor's word on a socket between."""

import asyncio
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from hypercorn.asyncio import serve
from hypercorn.config import Config

from tokenllm.checkpoint import CheckpointError
from tokenllm.config import GatewayBirth, accepted_keys
from tokenllm.control import Attach, ChannelClosed, Drain, Lost, ModelReady, Packet, Serving, ToGateway, hear, tell
from tokenllm.counters import Page
from tokenllm.gateway.app import application
from tokenllm.gateway.circuit import Circuit
from tokenllm.gateway.gateway import Gateway
from tokenllm.gateway.guard import STALL_S
from tokenllm.gateway.response_store import ResponseStore
from tokenllm.gateway.served_model import ServedModel
from tokenllm.messages import Ready
from tokenllm.process import die_with, read_birth
from tokenllm.ring import RingFds
from tokenllm_schemas.errors import busy

KEEP_ALIVE_S = 8.0  # also what a client gets to send its headers; the SDK drops idle connections after 5
SWITCH_S = 0.001  # how long a thread that tokenizes keeps the event loop waiting for the interpreter
CLOSING_S = 2.0  # for connections that are still open when all has been said


def main() -> None:
    birth = read_birth(GatewayBirth)
    die_with(birth.supervisor_pid)
    for stop in (signal.SIGINT, signal.SIGTERM):  # these come to the whole group: the supervisor says what follows
        signal.signal(stop, signal.SIG_IGN)
    sys.setswitchinterval(SWITCH_S)
    try:
        asyncio.run(Process(birth).run())
    except* ChannelClosed:
        sys.exit("gateway: the supervisor is gone")
    except* CheckpointError as errors:
        sys.exit(f"tokenllm: {errors.exceptions[0]}")


class Process:
    """What lives in the gateway's event loop: the HTTP server, the circuit and the supervisor's orders."""

    def __init__(self, birth: GatewayBirth) -> None:
        self._birth = birth
        self._control = socket.socket(fileno=birth.control_fd)
        self._control.setblocking(False)
        pages = [Page(fd) for fd in birth.page_fds]
        self._circuit = Circuit(birth.slot, birth.incarnation, pages[birth.own_page], self._report)
        responses = ResponseStore(Path(birth.responses_path))
        limit = birth.config.max_queued_requests
        gateway = Gateway(ServedModel.load(birth), self._circuit, pages, limit, responses)
        self._guard = application(gateway, accepted_keys(birth.config))
        self._drain_asked = asyncio.Event()
        self._drained = asyncio.Event()

    async def run(self) -> None:
        """Serve until drained. What goes wrong in any of the three tasks ends the process."""
        asyncio.get_running_loop().set_exception_handler(_log_failure)
        _let_go_of_vanished_clients(self._birth.listen_fd)
        config = _http_config(self._birth.listen_fd)
        async with asyncio.TaskGroup() as group:
            serving = group.create_task(serve(self._guard, config, shutdown_trigger=self._drain))  # type: ignore[arg-type]
            tasks = [serving, group.create_task(self._circuit.listen()), group.create_task(self._obey())]
            await self._drained.wait()
            await asyncio.wait({serving}, timeout=2 * CLOSING_S)
            for task in tasks:
                task.cancel()

    async def _obey(self) -> None:
        told = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._control, told.set)
        while True:
            await told.wait()
            told.clear()
            with suppress(BlockingIOError):
                self._follow(hear(self._control, ToGateway))

    def _follow(self, packet: Packet) -> None:
        match packet.message:
            case Attach(generation=generation):
                a_memory, a_bell, c_memory, c_bell = packet.descriptors
                self._circuit.attach(generation, RingFds(a_memory, a_bell), RingFds(c_memory, c_bell))
            case Lost(generation=generation):
                self._circuit.lose(generation)
            case Drain():
                self._guard.draining = True
                self._drain_asked.set()

    def _report(self, ready: Ready) -> None:
        tell(self._control, ModelReady(ready.generation, ready.kv_tokens_capacity, ready.max_model_len))

    async def _drain(self) -> None:
        """The HTTP server awaits this as soon as it accepts connections, and stops when it returns."""
        tell(self._control, Serving())
        await self._drain_asked.wait()
        await self._idle_within(self._birth.config.drain_s)
        self._circuit.cut(busy("the server is shutting down", "draining"))
        await self._idle_within(CLOSING_S)
        self._drained.set()

    async def _idle_within(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._guard.idle()


def _let_go_of_vanished_clients(listen_fd: int) -> None:
    """Connections inherit these: one whose peer has vanished, or takes nothing, ends in about half a minute."""
    listening = socket.socket(fileno=listen_fd)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(STALL_S * 1000))
    listening.detach()


def _log_failure(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """The HTTP server leaves some ends of connections to the loop: a client that vanished is no news."""
    if not isinstance(context.get("exception"), OSError):
        loop.default_exception_handler(context)


def _http_config(listen_fd: int) -> Config:
    # read_timeout stays unset: it would cut a stream that is being written
    config = Config()
    config.bind = [f"fd://{listen_fd}"]
    config.backlog = 1024
    config.keep_alive_timeout = KEEP_ALIVE_S
    config.graceful_timeout = CLOSING_S
    config.h11_max_incomplete_size = 16 * 1024
    config.h2_max_concurrent_streams = 32
    config.h2_max_header_list_size = 16 * 1024
    config.include_server_header = False
    config.loglevel = "WARNING"
    return config


if __name__ == "__main__":
    main()
