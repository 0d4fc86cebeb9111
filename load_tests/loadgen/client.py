"""One streaming request, timed; and many of them, by a fixed number of streams or by arrival times.

Every request ends as an `Answered` or a `Failed`: none is dropped. Tokens are counted by the server's
usage record where it sends one, because a chunk may carry several tokens, and a token no text at all.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import aiohttp
import msgspec

from loadgen.workload import ChatPrompt, IdsPrompt, Prompt

ERROR_TEXT_LIMIT = 300


class Server(msgspec.Struct, frozen=True):
    """Where requests go, and what is added to each."""

    base_url: str
    model: str
    api_key: str = ""
    extra_body: dict[str, Any] = {}
    timeout_s: float = 600.0


class Answered(msgspec.Struct, frozen=True, tag="answered"):
    """A request that was answered to its end."""

    started_s: float  # since the run began
    ttft_s: float
    total_s: float
    inter_token_s: list[float]  # one per chunk after the first arrival
    prompt_tokens: int
    output_tokens: int
    asked_tokens: int
    usage_reported: bool


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    started_s: float
    total_s: float
    error: str


Outcome: TypeAlias = Answered | Failed


class Streams(msgspec.Struct, frozen=True, tag="streams"):
    """So many requests are always under way."""

    streams: int


class Arrivals(msgspec.Struct, frozen=True, tag="arrivals"):
    """Requests arrive as a Poisson process, whatever the server does."""

    per_s: float
    seed: int


Pace: TypeAlias = Streams | Arrivals


class ServerFault(Exception):
    """The server's answer is an error, or no complete answer."""


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode_event = msgspec.json.Decoder(_Event).decode


class EventStream:
    """What one event stream has told so far."""

    def __init__(self) -> None:
        self.arrivals: list[tuple[float, int]] = []  # (when, chunks with text that came together)
        self.usage: _Usage | None = None
        self.finished = False

    def take(self, now: float, lines: list[bytes]) -> None:
        chunks = sum(self._shows_text(line[5:].strip()) for line in lines if line.startswith(b"data:"))
        if chunks:
            self.arrivals.append((now, chunks))

    def _shows_text(self, data: bytes) -> bool:
        if data == b"[DONE]":
            return False
        try:
            event = _decode_event(data)
        except msgspec.DecodeError as fault:
            raise ServerFault(f"malformed event: {fault}: {_excerpt(data)}") from fault
        if event.error is not None:
            raise ServerFault(f"error event: {_excerpt(data)}")
        self.usage = event.usage or self.usage
        self.finished |= any(choice.finish_reason for choice in event.choices)
        return any(map(_has_text, event.choices))

    def inter_token_s(self, output_tokens: int) -> list[float]:
        """Tokens that arrive together share the time since the arrival before them."""
        chunks = sum(count for _, count in self.arrivals)
        tokens_per_chunk = output_tokens / chunks if chunks else 1.0
        gaps = []
        for (before, _), (now, count) in pairwise(self.arrivals):
            gaps += [(now - before) / (count * tokens_per_chunk)] * count
        return gaps


def _has_text(choice: _Choice) -> bool:
    delta = choice.delta or _Delta()
    return bool(choice.text or delta.content or delta.reasoning_content)


def _excerpt(data: bytes) -> str:
    return data[:ERROR_TEXT_LIMIT].decode(errors="replace")


def request_body(prompt: Prompt, server: Server) -> tuple[str, dict[str, Any]]:
    """The endpoint and the body; `extra_body` has the last word."""
    common = {
        "model": server.model,
        "max_tokens": prompt.output_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    match prompt:
        case IdsPrompt(ids=ids):
            return "completions", common | {"prompt": ids, "ignore_eos": True} | server.extra_body
        case ChatPrompt(messages=messages):
            return "chat/completions", common | {"messages": msgspec.to_builtins(messages)} | server.extra_body


async def _stream(session: aiohttp.ClientSession, server: Server, prompt: Prompt) -> EventStream:
    path, body = request_body(prompt, server)
    stream, rest = EventStream(), b""
    async with asyncio.timeout(server.timeout_s), session.post(f"{server.base_url}/{path}", json=body) as response:
        if response.status != 200:
            raise ServerFault(f"HTTP {response.status}: {_excerpt(await response.read())}")
        async for piece in response.content.iter_any():
            *lines, rest = (rest + piece).split(b"\n")
            stream.take(time.monotonic(), lines)
    if not stream.finished:
        raise ServerFault("the stream ended without a finish_reason")
    return stream


async def ask(session: aiohttp.ClientSession, server: Server, prompt: Prompt, run_began: float = 0.0) -> Outcome:
    """Send one request and read its answer to the end."""
    sent = time.monotonic()
    try:
        stream = await _stream(session, server, prompt)
    except TimeoutError:
        return Failed(sent - run_began, time.monotonic() - sent, f"no complete answer within {server.timeout_s:g} s")
    except (aiohttp.ClientError, ConnectionError, ServerFault) as fault:
        return Failed(sent - run_began, time.monotonic() - sent, f"{type(fault).__name__}: {fault}")
    ended = time.monotonic()
    usage = stream.usage or _Usage(completion_tokens=sum(count for _, count in stream.arrivals))
    return Answered(
        started_s=sent - run_began,
        ttft_s=(stream.arrivals[0][0] if stream.arrivals else ended) - sent,
        total_s=ended - sent,
        inter_token_s=stream.inter_token_s(usage.completion_tokens),
        prompt_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        asked_tokens=prompt.output_tokens,
        usage_reported=stream.usage is not None,
    )


def open_session(server: Server) -> aiohttp.ClientSession:
    headers = {"Authorization": f"Bearer {server.api_key}"} if server.api_key else {}
    return aiohttp.ClientSession(
        headers=headers,
        timeout=aiohttp.ClientTimeout(total=None),
        # a kept connection may be one that the server closes just now, which would count as its failure
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
    )


async def find_model(base_url: str, api_key: str) -> str:
    """The first model that the server names."""
    async with open_session(Server(base_url, "", api_key)) as session:
        try:
            async with session.get(f"{base_url}/models", timeout=aiohttp.ClientTimeout(total=10)) as response:
                text = await response.read()
        except (aiohttp.ClientError, TimeoutError) as fault:
            raise ServerFault(f"no answer from {base_url}/models: {fault}") from fault
    try:
        return msgspec.json.decode(text, type=_Models).data[0].id
    except (msgspec.DecodeError, IndexError) as fault:
        raise ServerFault(f"{base_url}/models names no model: {_excerpt(text)}") from fault


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


async def run_load(
    server: Server,
    prompts: Sequence[Prompt],
    pace: Pace,
    report: Callable[[Outcome], None] = lambda outcome: None,
    began: float | None = None,
) -> list[Outcome]:
    """Send all prompts at the pace; the outcomes come in the order of the prompts, their times since `began` or now."""
    began = time.monotonic() if began is None else began
    outcomes: dict[int, Outcome] = {}

    async def send(number: int) -> None:
        outcomes[number] = await ask(session, server, prompts[number], began)
        report(outcomes[number])

    async with open_session(server) as session, asyncio.TaskGroup() as tasks:
        match pace:
            case Streams(streams=streams):
                queue = iter(range(len(prompts)))
                for _ in range(min(streams, len(prompts))):
                    tasks.create_task(_one_after_another(queue, send))
            case Arrivals():
                async for number in _arrivals(pace, len(prompts)):
                    tasks.create_task(send(number))
    return [outcomes[number] for number in range(len(prompts))]


async def _one_after_another(queue: Iterator[int], send: Callable[[int], Awaitable[None]]) -> None:
    for number in queue:
        await send(number)


async def _arrivals(pace: Arrivals, count: int) -> AsyncIterator[int]:
    draw = random.Random(pace.seed)
    due = time.monotonic()
    for number in range(count):
        due += draw.expovariate(pace.per_s)
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        yield number
