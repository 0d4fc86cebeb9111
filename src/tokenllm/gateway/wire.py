"""The short way of a chunk to its connection: past the layers of the HTTP server, which only frame it.

It relies on how hypercorn puts an ASGI `send` together, and on HTTP/1.1 knowing no state between two chunks. Where
anything is not as expected there is no short way, and the long one does the same.
"""

import asyncio

from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.protocol.http_stream import HTTPStream
from starlette.types import Message, Scope, Send


def chunked_wire(scope: Scope, start: Message, send: Send) -> asyncio.WriteTransport | None:
    """What the chunks of the answer that begins so are written to, if it is one of chunks."""
    sized = any(name.lower() == b"content-length" for name, _ in start["headers"])
    if scope["http_version"] != "1.1" or scope["method"] == "HEAD" or sized or start["status"] != 200:
        return None
    stream = getattr(send, "__self__", None)
    protocol = stream.send.__self__ if isinstance(stream, HTTPStream) else None  # type: ignore[attr-defined]
    server = protocol.send.__self__ if isinstance(protocol, H11Protocol) else None  # type: ignore[attr-defined]
    return server.writer.transport if isinstance(server, TCPServer) else None


def take(wire: asyncio.WriteTransport | None, body: bytes) -> bool:
    """Write a chunk now, unless its reader is behind or gone: the long way knows how to wait."""
    if wire is None or not body or wire.get_write_buffer_size() or wire.is_closing():
        return False
    wire.write(b"%x\r\n%b\r\n" % (len(body), body))
    return True
