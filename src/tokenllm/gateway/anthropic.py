"""The endpoints of Anthropic's clients: a chat like the others, asked and answered in their words."""

import time
from typing import NamedTuple, TypeAlias

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from tokenllm.gateway.circuit import Circuit
from tokenllm.gateway.endpoints import all_said, chat_prompt, chat_submits, json_answer
from tokenllm.gateway.gateway import Gateway
from tokenllm.gateway.patience import patience_of
from tokenllm.gateway.reply import Reply, Said, client_reason, joined
from tokenllm.gateway.sse import HEADERS, HOLE, SILENCE_S, event
from tokenllm.messages import Finish, Submit
from tokenllm_schemas.anthropic import (
    AnthropicError,
    AnthropicMessage,
    AnthropicText,
    AnthropicUsage,
    ContentBlockDelta,
    ContentBlockStart,
    ContentBlockStop,
    CountTokensRequest,
    Ending,
    MessageDelta,
    MessagesRequest,
    MessageStart,
    MessageStop,
    Ping,
    StopReason,
    StreamEvent,
    TextDelta,
    TokenCountAnswer,
)
from tokenllm_schemas.errors import ApiError

MessageEvent: TypeAlias = (
    MessageStart
    | ContentBlockStart
    | Ping
    | ContentBlockDelta
    | ContentBlockStop
    | MessageDelta
    | MessageStop
    | AnthropicError
)


class Wording(NamedTuple):
    """What an answer repeats of its question."""

    id: str
    model: str
    prompt_tokens: int
    stop: tuple[str, ...]

    def whole(self, said: Said) -> AnthropicMessage:
        assert said.finish, "a whole answer has an end"
        ending = self.ending(said.finish)
        content = [AnthropicText(said.text)] if said.text else []
        return AnthropicMessage(
            self.id, self.model, content, ending.stop_reason, ending.stop_sequence, _usage(said.finish)
        )

    def begun(self) -> AnthropicMessage:
        return AnthropicMessage(self.id, self.model, [], None, None, AnthropicUsage(self.prompt_tokens, 0))

    def ending(self, finish: Finish) -> Ending:
        reason = _stop_reason(finish)
        # which of several it was, the gateway is not told
        only_one = self.stop[0] if reason == "stop_sequence" and len(self.stop) == 1 else None
        return Ending(reason, only_one)


async def create_message(gateway: Gateway, request: Request) -> ASGIApp:
    arrived_s = time.monotonic()
    body = await gateway.read(MessagesRequest, request)
    chat = await gateway.off_loop(body.as_chat)
    [submit] = await chat_submits(gateway, request, chat, arrived_s)
    wording = Wording(gateway.head("msg").id, body.model, len(submit.prompt) // 4, chat.stop_strings())
    if body.stream:
        return MessageStream(gateway.circuit, submit, wording)
    [said] = await all_said(gateway, request, [submit])
    return json_answer(wording.whole(said))


async def count_message_tokens(gateway: Gateway, request: Request) -> ASGIApp:
    body = await gateway.read(CountTokensRequest, request)
    chat = await gateway.off_loop(body.as_chat)
    return json_answer(TokenCountAnswer(len(await chat_prompt(gateway, chat))))


class MessageStream:
    """An answer that is written while it comes to be: one block of text."""

    def __init__(self, circuit: Circuit, submit: Submit, wording: Wording) -> None:
        self._circuit = circuit
        self._submit = submit
        self._wording = wording

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = self._circuit.submit([self._submit], patience_of(scope))
        try:
            # a refusal that comes before anything else is a proper status, so the headers wait for it
            first = joined(await reply.deltas(SILENCE_S))
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            await self._write(send, _named(MessageStart(self._wording.begun())) + BLOCK_START)
            reply.written()
            ending = await self._follow(reply, first, send)
            await send({"type": "http.response.body", "body": ending, "more_body": False})
        finally:
            self._circuit.abandon(reply)

    async def _follow(self, reply: Reply, said: list[Said], send: Send) -> bytes:
        """Write what is said; how it ends is left to be written with the end of the stream."""
        try:
            while not (said and said[-1].finish):
                if text := "".join(one.text for one in said):
                    await self._write(send, _text(text))
                    reply.written()
                elif not said:
                    await self._write(send, PING)
                said = joined(await reply.deltas(SILENCE_S))
        except ApiError as error:
            return _named(AnthropicError.of(error))
        return self._ending(said[-1])

    def _ending(self, said: Said) -> bytes:
        assert said.finish, "it is the last word"
        text = _text(said.text) if said.text else b""
        ended = MessageDelta(self._wording.ending(said.finish), _usage(said.finish))
        return text + BLOCK_STOP + _named(ended) + _named(MessageStop())

    async def _write(self, send: Send, piece: bytes) -> None:
        await send({"type": "http.response.body", "body": piece, "more_body": True})


def _named(message: StreamEvent) -> bytes:
    return b"event: " + str(message.__struct_config__.tag).encode() + b"\n" + event(msgspec.json.encode(message))


BLOCK_START = _named(ContentBlockStart(AnthropicText("")))
BLOCK_STOP = _named(ContentBlockStop())
PING = _named(Ping())
BEFORE_TEXT, AFTER_TEXT = _named(ContentBlockDelta(TextDelta(HOLE))).split(b"\0")


def _text(text: str) -> bytes:
    return BEFORE_TEXT + msgspec.json.encode(text) + AFTER_TEXT


def _stop_reason(finish: Finish) -> StopReason:
    if client_reason(finish) == "length":
        return "max_tokens"
    return "stop_sequence" if finish.by_stop_string else "end_turn"


def _usage(finish: Finish) -> AnthropicUsage:
    computed = finish.prompt_tokens - finish.cached_tokens
    return AnthropicUsage(computed, finish.completion_tokens, cache_read_input_tokens=finish.cached_tokens)
