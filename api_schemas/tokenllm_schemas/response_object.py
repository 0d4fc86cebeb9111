"""What `/v1/responses` answers: the response object, the events of its stream, and lists of items.

The order of events is `created`, `in_progress`, `output_item.added`, `content_part.added`, deltas, and the same
backwards; the last is `completed`, `incomplete` or, after an `error`, `failed`.
"""

from typing import Any, Literal, TypeAlias

import msgspec

from tokenllm_schemas.responses import ChatTokenLogprob

Status: TypeAlias = Literal["in_progress", "completed", "incomplete", "failed"]
ErrorCode: TypeAlias = Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]


class OutputText(msgspec.Struct, frozen=True):
    text: str
    logprobs: list[ChatTokenLogprob] = []
    annotations: list[Any] = []
    type: Literal["output_text"] = "output_text"


class OutputMessage(msgspec.Struct, frozen=True):
    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]
    role: Literal["assistant"] = "assistant"
    type: Literal["message"] = "message"


class InputTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct, frozen=True):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int

    @classmethod
    def of(cls, input_tokens: int, cached_tokens: int, output_tokens: int) -> "ResponseUsage":
        total = input_tokens + output_tokens
        return cls(input_tokens, InputTokensDetails(cached_tokens), output_tokens, OutputTokensDetails(), total)


class ResponseError(msgspec.Struct, frozen=True):
    code: ErrorCode
    message: str


class IncompleteDetails(msgspec.Struct, frozen=True):
    reason: Literal["max_output_tokens"]


class EchoedTool(msgspec.Struct, frozen=True):
    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool
    type: Literal["function"] = "function"


class TextFormat(msgspec.Struct, frozen=True):
    type: Literal["text"] = "text"


class EchoedText(msgspec.Struct, frozen=True):
    verbosity: str
    format: TextFormat = TextFormat()


class EchoedReasoning(msgspec.Struct, frozen=True):
    effort: str | None
    summary: str | None


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked, with the values that were used where none were given, and what came of it."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    completed_at: int | None = None
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    model: str
    output: list[OutputMessage] = []
    usage: ResponseUsage | None = None
    instructions: str | None
    previous_response_id: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    prompt_cache_key: str | None
    reasoning: EchoedReasoning
    safety_identifier: str | None
    store: bool  # whether it can be retrieved: false also if there was no room for it
    temperature: float
    text: EchoedText
    tool_choice: Literal["none", "auto"]
    tools: list[EchoedTool]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    user: str | None
    background: Literal[False] = False
    service_tier: Literal["default"] = "default"


class NumberedEvent(msgspec.Struct, frozen=True, tag_field="type"):
    """One event of a stream. Those of a stream are numbered from 0."""

    sequence_number: int | msgspec.Raw


class ResponseEvent(NumberedEvent, frozen=True):
    """The response as it is then."""

    response: Response


class Created(ResponseEvent, frozen=True, tag="response.created"):
    pass


class InProgress(ResponseEvent, frozen=True, tag="response.in_progress"):
    pass


class Completed(ResponseEvent, frozen=True, tag="response.completed"):
    pass


class Incomplete(ResponseEvent, frozen=True, tag="response.incomplete"):
    pass


class Failed(ResponseEvent, frozen=True, tag="response.failed"):
    pass


class ItemEvent(NumberedEvent, frozen=True):
    item: OutputMessage
    output_index: int = 0


class ItemAdded(ItemEvent, frozen=True, tag="response.output_item.added"):
    pass


class ItemDone(ItemEvent, frozen=True, tag="response.output_item.done"):
    pass


class PartEvent(NumberedEvent, frozen=True):
    item_id: str
    part: OutputText
    output_index: int = 0
    content_index: int = 0


class PartAdded(PartEvent, frozen=True, tag="response.content_part.added"):
    pass


class PartDone(PartEvent, frozen=True, tag="response.content_part.done"):
    pass


class TextDelta(NumberedEvent, frozen=True, tag="response.output_text.delta"):
    item_id: str
    delta: str | msgspec.Raw
    logprobs: list[ChatTokenLogprob] | msgspec.Raw
    output_index: int = 0
    content_index: int = 0


class TextDone(NumberedEvent, frozen=True, tag="response.output_text.done"):
    item_id: str
    text: str
    logprobs: list[ChatTokenLogprob]
    output_index: int = 0
    content_index: int = 0


class StreamError(NumberedEvent, frozen=True, tag="error"):
    """The stream goes on with response.failed, and ends."""

    code: str
    message: str
    param: str | None


AnyEvent: TypeAlias = (
    Created
    | InProgress
    | ItemAdded
    | PartAdded
    | TextDelta
    | TextDone
    | PartDone
    | ItemDone
    | Completed
    | Incomplete
    | StreamError
    | Failed
)


class DeletedResponse(msgspec.Struct, frozen=True):
    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class ItemList(msgspec.Struct, frozen=True):
    """What a response was an answer to."""

    data: list[dict[str, Any]]
    first_id: str
    last_id: str
    has_more: bool
    object: Literal["list"] = "list"


class InputTokens(msgspec.Struct, frozen=True):
    input_tokens: int
    object: Literal["response.input_tokens"] = "response.input_tokens"
