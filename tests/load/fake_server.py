"""An OpenAI-compatible server whose every delay is known: what the load generator is measured against."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class FakeServer:
    """Answers after `first_s`, then sends a chunk of `tokens_per_chunk` tokens every `gap_s`."""

    first_s: float = 0.0
    gap_s: float = 0.0
    tokens_per_chunk: int = 1
    chunks_per_write: int = 1
    usage: bool = True
    break_request: Callable[[int], str] = lambda number: ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    arrived_s: list[float] = field(default_factory=list)
    running: int = 0
    most_running: int = 0

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "fake", "object": "model"}]})

    async def answer(self, request: web.Request) -> web.StreamResponse:
        number, body = len(self.bodies), await request.json()
        self.bodies.append(body)
        self.paths.append(request.path)
        self.arrived_s.append(asyncio.get_running_loop().time())
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            return await self._stream(request, body, self.break_request(number))
        finally:
            self.running -= 1

    async def _stream(self, request: web.Request, body: dict[str, Any], broken: str) -> web.StreamResponse:
        if broken == "refuse":
            return web.json_response({"error": {"message": "queue full"}}, status=429)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b": a comment\n\n" + _event(_choice(request, "", None)))
        await asyncio.sleep(self.first_s)
        chunks = -(-body["max_tokens"] // self.tokens_per_chunk)
        for first in range(0, chunks, self.chunks_per_write):
            if first:
                await asyncio.sleep(self.gap_s)
            count = min(self.chunks_per_write, chunks - first)
            await response.write(_event(_choice(request, "word ", None)) * count)
            if broken == "break":
                assert request.transport
                request.transport.close()
            if broken == "error event":
                await response.write(_event({"error": {"message": "the generation died", "type": "server_error"}}))
                return response
        if broken != "no end":
            await response.write(_event(_choice(request, "", "length")))
        if self.usage:
            counts = {"prompt_tokens": len(body.get("prompt", "")), "completion_tokens": body["max_tokens"]}
            await response.write(_event({"choices": [], "usage": counts}))
        await response.write(b"data: [DONE]\n\n")
        return response


def _choice(request: web.Request, text: str, finish_reason: str | None) -> dict[str, Any]:
    said = {"delta": {"content": text}} if "chat" in request.path else {"text": text}
    return {"choices": [{"index": 0, **said, "finish_reason": finish_reason}], "usage": None}


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


@asynccontextmanager
async def serving(server: FakeServer) -> AsyncIterator[str]:
    """The base URL while it runs."""
    app = web.Application()
    app.router.add_get("/v1/models", server.models)
    app.router.add_post("/v1/completions", server.answer)
    app.router.add_post("/v1/chat/completions", server.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()
