"""How `/v1/responses` words its answers: the response object, and the events of its stream in their order."""

import time
from collections.abc import Sequence
from itertools import count

import msgspec

from tokenllm.gateway.chat import chat_logprobs
from tokenllm.gateway.reply import Said, client_reason
from tokenllm.gateway.sse import HOLE, event
from tokenllm.messages import Finish, Submit, TokenText
from tokenllm_schemas.errors import ApiError
from tokenllm_schemas.response_object import (
    Completed,
    Created,
    EchoedReasoning,
    EchoedText,
    EchoedTool,
    ErrorCode,
    Failed,
    Incomplete,
    IncompleteDetails,
    InProgress,
    ItemAdded,
    ItemDone,
    NumberedEvent,
    OutputMessage,
    OutputText,
    PartAdded,
    PartDone,
    Response,
    ResponseError,
    ResponseUsage,
    StreamError,
    TextDelta,
    TextDone,
)
from tokenllm_schemas.response_request import FunctionTool, Reasoning, ResponseRequest
from tokenllm_schemas.responses import ChatTokenLogprob


def begun(body: ResponseRequest, id: str, submit: Submit) -> Response:
    """A response of which nothing has been said yet."""
    reasoning = body.reasoning or Reasoning()
    return Response(
        id=id,
        created_at=int(time.time()),
        status="in_progress",
        model=body.model,
        instructions=body.instructions,
        previous_response_id=body.previous_response_id,
        max_output_tokens=body.max_output_tokens,
        max_tool_calls=body.max_tool_calls,
        metadata=body.metadata or {},
        parallel_tool_calls=body.parallel_tool_calls is not False,
        prompt_cache_key=body.prompt_cache_key,
        reasoning=EchoedReasoning(reasoning.effort, reasoning.summary),
        safety_identifier=body.safety_identifier,
        store=body.store is not False,
        temperature=submit.sampling.temperature,
        text=EchoedText((body.text and body.text.verbosity) or "medium"),
        tool_choice=body.tool_choice or "auto",
        tools=[_echoed(tool) for tool in body.tools or []],
        top_logprobs=body.top_logprobs or 0,
        top_p=submit.sampling.top_p,
        truncation=body.truncation or "disabled",
        user=body.user,
    )


def ended(response: Response, said: Said) -> Response:
    """The same with what was said."""
    incomplete = client_reason(said.finish) == "length"
    return msgspec.structs.replace(
        response,
        status="incomplete" if incomplete else "completed",
        completed_at=None if incomplete else int(time.time()),
        incomplete_details=IncompleteDetails("max_output_tokens") if incomplete else None,
        output=[_message(response, said, incomplete)],
        usage=_usage(said.finish) if said.finish else None,
    )


class ResponseFrames:
    """The events of one stream."""

    def __init__(self, response: Response) -> None:
        self._response = response
        self._numbers = count()
        self._item_id = item_id(response.id)
        delta = TextDelta(HOLE, self._item_id, HOLE, HOLE)
        self._before, self._then, self._between, self._after = _framed(delta).split(b"\0")

    def opening(self) -> bytes:
        return b"".join(
            (
                self._event(Created, self._response),
                self._event(InProgress, self._response),
                self._event(ItemAdded, OutputMessage(self._item_id, "in_progress", [])),
                self._event(PartAdded, self._item_id, OutputText("")),
            )
        )

    def text(self, text: str, logprobs: Sequence[TokenText]) -> bytes:
        encode = msgspec.json.encode
        number, listed = encode(next(self._numbers)), encode(_logprobs(logprobs))
        return b"".join((self._before, number, self._then, encode(text), self._between, listed, self._after))

    def closing(self, response: Response) -> bytes:
        [message] = response.output
        [part] = message.content
        return b"".join(
            (
                self._event(TextDone, self._item_id, part.text, part.logprobs),
                self._event(PartDone, self._item_id, part),
                self._event(ItemDone, message),
                self._event(Completed if response.status == "completed" else Incomplete, response),
            )
        )

    def failure(self, error: ApiError) -> bytes:
        told = ResponseError(_error_code(error), error.message)
        failed = msgspec.structs.replace(self._response, status="failed", error=told, store=False)
        told_first = self._event(StreamError, error.code, error.message, error.param)
        return told_first + self._event(Failed, failed)

    def _event(self, kind: type[NumberedEvent], *what: object) -> bytes:
        return _framed(kind(next(self._numbers), *what))


def _framed(numbered: NumberedEvent) -> bytes:
    return f"event: {numbered.__struct_config__.tag}\n".encode() + event(msgspec.json.encode(numbered))


def item_id(response_id: str) -> str:
    """Of the message that a response consists of."""
    return f"msg_{response_id.removeprefix('resp_')}o0"


def _message(response: Response, said: Said, incomplete: bool) -> OutputMessage:
    part = OutputText(said.text, _logprobs(said.logprobs))
    return OutputMessage(item_id(response.id), "incomplete" if incomplete else "completed", [part])


def _logprobs(tokens: Sequence[TokenText]) -> list[ChatTokenLogprob]:
    return chat_logprobs(tokens).content


def _usage(finish: Finish) -> ResponseUsage:
    return ResponseUsage.of(finish.prompt_tokens, finish.cached_tokens, finish.completion_tokens)


def _echoed(tool: FunctionTool) -> EchoedTool:
    return EchoedTool(tool.name or "", tool.description, tool.parameters, tool.strict is not False)


def _error_code(error: ApiError) -> ErrorCode:
    """Of the few that a response knows."""
    match error.status:
        case 429:
            return "rate_limit_exceeded"
        case 400:
            return "invalid_prompt"
        case _:
            return "server_error"
