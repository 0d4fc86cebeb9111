"""From the items of `/v1/responses` to the chat that they are: whoever renders a chat renders a response's prompt.

Also how items are written into the store, and become a conversation again.
"""

from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import msgspec

from tokenllm.gateway.response_store import Stored
from tokenllm.gateway.served_model import ServedModel, template_options
from tokenllm_schemas.errors import ApiError
from tokenllm_schemas.requests import ChatCompletionRequest, parse
from tokenllm_schemas.response_request import (
    ITEMS,
    FunctionCallItem,
    FunctionCallOutputItem,
    InputItem,
    ItemPart,
    MessageItem,
    OtherItem,
    ReasoningItem,
    ResponsePrompt,
    ResponseRequest,
)

ID_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


class ResponseAsChat(ChatCompletionRequest):
    prompt_field = "input"


def as_chat_that_fits(
    model: ServedModel, body: ResponsePrompt, items: Sequence[InputItem], max_model_len: int
) -> ResponseAsChat:
    """Takes long if the oldest turns may have to be left out."""
    chat = as_chat(model.name, body, items)
    if body.truncation != "auto":
        return chat
    reserved = min(chat.token_limit() or max_model_len // 4, max_model_len // 2)
    return _shortened(model, chat, max_model_len - reserved)


def as_chat(model: str, body: ResponsePrompt, items: Sequence[InputItem]) -> ResponseAsChat:
    """The same question in the words of `/v1/chat/completions`."""
    asked = {
        "model": model,
        "messages": _messages(body.instructions, items),
        "tools": [_tool(tool.model_dump(exclude_none=True)) for tool in body.tools or []],
        "tool_choice": body.tool_choice,
        "reasoning_effort": body.reasoning and body.reasoning.effort,
        "verbosity": body.text and body.text.verbosity,
        **(_manner(body) if isinstance(body, ResponseRequest) else {}),
    }
    return parse(ResponseAsChat, msgspec.json.encode({key: value for key, value in asked.items() if value is not None}))


def _manner(body: ResponseRequest) -> dict[str, Any]:
    return {
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "logprobs": body.wants_logprobs(),
        "top_logprobs": (body.top_logprobs or 0) if body.wants_logprobs() else None,
    }


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    return {"type": tool.pop("type"), "function": tool}


def _messages(instructions: str | None, items: Sequence[InputItem]) -> list[dict[str, Any]]:
    """One message for each turn: what a model thought and which functions it called belong to what it said."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    thought = ""
    for item in items:
        match item:
            case MessageItem():
                messages.append({"role": item.role, "content": _words(item.content), **_reasoning(thought)})
            case FunctionCallItem():
                if thought or not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": "", **_reasoning(thought)})
                messages[-1].setdefault("tool_calls", []).append(_call(item))
            case FunctionCallOutputItem():
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _words(item.output)})
        thought = _words(item.content or item.summary or []) if isinstance(item, ReasoningItem) else ""
    return _with_one_system_message(messages)


def _call(item: FunctionCallItem) -> dict[str, Any]:
    return {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": item.arguments}}


def _reasoning(thought: str) -> dict[str, str]:
    return {"reasoning_content": thought} if thought else {}


def _words(content: str | list[ItemPart]) -> str:
    return content if isinstance(content, str) else "\n".join(part.words() for part in content)


def _with_one_system_message(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Instructions and the system messages that follow them are one: many templates know only a first one."""
    leading = list(takewhile(lambda message: message["role"] in ("system", "developer"), messages))
    if not leading:
        return messages
    return [{"role": "system", "content": "\n\n".join(one["content"] for one in leading)}, *messages[len(leading) :]]


def _shortened(model: ServedModel, chat: ResponseAsChat, most_tokens: int) -> ResponseAsChat:
    """Without as many of the oldest turns as there is no room for; each begins with a user's message."""
    head = [message for message in chat.messages[:1] if message.role == "system"]
    starts = [i for i, message in enumerate(chat.messages) if message.role == "user"]
    endings = [chat.messages, *([*head, *chat.messages[start:]] for start in starts[1:])]

    def fits(place: int) -> bool:
        shorter = chat.model_copy(update={"messages": endings[place]})
        size = sum(len(message.text().encode()) for message in shorter.messages)
        if size > most_tokens * model.longest_token:  # to tokenize it would take long
            return False
        return len(model.chat_prompt(shorter.messages, chat.shown_tools(), template_options(chat))) <= most_tokens

    place = bisect_left(range(len(endings) - 1), True, key=fits)
    return chat.model_copy(update={"messages": endings[place]})


@contextmanager
def named_as_asked() -> Iterator[None]:
    """The client wrote no `messages`."""
    try:
        yield
    except ApiError as error:
        if not (error.param or "").startswith("messages"):
            raise
        message = f"input: {error.message.partition(': ')[2] or error.message}"
        raise ApiError(error.status, message, error.code, param="input") from None


class _Answer(msgspec.Struct):
    output: msgspec.Raw


def conversation(stored: Stored) -> list[InputItem]:
    """What a response was an answer to, and the answer."""
    answer = msgspec.json.decode(stored.answer, type=_Answer)
    return ITEMS.validate_json(stored.items) + ITEMS.validate_json(bytes(answer.output))


def items_named(stored: Stored, ids: Collection[str]) -> tuple[dict[str, InputItem], int]:
    """Those of its items that have these ids, and how many bytes they are."""
    named = {item.id: item for item in conversation(stored) if not isinstance(item, OtherItem) and item.id in ids}
    return {id: item for id, item in named.items() if id}, sum(len(one.model_dump_json()) for one in named.values())


def listed(items: Sequence[InputItem], key: str) -> bytes:
    """The items as they are stored and shown: each has an id, and contents are lists of parts."""
    return msgspec.json.encode([_shown(item, f"{key}i{index}") for index, item in enumerate(items)])


def _shown(item: InputItem, key: str) -> dict[str, Any]:
    shown = item.model_dump(exclude_none=True)
    if isinstance(shown.get("content"), str):
        shown["content"] = [_part(shown["role"], shown["content"])]
    return {"id": f"{ID_PREFIXES[shown['type']]}_{key}", "status": "completed", **shown}


def _part(role: str, text: str) -> dict[str, Any]:
    if role == "assistant":
        return {"type": "output_text", "text": text, "annotations": []}
    return {"type": "input_text", "text": text}
