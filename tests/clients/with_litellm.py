"""LiteLLM, which tells a server that speaks as OpenAI's does by the prefix of its model's name."""

import os
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it looks for prices in the internet when it is imported

import litellm
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

litellm.suppress_debug_info = True
SERVER: Any = {"api_base": BASE_URL, "api_key": API_KEY, "max_retries": 0}
ASKED: Any = {
    **SERVER,
    "model": f"openai/{MODEL}",
    "messages": [{"role": "user", "content": QUESTION}],
    "temperature": 0,
    "max_tokens": 20,
}
ENDLESSLY: Any = ASKED | {"messages": [{"role": "user", "content": ENDLESS}], "max_tokens": 2000, "stream": True}
RESPOND: Any = {
    **SERVER,
    "model": f"openai/{MODEL}",
    "input": QUESTION,
    "temperature": 0,
    "max_output_tokens": 20,
}


def chat() -> None:
    answer: Any = litellm.completion(**ASKED)
    assert answer.choices[0].message.content == ANSWER
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def stream() -> None:
    chunks: Any = list(litellm.completion(**ASKED, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
    assert chunks[-1].usage.completion_tokens > 0


def abort() -> None:
    with aborting():
        chunks: Any = litellm.completion(**ENDLESSLY)
        assert len([next(chunks) for _ in range(5)]) == 5
        chunks.completion_stream.close()


async def async_chat_and_abort() -> None:
    answer: Any = await litellm.acompletion(**ASKED)
    assert answer.choices[0].message.content == ANSWER
    async with async_aborting():
        chunks: Any = await litellm.acompletion(**ENDLESSLY)
        assert await anext(chunks) and await anext(chunks)
        await chunks.aclose()


def response() -> None:
    assert litellm.responses(**RESPOND).output_text == ANSWER  # type: ignore[union-attr]


def response_stream() -> None:
    events: Any = list(litellm.responses(**RESPOND, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == ANSWER
    assert events[-1].type == "response.completed"


def embedding() -> None:
    answer: Any = litellm.embedding(**SERVER, model=f"openai/{MODEL}", input=[QUESTION, "Paris is a city.", QUESTION])
    first, other, same = (one["embedding"] for one in answer.data)
    assert near(first, same) and not near(first, other)


def bad_request() -> None:
    for more in ({}, {"stream": True}):
        with refusal(litellm.BadRequestError, *TOO_HOT):
            litellm.completion(**ASKED | {"temperature": 5} | more)


def not_found() -> None:
    with refusal(litellm.NotFoundError, *NO_SUCH_MODEL):
        litellm.completion(**ASKED | {"model": "openai/nobody"})


run(chat, stream, abort, async_chat_and_abort, response, response_stream, embedding, bad_request, not_found)
