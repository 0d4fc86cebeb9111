"""The OpenAI SDK for Python: its plain calls and its typed helpers, for chats and for responses."""

from typing import Any

import openai
from client_checks import (
    ANSWER,
    API_KEY,
    BASE_URL,
    ENDLESS,
    MODEL,
    NO_SUCH_MODEL,
    QUESTION,
    TOO_HOT,
    aborting,
    async_aborting,
    near,
    refusal,
    run,
)

CLIENT = openai.OpenAI(base_url=BASE_URL, api_key=API_KEY, max_retries=0, timeout=60)
USER: Any = {"role": "user", "content": QUESTION}
ASKED: Any = {"model": MODEL, "messages": [USER], "temperature": 0, "max_tokens": 20}
ENDLESSLY: Any = {"model": MODEL, "messages": [{"role": "user", "content": ENDLESS}], "max_tokens": 2000}
RESPOND: Any = {"model": MODEL, "input": QUESTION, "temperature": 0, "max_output_tokens": 20}


def chat() -> None:
    answer = CLIENT.chat.completions.create(**ASKED)
    assert answer.choices[0].message.content == ANSWER
    assert (answer.choices[0].finish_reason, answer.model) == ("stop", MODEL)
    assert answer.usage and answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def stream() -> None:
    *chunks, last = CLIENT.chat.completions.create(**ASKED, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    assert chunks[-1].choices[0].finish_reason == "stop" and last.usage


def stream_helper() -> None:
    with CLIENT.chat.completions.stream(**ASKED) as events:
        deltas = [event.delta for event in events if event.type == "content.delta"]
        final = events.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content == ANSWER


def completion() -> None:
    text = CLIENT.completions.create(model=MODEL, prompt="One, two, three,", max_tokens=4, temperature=0)
    assert "four" in text.choices[0].text


def abort() -> None:
    with aborting():
        chunks = CLIENT.chat.completions.create(**ENDLESSLY, stream=True)
        assert len([next(chunks) for _ in range(5)]) == 5
        chunks.close()


async def async_chat_and_abort() -> None:
    async with openai.AsyncOpenAI(base_url=BASE_URL, api_key=API_KEY, max_retries=0) as client:
        answer = await client.chat.completions.create(**ASKED)
        assert answer.choices[0].message.content == ANSWER
        async with async_aborting(), await client.chat.completions.create(**ENDLESSLY, stream=True) as chunks:
            assert (await anext(chunks)).choices and (await anext(chunks)).choices


def response() -> None:
    first = CLIENT.responses.create(**RESPOND)
    assert (first.output_text, first.status) == (ANSWER, "completed")
    second = CLIENT.responses.create(**RESPOND | {"input": "Are you sure?"}, previous_response_id=first.id)
    assert second.usage and first.usage and second.usage.input_tokens > first.usage.input_tokens
    assert CLIENT.responses.retrieve(first.id).output_text == ANSWER
    CLIENT.responses.delete(first.id)


def response_stream_helper() -> None:
    with CLIENT.responses.stream(**RESPOND) as events:
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
        final = events.get_final_response()
    assert "".join(deltas) == final.output_text == ANSWER


def response_abort() -> None:
    with aborting():
        events = CLIENT.responses.create(model=MODEL, input=ENDLESS, max_output_tokens=2000, stream=True)
        assert "response.output_text.delta" in (event.type for event in events)
        events.close()


def models() -> None:
    [model] = CLIENT.models.list().data
    assert model.id == MODEL and CLIENT.models.retrieve(MODEL) == model


def embeddings() -> None:
    texts = [QUESTION, "Paris is a city.", QUESTION]
    first, other, same = (one.embedding for one in CLIENT.embeddings.create(model=MODEL, input=texts).data)
    assert near(first, same) and not near(first, other)
    [floats] = CLIENT.embeddings.create(model=MODEL, input=QUESTION, encoding_format="float").data
    assert near(first, floats.embedding)


def bad_request() -> None:
    for more in ({}, {"stream": True}):
        with refusal(openai.BadRequestError, *TOO_HOT):
            CLIENT.chat.completions.create(**ASKED | {"temperature": 5} | more)
    with refusal(openai.BadRequestError, *TOO_HOT):
        CLIENT.responses.create(**RESPOND | {"temperature": 5})


def not_found() -> None:
    with refusal(openai.NotFoundError, *NO_SUCH_MODEL):
        CLIENT.chat.completions.create(**ASKED | {"model": "nobody"})
    with refusal(openai.NotFoundError, *NO_SUCH_MODEL):
        CLIENT.models.retrieve("nobody")


run(
    chat,
    stream,
    stream_helper,
    completion,
    abort,
    async_chat_and_abort,
    response,
    response_stream_helper,
    response_abort,
    models,
    embeddings,
    bad_request,
    not_found,
)
