"""What `/v1/responses` may be asked: items of a conversation, old and new, and how to answer them.

The rules are those of `requests.py`. Of items, the kinds are read that a model which only reads and writes text can
have to do with.
"""

import reprlib
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag, TypeAdapter, model_validator

from tokenllm_schemas.errors import invalid, unsupported
from tokenllm_schemas.requests import (
    MAX_FUNCTION_NAME,
    MAX_TOOLS,
    Logprobs,
    Metadata,
    RequestBody,
    Temperature,
    TokenCount,
    TopP,
    only,
)

MAX_ITEMS = 10_000
LOGPROBS_INCLUDED = "message.output_text.logprobs"
TEXT_PARTS = {"input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text"}

Id: TypeAlias = Annotated[str, Field(min_length=1, max_length=128)]
Status: TypeAlias = Literal["in_progress", "completed", "incomplete"]


def _string_or_list(value: Any) -> str:
    return "a string" if isinstance(value, str) else "a list"


class ItemPart(RequestBody):
    """A piece of text; a `refusal` is one too."""

    type: str
    text: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None

    def words(self) -> str:
        return (self.refusal if self.type == "refusal" else self.text) or ""


Parts: TypeAlias = Annotated[list[ItemPart], Field(fail_fast=True)]
Content: TypeAlias = Annotated[
    Annotated[str, Tag("a string")] | Annotated[Parts, Tag("a list")], Discriminator(_string_or_list)
]


class MessageItem(RequestBody):
    """One turn. `type` may be left out."""

    type: Literal["message"] = "message"
    id: Id | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    status: Status | None = None


class FunctionCallItem(RequestBody):
    """A model asked for a function."""

    type: Literal["function_call"]
    id: Id | None = None
    call_id: Id
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str = Field(description="JSON.")
    status: Status | None = None


class FunctionCallOutputItem(RequestBody):
    """What the function returned."""

    type: Literal["function_call_output"]
    id: Id | None = None
    call_id: Id
    output: Content
    status: Status | None = None


class ReasoningItem(RequestBody):
    """What a model thought before it spoke. Thoughts that only their author can decrypt are passed over."""

    type: Literal["reasoning"]
    id: Id | None = None
    summary: Parts | None = None
    content: Parts | None = None
    encrypted_content: str | None = None
    status: Status | None = None


class ItemReference(RequestBody):
    """The id of an item of a stored response, in the place of the item. `type` may be left out."""

    type: Literal["item_reference"] | None = None
    id: Id


class OtherItem(RequestBody):
    """Of a kind that is refused by its name."""

    type: Any


def _kind(item: Any) -> str:
    """The tag of the item's class; only where it has no type is it told by what it has."""
    given = item if isinstance(item, dict) else getattr(item, "__dict__", {})
    match given.get("type"):
        case None if "role" in given:
            return "a message"
        case None if "id" in given:
            return "a reference"
        case str(kind) if kind in TAGS:
            return TAGS[kind]
        case _:
            return "another"


TAGS = {
    "message": "a message",
    "function_call": "a call",
    "function_call_output": "an output",
    "reasoning": "a thought",
    "item_reference": "a reference",
}
InputItem: TypeAlias = Annotated[
    Annotated[MessageItem, Tag("a message")]
    | Annotated[FunctionCallItem, Tag("a call")]
    | Annotated[FunctionCallOutputItem, Tag("an output")]
    | Annotated[ReasoningItem, Tag("a thought")]
    | Annotated[ItemReference, Tag("a reference")]
    | Annotated[OtherItem, Tag("another")],
    Discriminator(_kind),
]
Items: TypeAlias = Annotated[list[InputItem], Field(max_length=MAX_ITEMS, fail_fast=True)]
Input: TypeAlias = Annotated[
    Annotated[str, Tag("a string")] | Annotated[Items, Tag("a list")], Discriminator(_string_or_list)
]
ITEMS: TypeAdapter[list[InputItem]] = TypeAdapter(list[InputItem])


class FunctionTool(RequestBody):
    """Its name, purpose and parameters stand here, and not one level below as in chat completions."""

    type: Any
    name: Annotated[str, Field(min_length=1, max_length=MAX_FUNCTION_NAME)] | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="A JSON schema.")
    strict: bool | None = None


class TextConfig(RequestBody):
    format: Any = Field(default=None, description='{"type": "text"} is all that is supported.')
    verbosity: Literal["low", "medium", "high"] | None = None

    @model_validator(mode="after")
    def _format_is_text(self) -> "TextConfig":
        if self.format not in (None, {"type": "text"}):
            raise unsupported("text.format", f"{reprlib.repr(self.format)} is not supported by this server")
        return self


class Reasoning(RequestBody):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class ResponseStreamOptions(RequestBody):
    include_obfuscation: bool | None = None


class ResponsePrompt(RequestBody):
    """What the model is to read."""

    input: Input | None = None
    instructions: str | None = None
    previous_response_id: Id | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["auto", "disabled"] | None = Field(
        default=None, description="auto leaves out the oldest turns of what is longer than the context."
    )
    parallel_tool_calls: bool | None = None

    tool_choice: Annotated[Any, only("none", "auto")] = None
    conversation: Annotated[Any, only()] = None

    @model_validator(mode="after")
    def _items_are_text(self) -> "ResponsePrompt":
        for param, part in _parts(self.items()):
            if part.type not in TEXT_PARTS:
                raise unsupported(param, f"the model reads text only, not parts of type {reprlib.repr(part.type)}")
            if (part.refusal if part.type == "refusal" else part.text) is None:
                raise invalid(param, f"a part of type {part.type} needs its text", "missing_required_parameter")
        return self

    @model_validator(mode="after")
    def _items_are_known(self) -> "ResponsePrompt":
        for index, item in enumerate(self.items()):
            if isinstance(item, OtherItem):
                raise unsupported(f"input[{index}].type", f"{reprlib.repr(item.type)} is not supported by this server")
        return self

    @model_validator(mode="after")
    def _tools_are_functions(self) -> "ResponsePrompt":
        for index, tool in enumerate(self.tools or []):
            if tool.type != "function":
                raise unsupported(f"tools[{index}].type", f"{reprlib.repr(tool.type)} is not supported by this server")
            if tool.name is None:
                raise invalid(f"tools[{index}].name", "is required", "missing_required_parameter")
        return self

    @model_validator(mode="after")
    def _there_is_something_to_answer(self) -> "ResponsePrompt":
        if not self.input and not self.previous_response_id:
            raise invalid("input", "is required and must not be empty", "missing_required_parameter")
        return self

    def items(self) -> list[InputItem]:
        """What is new in the conversation."""
        if isinstance(self.input, str):
            return [MessageItem(role="user", content=self.input)]
        return self.input or []


class ResponseRequest(ResponsePrompt):
    """POST /v1/responses"""

    model: str
    max_output_tokens: TokenCount | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_logprobs: Logprobs | None = None
    include: Annotated[list[str], Field(fail_fast=True)] | None = Field(
        default=None, description=f"Of these, {LOGPROBS_INCLUDED} changes the answer."
    )
    metadata: Metadata | None = Field(default=None, description="Is echoed.")
    store: bool | None = Field(default=None, description="false keeps nothing of the response; true is the default.")
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None
    service_tier: str | None = None

    background: Annotated[Any, only(False)] = None
    prompt: Annotated[Any, only()] = None
    moderation: Annotated[Any, only()] = None
    context_management: Annotated[Any, only([])] = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> "ResponseRequest":
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "is only allowed together with stream: true")
        return self

    def wants_logprobs(self) -> bool:
        return bool(self.top_logprobs) or LOGPROBS_INCLUDED in (self.include or [])


class InputTokensRequest(ResponsePrompt):
    """POST /v1/responses/input_tokens"""

    model: str | None = None


def _parts(items: list[InputItem]) -> Iterator[tuple[str, ItemPart]]:
    """Every part of every item, and how its client would name it."""
    for index, item in enumerate(items):
        for field in ("content", "output", "summary"):
            parts = getattr(item, field, None)
            for place, part in enumerate(parts if isinstance(parts, list) else []):
                yield f"input[{index}].{field}[{place}]", part
