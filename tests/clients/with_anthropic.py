"""Anthropic's SDK: messages, their streams, and how many tokens they would be."""

from typing import Any

import anthropic
from client_checks import (
    ANSWER,
    API_KEY,
    ENDLESS,
    MODEL,
    NO_SUCH_MODEL,
    QUESTION,
    SERVER,
    TOO_HOT,
    aborting,
    async_aborting,
    refusal,
    run,
)

CLIENT = anthropic.Anthropic(base_url=SERVER, api_key=API_KEY, max_retries=0, timeout=60)
USER: Any = {"role": "user", "content": QUESTION}
ASKED: Any = {"model": MODEL, "messages": [USER], "max_tokens": 20, "extra_body": {"temperature": 0}}
ENDLESSLY: Any = {"model": MODEL, "messages": [{"role": "user", "content": ENDLESS}], "max_tokens": 2000}


def text(message: Any) -> str:
    [block] = message.content
    return block.text


def chat() -> None:
    message = CLIENT.messages.create(**ASKED)
    assert text(message) == ANSWER
    assert (message.stop_reason, message.role, message.model) == ("end_turn", "assistant", MODEL)
    assert CLIENT.messages.create(**ASKED | {"max_tokens": 2}).stop_reason == "max_tokens"


def count_tokens() -> None:
    counted = CLIENT.messages.count_tokens(model=MODEL, messages=[USER])
    usage = CLIENT.messages.create(**ASKED).usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def stream() -> None:
    events: Any = list(CLIENT.messages.create(**ASKED, stream=True))
    assert "".join(event.delta.text for event in events if event.type == "content_block_delta") == ANSWER
    assert (events[0].type, events[-1].type) == ("message_start", "message_stop")


def stream_helper() -> None:
    with CLIENT.messages.stream(**ASKED, system="Answer in one sentence.") as events:
        said = "".join(events.text_stream)
        final = events.get_final_message()
    assert said == text(final) and said and final.usage.output_tokens > 0


def abort() -> None:
    with aborting(), CLIENT.messages.stream(**ENDLESSLY) as events:
        assert next(iter(events.text_stream))


async def async_chat_and_abort() -> None:
    async with anthropic.AsyncAnthropic(base_url=SERVER, api_key=API_KEY, max_retries=0) as client:
        assert text(await client.messages.create(**ASKED)) == ANSWER
        async with async_aborting(), client.messages.stream(**ENDLESSLY) as events:
            assert await anext(aiter(events.text_stream))


def bad_request() -> None:
    for more in ({}, {"stream": True}):
        with refusal(anthropic.BadRequestError, *TOO_HOT):
            CLIENT.messages.create(**ASKED | {"extra_body": {"temperature": 5}} | more)


def not_found() -> None:
    with refusal(anthropic.NotFoundError, *NO_SUCH_MODEL):
        CLIENT.messages.create(**ASKED | {"model": "nobody"})
    with refusal(anthropic.NotFoundError, *NO_SUCH_MODEL):
        CLIENT.messages.count_tokens(model="nobody", messages=[USER])


run(chat, count_tokens, stream, stream_helper, abort, async_chat_and_abort, bad_request, not_found)
