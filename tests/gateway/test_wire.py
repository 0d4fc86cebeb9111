"""The short way of a chunk, on the real HTTP server: it is found, and a client cannot tell it from the long one."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from http.client import HTTPResponse
from typing import Any

import pytest
from hypercorn.asyncio import serve
from hypercorn.config import Config
from starlette.types import Receive, Scope, Send

from tokenllm.gateway import guard as guard_module
from tokenllm.gateway.guard import Guard
from tokenllm.gateway.wire import take

PARTS = [b"", b"one", b"", b"x" * 70_000, b"0\r\n\r\n", b"last"]


class Answering:
    """An application behind the guard that says these parts, on a port."""

    def __init__(self, parts: list[bytes], headers: list[tuple[bytes, bytes]]) -> None:
        self._parts = parts
        self._headers = headers
        self._stop = asyncio.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": self._headers})
            for part in self._parts:
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def __aenter__(self) -> "Answering":
        config = Config()
        config.bind = [f"fd://{self._listener.detach()}"]
        config.loglevel = "CRITICAL"
        self._serving = asyncio.create_task(serve(Guard(self.app, []), config, shutdown_trigger=self._stop.wait))  # type: ignore[arg-type]
        return self

    async def __aexit__(self, *raised: object) -> None:
        self._stop.set()
        with suppress(asyncio.CancelledError):
            await self._serving


def ask(port: int, first_line: str, wait: Callable[[], None] = lambda: None) -> tuple[HTTPResponse, bytes]:
    method = first_line.split()[0]
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 17)
        connection.sendall(f"{first_line}\r\nhost: x\r\n\r\n".encode())
        wait()
        answer = HTTPResponse(connection, method=method)
        answer.begin()
        return answer, answer.read()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The parts that went the short way."""
    short: list[bytes] = []

    def noted(wire: Any, body: bytes) -> bool:
        if went := take(wire, body):
            short.append(body)
        return went

    monkeypatch.setattr(guard_module, "take", noted)
    return short


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 20))  # type: ignore[arg-type]


def test_chunks_go_the_short_way_and_an_empty_part_ends_nothing(taken: list[bytes]) -> None:
    async def scenario() -> None:
        async with Answering(PARTS, []) as server:
            answer, body = await asyncio.to_thread(ask, server.port, "GET / HTTP/1.1")
        assert body == b"".join(PARTS) and answer.getheader("transfer-encoding") == "chunked"
        assert taken[0] == b"one", "hypercorn is not put together as wire.py believes"

    run(scenario)


@pytest.mark.parametrize(
    ("first_line", "headers"),
    [("GET / HTTP/1.0", []), ("HEAD / HTTP/1.1", []), ("GET / HTTP/1.1", [(b"Content-Length", b"70012")])],
)
def test_what_is_no_chunk_goes_the_long_way(taken: list[bytes], first_line: str, headers: list[Any]) -> None:
    async def scenario() -> None:
        async with Answering(PARTS, headers) as server:
            _, body = await asyncio.to_thread(ask, server.port, first_line)
        assert body == (b"" if first_line.startswith("HEAD") else b"".join(PARTS))
        assert not taken

    run(scenario)


def test_a_reader_that_falls_behind_is_waited_for(taken: list[bytes]) -> None:
    """Both ways take turns, and nothing is lost, doubled or out of order."""
    parts = [bytes([number % 251]) * 100_000 for number in range(100)]

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with Answering(parts, []) as server:
            waited = lambda: asyncio.run_coroutine_threadsafe(asyncio.sleep(0.2), loop).result()  # noqa: E731
            _, body = await asyncio.to_thread(ask, server.port, "GET / HTTP/1.1", waited)
        assert body == b"".join(parts)
        assert 0 < len(taken) < len(parts)

    run(scenario)
