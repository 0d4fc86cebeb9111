"""What Anthropic's clients ask at `/v1/messages`, what they are answered, and how they are told of errors.

The rules are those of `requests.py`. A request is put into the words of `/v1/chat/completions`; there is one way from a
conversation to a prompt.
"""

import json
from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec
from pydantic import Field

from tokenllm_schemas.errors import ApiError
from tokenllm_schemas.requests import (
    MAX_MESSAGES,
    MAX_STOP_STRINGS,
    ChatCompletionRequest,
    RequestBody,
    StopString,
    Temperature,
    TokenCount,
    TopK,
    TopP,
    one_of,
    only,
    parse,
)

ERROR_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}
StopReason: TypeAlias = Literal["end_turn", "max_tokens", "stop_sequence"]


class TextBlock(RequestBody):
    type: Literal["text"]
    text: str


TextBlocks: TypeAlias = Annotated[list[TextBlock], Field(fail_fast=True)]


class ToolUseBlock(RequestBody):
    """The assistant asked for a tool."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResultBlock(RequestBody):
    """What the tool returned."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Annotated[str | TextBlocks, one_of("a string or a list of text blocks")] = ""


class ThinkingBlock(RequestBody):
    """What the assistant thought: it is not shown to the model again."""

    type: Literal["thinking", "redacted_thinking"]


Block: TypeAlias = Annotated[TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock, Field(discriminator="type")]
Blocks: TypeAlias = Annotated[list[Block], Field(fail_fast=True)]


class Turn(RequestBody):
    role: Literal["user", "assistant"]
    content: Annotated[str | Blocks, one_of("a string or a list of blocks")]

    def as_chat(self) -> Iterator[dict[str, Any]]:
        """Results of tools are messages of their own there, and uses of tools are not content."""
        if isinstance(self.content, str):
            yield {"role": self.role, "content": self.content}
            return
        yield from (_result(block) for block in self.content if isinstance(block, ToolResultBlock))
        texts = [_part(block) for block in self.content if isinstance(block, TextBlock)]
        calls = [_call(block) for block in self.content if isinstance(block, ToolUseBlock)]
        if texts or calls or not any(isinstance(block, ToolResultBlock) for block in self.content):
            yield {"role": self.role, "content": texts or "", **({"tool_calls": calls} if calls else {})}


class Tool(RequestBody):
    type: Literal["custom"] | None = None
    name: Annotated[str, Field(min_length=1, max_length=128)]
    description: str | None = None
    input_schema: dict[str, Any] = Field(description="JSON Schema of the tool's input.")

    def as_chat(self) -> dict[str, Any]:
        described = {} if self.description is None else {"description": self.description}
        function = {"name": self.name, **described, "parameters": self.input_schema}
        return {"type": "function", "function": function}


class ToolChoice(RequestBody):
    type: Annotated[Literal["auto", "none"], Field(description="`any` and `tool` are not supported yet.")]


class OutputConfig(RequestBody):
    format: Annotated[Any, only()] = None


class CountTokensRequest(RequestBody):
    """POST /v1/messages/count_tokens"""

    model: str
    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: Annotated[str | TextBlocks, one_of("a string or a list of text blocks")] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = Field(
        default=None, description="Shown to a model whose template knows of tools."
    )
    tool_choice: ToolChoice | None = None

    def as_chat(self) -> ChatCompletionRequest:
        """The same question in the words of `/v1/chat/completions`."""
        return parse(ChatCompletionRequest, json.dumps(self._asked()).encode())

    def _asked(self) -> dict[str, Any]:
        turns = [message for turn in self.messages for message in turn.as_chat()]
        asked: dict[str, Any] = {"model": self.model, "messages": [*self._system(), *turns]}
        if self.tools:
            asked["tools"] = [tool.as_chat() for tool in self.tools]
            asked["tool_choice"] = self.tool_choice.type if self.tool_choice else "auto"
        return asked

    def _system(self) -> list[dict[str, Any]]:
        if not self.system:
            return []
        return [{"role": "system", "content": self.system if isinstance(self.system, str) else _parts(self.system)}]


class MessagesRequest(CountTokensRequest):
    """POST /v1/messages"""

    max_tokens: TokenCount
    stop_sequences: Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    stream: bool | None = None
    output_config: OutputConfig | None = None
    output_format: Annotated[Any, only()] = None
    mcp_servers: Annotated[Any, only([])] = None
    container: Annotated[Any, only()] = None

    def _asked(self) -> dict[str, Any]:
        same = {name: getattr(self, name) for name in ("max_tokens", "temperature", "top_p", "top_k", "stream")}
        manner = {**same, "stop": self.stop_sequences or None}
        return {**super()._asked(), **{name: value for name, value in manner.items() if value is not None}}


def _part(block: TextBlock) -> dict[str, str]:
    return {"type": "text", "text": block.text}


def _parts(blocks: list[TextBlock]) -> list[dict[str, str]]:
    return [_part(block) for block in blocks]


def _call(block: ToolUseBlock) -> dict[str, Any]:
    arguments = json.dumps(block.input, ensure_ascii=False)
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}


def _result(block: ToolResultBlock) -> dict[str, Any]:
    content = block.content if isinstance(block.content, str) else _parts(block.content)
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}


class AnthropicUsage(msgspec.Struct, frozen=True):
    input_tokens: int  # beside the cached ones
    output_tokens: int
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0


class AnthropicText(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    text: str


class AnthropicMessage(msgspec.Struct, frozen=True, tag_field="type", tag="message"):
    id: str
    model: str
    content: list[AnthropicText]
    stop_reason: StopReason | None  # null in `message_start` alone
    stop_sequence: str | None  # null also if several were given
    usage: AnthropicUsage
    role: Literal["assistant"] = "assistant"


class TokenCountAnswer(msgspec.Struct, frozen=True):
    input_tokens: int


class StreamEvent(msgspec.Struct, frozen=True, tag_field="type"):
    """An event; its name is also its type."""


class MessageStart(StreamEvent, frozen=True, tag="message_start"):
    message: AnthropicMessage


class ContentBlockStart(StreamEvent, frozen=True, tag="content_block_start"):
    content_block: AnthropicText
    index: int = 0


class TextDelta(msgspec.Struct, frozen=True, tag_field="type", tag="text_delta"):
    text: str | msgspec.Raw


class ContentBlockDelta(StreamEvent, frozen=True, tag="content_block_delta"):
    delta: TextDelta
    index: int = 0


class ContentBlockStop(StreamEvent, frozen=True, tag="content_block_stop"):
    index: int = 0


class Ending(msgspec.Struct, frozen=True):
    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(StreamEvent, frozen=True, tag="message_delta"):
    delta: Ending
    usage: AnthropicUsage


class MessageStop(StreamEvent, frozen=True, tag="message_stop"):
    pass


class Ping(StreamEvent, frozen=True, tag="ping"):
    pass


class AnthropicErrorBody(msgspec.Struct, frozen=True):
    type: str
    message: str


class AnthropicError(StreamEvent, frozen=True, tag="error"):
    """The body of every answer from 400 upwards on these paths, and the error event of a stream."""

    error: AnthropicErrorBody

    @classmethod
    def of(cls, error: ApiError) -> "AnthropicError":
        return cls(AnthropicErrorBody(ERROR_TYPES.get(error.status, "invalid_request_error"), error.message))
