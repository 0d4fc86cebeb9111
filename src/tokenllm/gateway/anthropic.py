"""The endpoints of Anthropic's clients: a chat like the others, asked and answered in their words."""

import time
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp

from tokenllm.gateway.endpoints import all_said, chat_prompt, chat_submits, json_answer
from tokenllm.gateway.gateway import Gateway
from tokenllm.gateway.reply import Said, client_reason
from tokenllm.gateway.sse import HOLE, EventStream, event
from tokenllm.messages import Delta, Finish
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
        return EventStream(gateway.circuit, [submit], MessageStory(wording))
    [said] = await all_said(gateway, request, [submit])
    return json_answer(wording.whole(said))


async def count_message_tokens(gateway: Gateway, request: Request) -> ASGIApp:
    body = await gateway.read(CountTokensRequest, request)
    chat = await gateway.off_loop(body.as_chat)
    return json_answer(TokenCountAnswer(len(await chat_prompt(gateway, chat))))


class MessageStory:
    """A message as a stream tells it: one block of text."""

    def __init__(self, wording: Wording) -> None:
        self.silence = PING
        self._wording = wording
        self._finish: Finish | None = None

    def opening(self) -> bytes:
        return _named(MessageStart(self._wording.begun())) + BLOCK_START

    def told(self, deltas: Sequence[tuple[int, Delta]]) -> bytes:
        self._finish = deltas[-1][1].finish if deltas else None
        text = "".join(delta.text for _, delta in deltas)
        return BEFORE_TEXT + msgspec.json.encode(text) + AFTER_TEXT if text else b""

    def failure(self, error: ApiError) -> bytes:
        return _named(AnthropicError.of(error))

    async def closing(self) -> bytes:
        assert self._finish, "a stream that did not fail has an end"
        ended = MessageDelta(self._wording.ending(self._finish), _usage(self._finish))
        return BLOCK_STOP + _named(ended) + _named(MessageStop())


def _named(message: StreamEvent) -> bytes:
    return b"event: " + str(message.__struct_config__.tag).encode() + b"\n" + event(msgspec.json.encode(message))


BLOCK_START = _named(ContentBlockStart(AnthropicText("")))
BLOCK_STOP = _named(ContentBlockStop())
PING = _named(Ping())
BEFORE_TEXT, AFTER_TEXT = _named(ContentBlockDelta(TextDelta(HOLE))).split(b"\0")


def _stop_reason(finish: Finish) -> StopReason:
    if client_reason(finish) == "length":
        return "max_tokens"
    return "stop_sequence" if finish.by_stop_string else "end_turn"


def _usage(finish: Finish) -> AnthropicUsage:
    computed = finish.prompt_tokens - finish.cached_tokens
    return AnthropicUsage(computed, finish.completion_tokens, cache_read_input_tokens=finish.cached_tokens)
