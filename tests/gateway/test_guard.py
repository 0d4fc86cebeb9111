"""The guard alone: what it lets through, what it answers itself, and what becomes of a handler without a client."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from tokenllm.gateway import guard as guard_module
from tokenllm.gateway.guard import LARGEST_BODY, Guard
from tokenllm_schemas.errors import ApiError

POST = [(b"content-type", b"application/json")]


class Client:
    """One request to an ASGI application, part by part."""

    def __init__(self, app: Callable[..., Awaitable[None]], method: str = "GET", **scope: Any) -> None:
        self.incoming: asyncio.Queue[Message] = asyncio.Queue()
        self.sent: list[Message] = []
        self.takes = asyncio.Event()  # whether the client reads
        self.takes.set()
        self.scope = {
            "type": "http",
            "http_version": "1.1",
            "scheme": "http",
            "method": method,
            "path": "/somewhere",
            "headers": [],
            **scope,
        }
        self.task = asyncio.create_task(app(self.scope, self.incoming.get, self._send))  # type: ignore[arg-type]

    async def _send(self, message: Message) -> None:
        await self.takes.wait()
        self.sent.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.leave()

    def write(self, body: bytes = b"", more: bool = False) -> "Client":
        self.incoming.put_nowait({"type": "http.request", "body": body, "more_body": more})
        return self

    def leave(self) -> None:
        self.incoming.put_nowait({"type": "http.disconnect"})

    async def answered(self) -> "Client":
        await asyncio.wait_for(self.task, 5)
        return self

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def headers(self) -> dict[str, str]:
        return {key.decode(): value.decode() for key, value in self.sent[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])

    @property
    def code(self) -> str:
        return json.loads(self.body)["error"]["code"]


class Echo:
    """An application that answers with the body it got."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.bodies.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": self.bodies[-1]})


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(scenario())  # type: ignore[arg-type]


def test_a_body_arrives_in_one_piece() -> None:
    async def scenario() -> None:
        client = Client(Guard(Echo(), []), "POST", headers=POST).write(b"a" * 70_000, more=True).write(b"b")
        await client.answered()
        assert (client.status, client.body) == (200, b"a" * 70_000 + b"b")

    run(scenario)


@pytest.mark.parametrize(
    ("given", "echoed"),
    [(b"abc-DEF_1.2", True), (b"a" * 64, True), (b"a" * 65, False), (b"", False), (b"a b", False), (b"a\n", False)],
)
def test_every_answer_has_a_request_id(given: bytes, echoed: bool) -> None:
    async def scenario() -> None:
        for path_app in (Echo(), _raising(ApiError(400, "no", "invalid_value"))):
            client = Client(Guard(path_app, []), headers=[(b"x-request-id", given)]).write()
            await client.answered()
            id = client.headers["x-request-id"]
            assert (id == given.decode()) == echoed
            assert 1 <= len(id) <= 64

    run(scenario)


def test_two_request_ids_are_none() -> None:
    async def scenario() -> None:
        client = Client(Guard(Echo(), []), headers=[(b"x-request-id", b"a"), (b"x-request-id", b"b")]).write()
        assert (await client.answered()).headers["x-request-id"] not in ("a", "b")

    run(scenario)


KEYS = ["right", "also right", "ключ"]


@pytest.mark.parametrize(
    ("headers", "let_in"),
    [
        ([b"Bearer right"], True),
        ([b"bearer right"], True),
        ([b"Bearer  right "], True),
        ([b"Bearer also right"], True),
        (["Bearer ключ".encode()], True),
        ([], False),
        ([b""], False),
        ([b"Bearer"], False),
        ([b"Bearer "], False),
        ([b"Bearer righ"], False),
        ([b"Bearer rightt"], False),
        ([b"Bearer RIGHT"], False),
        ([b"Basic right"], False),
        ([b"right"], False),
        ([b"Bearer \xff\xfe"], False),
        ([b"Bearer right", b"Bearer right"], False),
        ([b"Bearer wrong", b"Bearer right"], False),
    ],
)
def test_keys(headers: list[bytes], let_in: bool) -> None:
    async def scenario() -> None:
        given = [(b"authorization", value) for value in headers]
        client = await Client(Guard(Echo(), KEYS), headers=given).write().answered()
        assert client.status == (200 if let_in else 401)
        if not let_in:
            assert client.code == "invalid_api_key" and client.headers["www-authenticate"] == "Bearer"

    run(scenario)


@pytest.mark.parametrize(
    ("authorization", "x_api_key", "let_in"),
    [
        ([], [b"right"], True),
        ([], ["ключ".encode()], True),
        ([b"Bearer wrong"], [b"right"], True),
        ([b"Bearer right"], [b"wrong"], True),
        ([], [b"wrong"], False),
        ([], [b""], False),
        ([], [b"Bearer right"], False),
        ([], [b"right", b"right"], False),
        ([b"Bearer wrong"], [b"wrong"], False),
    ],
)
def test_keys_of_anthropics_clients(authorization: list[bytes], x_api_key: list[bytes], let_in: bool) -> None:
    async def scenario() -> None:
        given = [(b"authorization", value) for value in authorization] + [(b"x-api-key", value) for value in x_api_key]
        client = await Client(Guard(Echo(), KEYS), headers=given).write().answered()
        assert client.status == (200 if let_in else 401)

    run(scenario)


@pytest.mark.parametrize("status", [400, 408, 429, 500, 503])
def test_who_shall_come_again_is_told_when(status: int) -> None:
    async def scenario() -> None:
        for headers, told in (({}, "1"), ({"retry-after": "7"}, "7")):
            app = _raising(ApiError(status, "not now", "some_code", headers=headers))
            client = await Client(Guard(app, [])).write().answered()
            expected = told if headers or status in (429, 503) else None
            assert client.headers.get("retry-after") == expected

    run(scenario)


@pytest.mark.parametrize("path", ["/health/live", "/health/ready"])
def test_health_needs_no_key(path: str) -> None:
    async def scenario() -> None:
        assert (await Client(Guard(Echo(), KEYS), path=path).write().answered()).status == 200

    run(scenario)


@pytest.mark.parametrize(
    "path", ["/health/live/", "//health/live", "/health", "/Health/live", "/v1/../health/live", ""]
)
def test_what_looks_like_health_needs_one(path: str) -> None:
    async def scenario() -> None:
        host = [(b"host", b"x/health/live?")]
        assert (await Client(Guard(Echo(), KEYS), path=path, headers=host).write().answered()).status == 401

    run(scenario)


@pytest.mark.parametrize(
    ("scope", "status"),
    [
        ({"method": "CONNECT"}, 405),
        ({"method": "TRACE"}, 405),
        ({"method": "PUT"}, 405),
        ({"method": "POST", "headers": [(b"content-type", b"Application/JSON; charset=utf-8")]}, 200),
        ({"method": "POST", "headers": [*POST, (b"content-length", b"2"), (b"transfer-encoding", b"chunked")]}, 400),
        ({"http_version": "2"}, 505),
        ({"http_version": "1.0"}, 200),
    ],
)
def test_requests_of_another_kind(scope: dict, status: int) -> None:
    async def scenario() -> None:
        client = await Client(Guard(Echo(), []), **scope).write(b"{}").answered()
        assert client.status == status
        assert status == 200 or json.loads(client.body)["error"]["message"]

    run(scenario)


@pytest.mark.parametrize("announced", [True, False])
def test_large_bodies_are_refused_and_never_held(announced: bool) -> None:
    async def scenario() -> None:
        echo = Echo()
        length = [(b"content-length", b"%d" % (LARGEST_BODY + 1))] if announced else []
        client = Client(Guard(echo, []), "POST", headers=[*POST, *length])
        for _ in range(LARGEST_BODY // 2**16):
            client.write(bytes(2**16), more=True)
        client.write(b"x")
        await client.answered()
        assert (client.status, client.code, client.headers["connection"]) == (413, "request_too_large", "close")
        assert echo.bodies == [] and client.incoming.qsize() <= 1, "the rest is thrown away"

    run(scenario)


def test_the_largest_body_is_taken() -> None:
    async def scenario() -> None:
        client = Client(Guard(Echo(), []), "POST", headers=POST).write(bytes(LARGEST_BODY))
        assert (await client.answered()).status == 200

    run(scenario)


def test_more_requests_than_can_be_held_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module, "MOST_REQUESTS", 2)

    async def scenario() -> None:
        guard = Guard(Slow(streams=False), [])
        held = [Client(guard).write() for _ in range(2)]
        await asyncio.sleep(0.01)
        refused = await Client(guard).write().answered()
        assert (refused.status, refused.code, refused.headers["retry-after"]) == (503, "overloaded", "1")
        alive = Client(guard, path="/health/live").write()
        await asyncio.sleep(0.01)
        assert not alive.sent, "health is never refused"
        for client in (*held, alive):
            client.leave()
            await client.answered()
        served = Client(guard).write()
        await asyncio.sleep(0.01)
        assert not served.sent, "there is room again"
        served.leave()
        await served.answered()

    run(scenario)


def test_more_bodies_than_can_be_held_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module, "MOST_BODY_BYTES", 100)

    async def scenario() -> None:
        guard, answering = Guard(Slow(streams=False), []), Guard(Echo(), [])
        held = Client(guard, "POST", headers=POST).write(bytes(60))
        await asyncio.sleep(0.01)
        refused = await Client(guard, "POST", headers=POST).write(bytes(30), more=True).write(bytes(11)).answered()
        assert (refused.status, refused.code, refused.headers["retry-after"]) == (503, "overloaded", "1")
        fits = Client(guard, "POST", headers=POST).write(bytes(40))
        await asyncio.sleep(0.01)
        assert not fits.sent
        for client in (held, fits):
            client.leave()
            await client.answered()
        for _ in range(3):
            assert (await Client(answering, "POST", headers=POST).write(bytes(100)).answered()).status == 200

    run(scenario)


def test_slow_bodies_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module, "BODY_S", 0.05)
    monkeypatch.setattr(guard_module, "LINGER_S", 0.05)

    async def scenario() -> None:
        client = Client(Guard(Echo(), []), "POST", headers=POST).write(b"{", more=True)
        await client.answered()
        assert (client.status, client.code) == (408, "timeout")

    run(scenario)


def _raising(error: Exception) -> Callable[..., Awaitable[None]]:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise error

    return app


def test_a_bug_is_a_500_that_says_nothing_and_is_logged() -> None:
    async def scenario() -> None:
        client = Client(Guard(_raising(KeyError("secret/path")), [])).write()
        with pytest.raises(KeyError):  # the HTTP server logs what comes out
            await client.answered()
        assert (client.status, client.code) == (500, "internal_error")
        assert b"secret" not in client.body

    run(scenario)


class Slow:
    """An application that answers late, or streams for ever."""

    def __init__(self, streams: bool) -> None:
        self.streams = streams
        self.cancelled = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if self.streams:
                await send({"type": "http.response.start", "status": 200, "headers": []})
            while True:
                await asyncio.sleep(0.001)
                if self.streams:
                    await send({"type": "http.response.body", "body": b"x", "more_body": True})
        except asyncio.CancelledError:
            self.cancelled = True
            raise


@pytest.mark.parametrize("streams", [True, False])
def test_a_handler_whose_client_leaves_is_cancelled(streams: bool) -> None:
    async def scenario() -> None:
        slow = Slow(streams)
        guard = Guard(slow, [])
        client = Client(guard).write()
        await asyncio.sleep(0.02)
        assert not guard._idle.is_set()
        client.leave()
        await client.answered()
        assert slow.cancelled
        await asyncio.wait_for(guard.idle(), 1)

    run(scenario)


def test_a_client_that_leaves_in_the_middle_of_its_body_is_let_go() -> None:
    async def scenario() -> None:
        echo = Echo()
        client = Client(Guard(echo, []), "POST", headers=POST).write(b"{", more=True)
        client.leave()
        await client.answered()
        assert client.sent == [] and echo.bodies == []

    run(scenario)


def test_a_client_that_does_not_read_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module, "STALL_S", 0.05)

    async def scenario() -> None:
        slow = Slow(streams=True)
        client = Client(Guard(slow, [])).write()
        await asyncio.sleep(0.02)
        client.takes.clear()
        await client.answered()
        assert not slow.cancelled, "it saw its send fail"

    run(scenario)


def test_an_exchange_that_is_cancelled_cancels_its_handler() -> None:
    async def scenario() -> None:
        slow = Slow(streams=False)
        client = Client(Guard(slow, [])).write()
        await asyncio.sleep(0.02)
        client.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await client.task
        await asyncio.sleep(0)
        assert slow.cancelled

    run(scenario)


def test_the_end_of_an_answer_is_not_a_client_that_left() -> None:
    """The server says `http.disconnect` while the last part is being sent: the handler must get to its end."""
    ended = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x"})
        await asyncio.sleep(0.01)
        ended.append(True)

    async def scenario() -> None:
        await Client(Guard(app, [])).write().answered()
        assert ended

    run(scenario)


def test_a_draining_guard_takes_no_new_work() -> None:
    async def scenario() -> None:
        guard = Guard(Echo(), [])
        guard.draining = True
        refused = await Client(guard, "POST", headers=POST).write(b"{}").answered()
        assert (refused.status, refused.code) == (503, "draining")
        assert refused.headers["connection"] == "close" and "retry-after" in refused.headers
        assert (await Client(guard, path="/health/live").write().answered()).status == 200

    run(scenario)


def test_websockets_are_refused() -> None:
    async def scenario() -> None:
        client = Client(Guard(Echo(), []), type="websocket")
        assert (await client.answered()).sent == [{"type": "websocket.close"}]

    run(scenario)
