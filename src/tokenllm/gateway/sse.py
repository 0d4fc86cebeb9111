"""Server-sent events: how a stream is framed, and how a `Reply` becomes one.

What is the same in all chunks of a choice is serialised once; what waits when a stream wakes up is one write.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import msgspec
from starlette.types import Receive, Scope, Send

from tokenllm.gateway.circuit import Circuit
from tokenllm.gateway.patience import patience_of
from tokenllm.gateway.reply import Reply, Said, client_reason, joined, total_usage
from tokenllm.messages import Delta, Finish, Submit, TokenText
from tokenllm_schemas.errors import ApiError
from tokenllm_schemas.responses import FinishReason, Usage

SILENCE_S = 15.0
KEEP_ALIVE = b": still here\n\n"  # never first: some load tools take the first frame for the first token
DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
HOLE = msgspec.Raw(b"\0")  # JSON escapes every other zero byte

_encode = msgspec.json.Encoder().encode


def event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


class ChunkForm:
    """The chunks of one choice, with holes for their text and their logprobs."""

    def __init__(self, chunk: msgspec.Struct) -> None:
        self._before, self._between, self._after = event(_encode(chunk)).split(b"\0")
        self._without_logprobs = self._between + b"null" + self._after

    def fill(self, text: str, logprobs: msgspec.Struct | None) -> bytes:
        if logprobs is None:
            return self._before + _encode(text) + self._without_logprobs
        return b"".join((self._before, _encode(text), self._between, _encode(logprobs), self._after))


class Story(Protocol):
    """What one stream tells, as its endpoint words it."""

    silence: bytes  # a sign of life; never the first one

    def opening(self) -> bytes: ...
    def told(self, deltas: Sequence[tuple[int, Delta]]) -> bytes: ...
    def failure(self, error: ApiError) -> bytes: ...
    async def closing(self) -> bytes: ...


class EventStream:
    """An answer that is written while it comes to be."""

    def __init__(self, circuit: Circuit, submits: Sequence[Submit], story: Story) -> None:
        self._circuit = circuit
        self._submits = submits
        self._story = story

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = self._circuit.submit(self._submits, patience_of(scope))
        try:
            # a refusal that comes before anything else is a proper status, so the headers wait for it
            first = await reply.deltas(SILENCE_S)
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            ending = await self._follow(reply, self._story.opening() + self._story.told(first), send)
            await send({"type": "http.response.body", "body": ending, "more_body": False})
        finally:
            self._circuit.abandon(reply)

    async def _follow(self, reply: Reply, piece: bytes, send: Send) -> bytes:
        """Write piece after piece; the last is left to be written with the end of the stream."""
        story, silence = self._story, b""
        try:
            while reply.open:
                if piece:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                    if piece is not silence:
                        reply.written()
                    silence = story.silence
                deltas = await reply.deltas(SILENCE_S)
                piece = story.told(deltas) if deltas else silence
        except ApiError as error:
            return story.failure(error)
        return piece + await story.closing()


class Frames(Protocol):
    """The events of one stream of choices, as one endpoint words them."""

    def opening(self) -> bytes: ...
    def text(self, index: int, text: str, logprobs: Sequence[TokenText]) -> bytes: ...
    def finish(self, index: int, reason: FinishReason) -> bytes: ...
    def usage(self, usage: Usage) -> bytes: ...


class ChoicesStory:
    """Choices side by side, their usage if it is wanted, and [DONE]."""

    silence = KEEP_ALIVE

    def __init__(self, frames: Frames, choices_each: int, usage_wanted: bool) -> None:
        self._frames = frames
        self._choices_each = choices_each
        self._usage_wanted = usage_wanted
        self._finishes: dict[int, Finish] = {}

    def opening(self) -> bytes:
        return self._frames.opening()

    def told(self, deltas: Sequence[tuple[int, Delta]]) -> bytes:
        if len(deltas) == 1 and not deltas[0][1].finish:  # nearly always
            [(index, delta)] = deltas
            return self._frames.text(index, delta.text, delta.logprobs) if delta.text or delta.logprobs else b""
        return b"".join(part for said in joined(deltas) for part in self._parts(said))

    def failure(self, error: ApiError) -> bytes:
        return event(error.envelope()) + DONE

    async def closing(self) -> bytes:
        if not self._usage_wanted:
            return DONE
        return self._frames.usage(total_usage(self._finishes, self._choices_each)) + DONE

    def _parts(self, said: Said) -> Iterator[bytes]:
        if said.text or said.logprobs:
            yield self._frames.text(said.index, said.text, said.logprobs)
        if said.finish:
            self._finishes[said.index] = said.finish
            yield self._frames.finish(said.index, client_reason(said.finish))
