"""The outermost layer of the gateway: no request reaches an endpoint unchecked, and none leaves without an answer.

It decides on `scope["path"]`, never on a URL built from headers. It owns what the HTTP server does not do: keys, how
many requests are open, the size and the time of a body, the time of a write, the end of a handler whose client has
left, and the error envelope.
"""

import asyncio
import hmac
import re
import secrets
import time
from collections.abc import Callable, Iterable
from hashlib import sha256
from math import inf

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenllm.gateway.alarm import Alarm
from tokenllm.gateway.wire import chunked_wire, take
from tokenllm_schemas.anthropic import AnthropicError
from tokenllm_schemas.errors import ApiError, busy

LARGEST_BODY = 4 * 2**20
MOST_REQUESTS = 4096  # being answered at once
MOST_BODY_BYTES = 256 * 2**20  # of all of them
BODY_S = 10.0
STALL_S = 30.0
LINGER_S = 2.0  # how long an unread body is thrown away, so that its sender gets to read the answer
READY_PATH = "/health/ready"
DOCS_PATH = "/docs"  # the same for everybody; what it shows it asks for with the reader's key
OPEN_PATHS = frozenset({"/health/live", READY_PATH, DOCS_PATH})
ANTHROPIC_PATH = "/v1/messages"  # here, and below, errors are worded as Anthropic's clients read them
METHODS = frozenset({"GET", "HEAD", "POST", "DELETE"})
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
JSON = re.compile(rb"application/json\s*(;.*)?", re.IGNORECASE)


class ClientGone(Exception):
    """Nobody reads this answer: the connection is closed, or its reader has stalled for too long."""


class Guard:
    """An ASGI application around another one."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        self._keys = [sha256(key.encode()).digest() for key in keys]
        self._open = 0
        self._body_bytes = 0  # of the open ones
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        match scope["type"]:
            case "http":
                await self._answer(Exchange(scope, receive, send, closing=self.draining))
            case "websocket":
                await send({"type": "websocket.close"})  # before it is accepted: a plain 403
            case _:
                await self._app(scope, receive, send)

    async def idle(self) -> None:
        """Wait until nobody is being answered."""
        await self._idle.wait()

    async def _answer(self, exchange: "Exchange") -> None:
        self._open += 1
        self._idle.clear()
        try:
            self._check(exchange)
            await exchange.read_body(self._hold)
            await exchange.hand_to(self._app)
        except ClientGone:
            return
        except ApiError as error:
            await exchange.refuse(error)
        except Exception:
            await exchange.refuse(ApiError(500, "internal error; the log has the details", "internal_error"))
            raise  # the HTTP server logs it
        finally:
            exchange.close()
            self._open -= 1
            self._body_bytes -= exchange.body_bytes
            if not self._open:
                self._idle.set()

    def _check(self, exchange: "Exchange") -> None:
        scope = exchange.scope
        if scope["http_version"].startswith("2") and scope["scheme"] == "http":
            raise ApiError(505, "HTTP/2 needs TLS here", "http_version_not_supported")
        if exchange.header(b"content-length") is not None and exchange.header(b"transfer-encoding") is not None:
            raise ApiError(400, "content-length and transfer-encoding exclude each other", "invalid_header")
        if scope["path"] not in OPEN_PATHS and not self._key_fits(exchange):
            message = "missing or wrong API key; send it as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'"
            raise ApiError(401, message, "invalid_api_key", headers={"www-authenticate": "Bearer"})
        if self._open > MOST_REQUESTS and scope["path"] not in OPEN_PATHS:
            raise busy(f"{MOST_REQUESTS} requests are being answered already")
        if scope["method"] not in METHODS:
            raise wrong_method(scope["method"], METHODS)
        if self.draining and (scope["method"] == "POST" or scope["path"] == READY_PATH):
            raise busy("the server is shutting down", "draining")

    def _hold(self, size: int) -> None:
        if self._body_bytes + size > MOST_BODY_BYTES:
            raise busy(f"there is no room for this body beside the others: all may have {MOST_BODY_BYTES} bytes")
        self._body_bytes += size

    def _key_fits(self, exchange: "Exchange") -> bool:
        if not self._keys:
            return True
        digests = [sha256(key).digest() for key in exchange.offered_keys()]
        fits = [hmac.compare_digest(one, known) for one in digests for known in self._keys]  # no early exit to time
        return any(fits)


class Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, closing: bool) -> None:
        self.scope = scope
        self._receive = receive
        self._send = send
        self._id = self._request_id()
        self._closing = closing
        self._body = b""
        self.body_bytes = 0
        self._body_ended = False
        self._started = False
        self._finished = False
        self._wire: asyncio.WriteTransport | None = None
        self._stalling = Alarm(self._stall)
        self._stalled = False
        self._writer: asyncio.Task[object] | None = None

    def close(self) -> None:
        """Nothing follows."""
        self._stalling.stop()

    def header(self, name: bytes) -> bytes | None:
        return header(self.scope, name)

    def offered_keys(self) -> list[bytes]:
        """What is offered as an API key: OpenAI's clients send it in one header, Anthropic's in another."""
        scheme, _, bearer = (self.header(b"authorization") or b"").partition(b" ")
        offered = [bearer.strip()] if scheme.lower() == b"bearer" else []
        return [*offered, *filter(None, [self.header(b"x-api-key")])]

    async def read_body(self, hold: Callable[[int], None]) -> None:
        """The whole body, within its limits; `hold` is told of each part, and may refuse it."""
        if int(self.header(b"content-length") or 0) > LARGEST_BODY:
            raise _too_large()
        parts = []
        try:
            async with asyncio.timeout(BODY_S):
                while not self._body_ended:
                    parts.append(await self._part())
                    hold(len(parts[-1]))
                    self.body_bytes += len(parts[-1])
                    if self.body_bytes > LARGEST_BODY:
                        raise _too_large()
        except TimeoutError:
            message = f"the body took longer than {BODY_S:.0f} seconds"
            raise ApiError(408, message, "timeout", headers={"connection": "close"}) from None
        self._body = b"".join(parts)

    async def hand_to(self, app: ASGIApp) -> None:
        """Run the application until it has answered, or its client has left."""
        handler = asyncio.create_task(app(self.scope, self._replay, self.send))  # type: ignore[arg-type]
        leaving = asyncio.create_task(self._left())
        leaving.add_done_callback(lambda _: self._finished or handler.cancel())
        try:
            await handler
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():  # type: ignore[union-attr]
                raise  # the whole exchange is cancelled, not the handler alone
        finally:
            leaving.cancel()

    async def send(self, message: Message) -> None:
        """Pass a part of the answer on, unless nobody takes it."""
        if message["type"] == "http.response.start":
            self._started = True
            message = {**message, "headers": [*message["headers"], *self._own_headers()]}
            self._wire = chunked_wire(self.scope, message, self._send)
        elif not message.get("more_body", False):
            self._finished = True  # from here on the disconnect is our own doing
        elif take(self._wire, message["body"]):
            return
        self._writer = asyncio.current_task()
        self._stalling.set(time.monotonic() + STALL_S)
        try:
            await self._send(message)
        except asyncio.CancelledError:
            if self._stalled and not self._writer.uncancel():  # type: ignore[union-attr]
                raise ClientGone from None
            raise
        finally:
            self._stalling.set(inf)

    def _stall(self) -> None:
        self._stalled = True
        self._writer.cancel()  # type: ignore[union-attr]

    async def refuse(self, error: ApiError) -> None:
        """Answer with an error, if nothing has been answered yet."""
        if self._started:
            return
        # unread parts of the body that nobody takes would block the answer
        rest = asyncio.create_task(self._throw_away())
        try:
            await self._send_whole(error.status, error.headers, self._envelope(error), rest)
        except ClientGone:
            return
        finally:
            rest.cancel()

    async def _send_whole(self, status: int, headers: dict[str, str], body: bytes, rest: asyncio.Task[None]) -> None:
        named = {"content-type": "application/json", "content-length": str(len(body)), **headers}
        raw = [(name.encode(), value.encode("latin-1")) for name, value in named.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": raw})
        await self.send({"type": "http.response.body", "body": body, "more_body": True})
        await asyncio.wait({rest}, timeout=LINGER_S)
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    def _envelope(self, error: ApiError) -> bytes:
        path: str = self.scope["path"]
        if path == ANTHROPIC_PATH or path.startswith(ANTHROPIC_PATH + "/"):
            return msgspec.json.encode(AnthropicError.of(error))
        return error.envelope()

    async def _throw_away(self) -> None:
        try:
            while not self._body_ended:
                await self._part()
        except ClientGone:
            return

    async def _part(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._body_ended = True
            raise ClientGone
        self._body_ended = not message.get("more_body", False)
        return message.get("body", b"")

    async def _replay(self) -> Message:
        body, self._body = self._body, b""
        return {"type": "http.request", "body": body, "more_body": False}

    async def _left(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    def _request_id(self) -> bytes:
        given = self.header(b"x-request-id") or b""
        return given if REQUEST_ID.fullmatch(given) else secrets.token_hex(16).encode()

    def _own_headers(self) -> list[tuple[bytes, bytes]]:
        closing = [(b"connection", b"close")] if self._closing else []
        return [(b"x-request-id", self._id), *closing]


def header(scope: Scope, name: bytes) -> bytes | None:
    """The value of a header; None when it is absent, empty when it is there more than once."""
    values = [value for key, value in scope["headers"] if key == name]
    return values[0] if len(values) == 1 else b"" if values else None


def check_json(scope: Scope) -> None:
    """For operations that read a body."""
    if not JSON.fullmatch(header(scope, b"content-type") or b""):
        raise ApiError(415, "send the body as 'Content-Type: application/json'", "unsupported_media_type")
    if (encoding := header(scope, b"content-encoding")) not in (None, b"identity"):
        raise ApiError(415, f"content-encoding {encoding!r} is not supported", "unsupported_media_type")


def _too_large() -> ApiError:
    message = f"the body is larger than {LARGEST_BODY} bytes"
    return ApiError(413, message, "request_too_large", headers={"connection": "close"})


def wrong_method(method: str, allowed: Iterable[str]) -> ApiError:
    names = ", ".join(sorted(allowed))
    message = f"method {method} is not allowed here; {names} would be"
    return ApiError(405, message, "method_not_allowed", headers={"allow": names})
