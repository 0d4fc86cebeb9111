"""What clients may ask: the bodies of the POST endpoints, with the range of every number.

Fields unknown to this file are ignored. A field that would change the answer, but is not honoured yet, is declared
with the values that ask for nothing; any other value is refused, since ignoring it would break a promise. Lists fail
with their first wrong item, objects of too many keys unread: to tell of a million mistakes takes seconds and gigabytes.
"""

import reprlib
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Final, Literal, LiteralString, TypeAlias, TypeVar, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetPydanticSchema,
    ValidationError,
    ValidationInfo,
    WrapValidator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError
from pydantic_core.core_schema import with_info_after_validator_function

from tokenllm_schemas.errors import ApiError, invalid, unsupported

INT32_MAX, INT64_MAX = 2**31 - 1, 2**63 - 1
MAX_CHOICES_EACH = 8
MAX_CHOICES = MAX_PROMPTS = 128
MAX_INPUTS = 2048  # texts of one request for vectors
MAX_MESSAGES = 10_000
MAX_TOOLS, MAX_FUNCTION_NAME, MAX_DOCUMENTS = 512, 64, 512
MAX_STOP_STRINGS, MAX_STOP_LENGTH = 16, 1024
MAX_STOP_IDS = 64
MAX_LOGPROBS = 20
MAX_BIASED_TOKENS = 512  # that logit_bias, allowed_token_ids and bad_words name together
MAX_BAD_WORDS, MAX_BAD_WORD_LENGTH = 64, 128
MAX_METADATA, MAX_TEMPLATE_VARIABLES = 16, 128
USUAL_COMPLETION_TOKENS = 16  # OpenAI's, for /v1/completions only


def only(*harmless: object) -> GetPydanticSchema:
    """For a field that is not honoured yet: its only accepted values are these, which ask for nothing."""

    def check(value: object, field: ValidationInfo) -> object:
        if value is not None and not any(type(value) is type(one) and value == one for one in harmless):
            raise unsupported(str(field.field_name), f"{reprlib.repr(value)} is not supported by this server")
        return value

    return GetPydanticSchema(
        lambda source, handler: with_info_after_validator_function(check, handler(source)),
        lambda schema, handler: {"enum": [*harmless, None], "description": "Not supported yet; these ask for nothing."},
    )


def one_of(meaning: LiteralString) -> WrapValidator:
    """Say what a union accepts instead of what each of its members misses."""

    def check(value: object, handler: Any) -> object:
        try:
            return handler(value)
        except ValidationError as error:
            if any(detail["type"] not in SHAPE_ERRORS for detail in error.errors()):
                raise
            raise PydanticCustomError("union", "must be " + meaning) from None

    return WrapValidator(check)


def at_most(entries: int) -> WrapValidator:
    """For objects of any keys: they are counted before they are read, and all that is wrong in them is told."""

    def check(value: object, handler: Any) -> object:
        if isinstance(value, dict) and len(value) > entries:
            message = "may have at most {most} entries, not {got}"
            raise PydanticCustomError("too_long", message, {"most": entries, "got": len(value)})
        return handler(value)

    return WrapValidator(check)


def as_written(value: object, handler: Any) -> object:
    """Check a value, and keep it with all that the client wrote, in the client's order: a template may show it."""
    handler(value)
    return value


def functions_as_written(value: object, handler: Any) -> object:
    """The same for tools, all of which have to be functions."""
    for index, tool in enumerate(value if isinstance(value, list) else []):
        if isinstance(tool, dict) and isinstance(kind := tool.get("type"), str) and kind != "function":
            raise unsupported(f"tools[{index}].type", f"only functions are supported, not {reprlib.repr(kind)}")
    return as_written(value, handler)


def no_more_choices(value: object, handler: Any) -> object:
    """OpenAI allows more than this server promises."""
    if type(value) is int and value > MAX_CHOICES_EACH:
        raise unsupported("n", f"this server supports at most {MAX_CHOICES_EACH} choices (got {reprlib.repr(value)})")
    return handler(value)


SHAPE_ERRORS = {"string_type", "list_type", "int_type", "dict_type", "bool_type", "float_type"}
ONE_OR_MANY: Final = (
    "a string, a list of strings, a list of token ids, or a list of lists of token ids, none of them empty"
)
TEMPLATE_NAMES = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template"}

Temperature: TypeAlias = Annotated[float, Field(ge=0, le=2)]
TopP: TypeAlias = Annotated[float, Field(gt=0, le=1)]
TopK: TypeAlias = Annotated[int, Field(ge=-1, le=INT32_MAX, description="-1 and 0 mean all tokens.")]
Penalty: TypeAlias = Annotated[float, Field(ge=-2, le=2)]
RepetitionPenalty: TypeAlias = Annotated[float, Field(ge=0.01, le=100)]
TokenCount: TypeAlias = Annotated[int, Field(ge=1, le=INT32_MAX)]
Seed: TypeAlias = Annotated[int, Field(ge=-INT64_MAX - 1, le=INT64_MAX)]
CacheSalt: TypeAlias = Annotated[str, Field(min_length=1, max_length=256)]
Choices: TypeAlias = Annotated[int, Field(ge=1, le=MAX_CHOICES_EACH), WrapValidator(no_more_choices)]
Logprobs: TypeAlias = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
TokenId: TypeAlias = Annotated[int, Field(ge=0, le=INT32_MAX)]
TokenKey: TypeAlias = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$", description="A token id.")]
LogitBias: TypeAlias = Annotated[
    dict[TokenKey, Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_BIASED_TOKENS),
    at_most(MAX_BIASED_TOKENS),
]
BadWord: TypeAlias = Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_LENGTH)]
ServiceTier: TypeAlias = Literal["auto", "default", "flex", "scale", "priority", "fast"]
Metadata: TypeAlias = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=MAX_METADATA),
    at_most(MAX_METADATA),
]
Truncation: TypeAlias = Annotated[
    int, Field(ge=-1, le=INT32_MAX, description="Keep so many tokens of the prompt's end; -1: what the context holds.")
]
StopString: TypeAlias = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stop: TypeAlias = Annotated[
    StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)],
    one_of("a string or a list of strings"),
]
Text: TypeAlias = Annotated[str, Field(min_length=1)]
TokenIds: TypeAlias = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Prompt: TypeAlias = Annotated[
    Text
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    | TokenIds
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)],
    one_of(ONE_OR_MANY),
]

Input: TypeAlias = Annotated[
    Text
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
    | TokenIds
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)],
    one_of(ONE_OR_MANY),
]

TemplateValue: TypeAlias = Annotated[
    bool | int | float | str | Annotated[list[str], Field(fail_fast=True)] | None,
    one_of("true, false, null, a number, a string or a list of strings"),
]
TemplateVariables: TypeAlias = Annotated[
    dict[str, TemplateValue], Field(max_length=MAX_TEMPLATE_VARIABLES), at_most(MAX_TEMPLATE_VARIABLES)
]


class RequestBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True, protected_namespaces=())


class StreamOptions(RequestBody):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # in every chunk, so far


class ContentPart(RequestBody):
    type: str
    text: str | None = None
    refusal: str | None = None


Parts: TypeAlias = Annotated[list[ContentPart], Field(fail_fast=True)]


class FunctionCall(RequestBody):
    name: str
    arguments: Annotated[str | dict[str, Any], one_of("JSON in a string")]


class ToolCall(RequestBody):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(RequestBody):
    """One turn. `developer` is another word for `system`, and `function` for `tool`."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[str | Parts, one_of("a string or a list of text parts")] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    function_call: FunctionCall | None = Field(default=None, description="Deprecated: use tool_calls.")
    reasoning_content: str | None = None
    reasoning: str | None = Field(default=None, description="Another word for reasoning_content.")
    refusal: str | None = None

    def text(self) -> str:
        """All its text parts, one under the other."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text or part.refusal or "" for part in self.content or [])

    def calls(self) -> Sequence[ToolCall]:
        """The calls it makes, in whichever way it says so."""
        return self.tool_calls or ([ToolCall(function=self.function_call)] if self.function_call else [])


Messages: TypeAlias = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class FunctionDefinition(RequestBody):
    name: Annotated[str, Field(min_length=1, max_length=MAX_FUNCTION_NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChatTool(RequestBody):
    type: Literal["function"]
    function: FunctionDefinition


Tools: TypeAlias = Annotated[
    list[ChatTool], Field(max_length=MAX_TOOLS, fail_fast=True), WrapValidator(functions_as_written)
]
Functions: TypeAlias = Annotated[
    list[FunctionDefinition], Field(max_length=MAX_TOOLS, fail_fast=True), WrapValidator(as_written)
]


class TemplateFields(RequestBody):
    """What a chat template is given besides the messages."""

    tools: (
        Annotated[list[ChatTool], Field(max_length=MAX_TOOLS, fail_fast=True), WrapValidator(functions_as_written)]
        | None
    ) = Field(default=None, description="Shown to the model if its chat template knows tools.")
    documents: Annotated[list[dict[str, Any]], Field(max_length=MAX_DOCUMENTS)] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateVariables | None = Field(
        default=None, description="Variables of the chat template; those it does not mention are ignored."
    )
    chat_template: Annotated[Any, only()] = None

    @model_validator(mode="after")
    def _one_way_to_end(self) -> "TemplateFields":
        if self.add_generation_prompt and self.continue_final_message:
            raise invalid("continue_final_message", "and add_generation_prompt cannot both be true")
        return self

    @model_validator(mode="after")
    def _template_names_are_ours(self) -> "TemplateFields":
        for name in self.chat_template_kwargs or {}:
            if name in TEMPLATE_NAMES or name.endswith("_token"):
                raise invalid(f"chat_template_kwargs.{name}", "cannot be set here")
        return self

    def shown_tools(self) -> Sequence[dict[str, Any]]:
        """The definitions of the tools that the model may use, as the client wrote them."""
        return cast(Sequence[dict[str, Any]], self.tools or [])


class Generation(RequestBody):
    """What both generating endpoints share."""

    prompt_field: ClassVar[str]  # where what the model reads is written

    model: str
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    max_tokens: TokenCount | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    n: Choices | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    cache_salt: CacheSalt | None = None  # only requests with the same share what was computed of their prompts

    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: RepetitionPenalty | None = None
    repeat_penalty: RepetitionPenalty | None = Field(default=None, description="Another word for repetition_penalty.")
    logit_bias: LogitBias | None = None
    allowed_token_ids: Annotated[list[TokenId], Field(max_length=MAX_BIASED_TOKENS)] | None = None
    bad_words: Annotated[list[BadWord], Field(max_length=MAX_BAD_WORDS)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=INT32_MAX)] | None = None  # before a stop token; stop strings are heeded
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_IDS)] | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    truncate_prompt_tokens: Truncation | None = None
    prompt_logprobs: Annotated[Logprobs | Literal[False], one_of("a number of alternatives, 0 to 20")] | None = None
    priority: Annotated[int, Field(ge=-INT32_MAX, le=INT32_MAX, description="Lower ones go first.")] | None = None
    service_tier: ServiceTier | None = None
    metadata: Metadata | None = None

    structured_outputs: Annotated[Any, only()] = None
    guided_json: Annotated[Any, only()] = None
    guided_regex: Annotated[Any, only()] = None
    guided_grammar: Annotated[Any, only()] = None
    guided_choice: Annotated[Any, only()] = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> "Generation":
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "is only allowed together with stream: true")
        return self

    @model_validator(mode="after")
    def _tokens_are_as_many_as_asked(self) -> "Generation":
        most = self.token_limit()
        if self.min_tokens and most is not None and self.min_tokens > most:
            raise invalid("min_tokens", f"{self.min_tokens} are more than the {most} tokens that may be generated")
        check_truncation(self.truncate_prompt_tokens)
        return self

    @model_validator(mode="after")
    def _prompt_logprobs_do_not_stream(self) -> "Generation":
        if self.stream and self.asks_prompt_logprobs():
            raise invalid("prompt_logprobs", "is not available together with stream: true")
        return self

    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def choices_each(self) -> int:
        """How many answers to each prompt."""
        return self.n or 1

    def token_limit(self) -> int | None:
        """The most tokens to generate; None means as many as the context has room for."""
        raise NotImplementedError

    def alternatives(self) -> int | None:
        """How many alternatives to report for each token; None means no logprobs at all."""
        raise NotImplementedError

    def asks_prompt_logprobs(self) -> bool:
        return self.prompt_logprobs is not None and self.prompt_logprobs is not False

    def prompt_alternatives(self) -> int | None:
        """How many alternatives to report for each token of the prompt; None means no logprobs of it."""
        return self.prompt_logprobs if self.asks_prompt_logprobs() else None

    def echoes(self) -> bool:
        """Whether the prompt is part of the answer."""
        return False

    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def running_usage(self) -> bool:
        """Whether every chunk tells the usage so far."""
        return self.include_usage() and bool(self.stream_options and self.stream_options.continuous_usage_stats)


class ChatCompletionRequest(TemplateFields, Generation):
    """POST /v1/chat/completions"""

    prompt_field = "messages"

    messages: Messages
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    functions: (
        Annotated[list[FunctionDefinition], Field(max_length=MAX_TOOLS, fail_fast=True), WrapValidator(as_written)]
        | None
    ) = Field(default=None, description="Deprecated: use tools.")

    tool_choice: Annotated[Any, only("none", "auto")] = None
    function_call: Annotated[Any, only("none", "auto")] = None
    response_format: Annotated[Any, only({"type": "text"})] = None
    modalities: Annotated[Any, only([], ["text"])] = None
    audio: Annotated[Any, only()] = None
    web_search_options: Annotated[Any, only()] = None
    moderation: Annotated[Any, only()] = None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> "ChatCompletionRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs", "is only allowed together with logprobs: true")
        return self

    @model_validator(mode="after")
    def _contents_are_text(self) -> "ChatCompletionRequest":
        check_text(self.messages)
        return self

    def shown_tools(self) -> Sequence[dict[str, Any]]:
        """None if none may be called."""
        if "none" in (self.tool_choice, self.function_call):
            return []
        return super().shown_tools() or [{"type": "function", "function": one} for one in self.functions or []]

    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def alternatives(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None


class CompletionRequest(Generation):
    """POST /v1/completions"""

    prompt_field = "prompt"

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0, le=INT32_MAX, description="0 only with echo.")] | None = None
    logprobs: Logprobs | None = None
    echo: bool | None = None

    suffix: Annotated[Any, only("")] = None
    best_of: Annotated[Any, only(1)] = None

    @model_validator(mode="after")
    def _something_is_asked(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise invalid("max_tokens", "must be at least 1 without echo (got 0)")
        return self

    @model_validator(mode="after")
    def _choices_are_limited(self) -> "CompletionRequest":
        prompts, each = len(self.prompts()), self.choices_each()
        if prompts * each > MAX_CHOICES:
            raise invalid("n", f"{prompts} prompts with n {each} ask for more than {MAX_CHOICES} choices")
        return self

    def token_limit(self) -> int | None:
        return USUAL_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    def alternatives(self) -> int | None:
        return self.logprobs

    def prompt_alternatives(self) -> int | None:
        both = (super().prompt_alternatives(), self.logprobs if self.echo else None)
        return max((one for one in both if one is not None), default=None)

    def echoes(self) -> bool:
        return bool(self.echo)

    def prompts(self) -> Sequence[str | list[int]]:
        """The batch, of one or many."""
        return batch(self.prompt)


class EmbeddingRequest(RequestBody):
    """POST /v1/embeddings"""

    model: str
    input: Input = Field(description="A text, or a list of such: texts, or token ids. Each has a vector.")
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(json_schema_extra={"minimum": 1})] | None = None  # the model says how many
    user: str | None = None
    pooling: Literal["mean", "last"] | None = Field(
        default=None, description="Of which tokens' hidden states a vector is made: of all (usually), or of the last."
    )
    truncate_prompt_tokens: Truncation | None = None
    cache_salt: CacheSalt | None = None

    @model_validator(mode="after")
    def _something_is_left(self) -> "EmbeddingRequest":
        check_truncation(self.truncate_prompt_tokens)
        return self

    def inputs(self) -> Sequence[str | list[int]]:
        """The batch, of one or many."""
        return batch(self.input)


class TokenizeRequest(TemplateFields):
    """POST /tokenize: either a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one_of_the_two(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise invalid("prompt", "give either prompt or messages")
        check_text(self.messages or [])
        return self


class DetokenizeRequest(RequestBody):
    """POST /detokenize"""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


Body = TypeVar("Body", bound=RequestBody)


def parse(kind: type[Body], body: bytes) -> Body:
    """The request in `body`, or an ApiError that names the first field that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _client_error(max(error.errors(), key=_closeness)) from None


def batch(prompts: str | list[str] | list[int] | list[list[int]]) -> Sequence[str | list[int]]:
    """Prompts, of which one may have come without a list of its own."""
    alone = isinstance(prompts, str) or isinstance(prompts[0], int)
    return cast(Sequence[str | list[int]], [prompts] if alone else prompts)


def check_truncation(tokens: int | None) -> None:
    if tokens == 0:
        raise invalid("truncate_prompt_tokens", "must be -1 or at least 1 (got 0)")


def check_text(messages: list[ChatMessage]) -> None:
    """Every turn says something, in text."""
    for index, message in enumerate(messages):
        param = f"messages[{index}].content"
        if message.content is None and message.role != "assistant":
            raise invalid(param, f"is missing; a {message.role} message needs one")
        for part in message.content or [] if not isinstance(message.content, str) else []:
            if part.type not in ("text", "refusal"):
                raise unsupported(param, f"the model reads text only, not parts of type {reprlib.repr(part.type)}")
            if (part.text if part.type == "text" else part.refusal) is None:
                raise invalid(param, f"a {part.type} part needs a {part.type}")


def _closeness(detail: ErrorDetails) -> tuple[bool, int]:
    """Of the errors of a union: the members of the right shape came nearest to what was meant, and the deeper ones."""
    return detail["type"] not in SHAPE_ERRORS, len(detail["loc"])


def _client_error(detail: ErrorDetails) -> ApiError:
    if detail["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {detail.get('ctx', {}).get('error')}", "invalid_json")
    param = _path(detail["loc"])
    if detail["type"] == "missing":
        return invalid(param, "is required", "missing_required_parameter")
    return invalid(param or "body", f"{_lowered(detail['msg'])} (got {reprlib.repr(detail['input'])})")


def _path(location: tuple[int | str, ...]) -> str:
    """`messages[0].content` from a location of pydantic, which also names the members of unions it went through."""
    known = _field_names()
    names = [part for part in location if isinstance(part, int) or part in known]
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in names).removeprefix(".")


def _lowered(message: str) -> str:
    return message[:1].lower() + message[1:]


def _field_names(kind: type[RequestBody] = RequestBody) -> set[str]:
    """Those of all request bodies and of what they hold."""
    return set(kind.model_fields).union(*map(_field_names, kind.__subclasses__()))
