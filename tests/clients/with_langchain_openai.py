"""LangChain's chat model for servers that speak as OpenAI's does, on both of its ways: chats and responses."""

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
    near,
    refusal,
    run,
)
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import SecretStr


def model(name: str = MODEL, temperature: float = 0, max_tokens: int = 20, responses: bool = False) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=BASE_URL,
        api_key=SecretStr(API_KEY),
        model=name,
        temperature=temperature,
        max_tokens=max_tokens,  # type: ignore[call-arg]
        max_retries=0,
        use_responses_api=responses,
    )


def chat() -> None:
    answer = model().invoke(QUESTION)
    assert answer.text == ANSWER and answer.response_metadata["finish_reason"] == "stop"
    assert answer.usage_metadata and answer.usage_metadata["output_tokens"] > 0


def stream() -> None:
    assert "".join(chunk.text for chunk in model().stream(QUESTION)) == ANSWER


async def async_chat_and_stream() -> None:
    assert (await model().ainvoke(QUESTION)).text == ANSWER
    assert "".join([chunk.text async for chunk in model().astream(QUESTION)]) == ANSWER


def abort() -> None:
    with aborting():
        chunks = model(max_tokens=2000).stream(ENDLESS)
        assert len([next(chunks) for _ in range(5)]) == 5
        chunks.close()  # type: ignore[attr-defined]


def response() -> None:
    assert model(responses=True).invoke(QUESTION).text == ANSWER


def response_stream() -> None:
    assert "".join(chunk.text for chunk in model(responses=True).stream(QUESTION)) == ANSWER


def response_abort() -> None:
    with aborting():
        chunks = model(max_tokens=2000, responses=True).stream(ENDLESS)
        assert any(chunk.text for chunk in chunks)
        chunks.close()  # type: ignore[attr-defined]


def embeddings() -> None:
    # or it cuts long texts itself, into the tokens of OpenAI's models
    embedder = OpenAIEmbeddings(
        base_url=BASE_URL, api_key=SecretStr(API_KEY), model=MODEL, check_embedding_ctx_length=False
    )
    first, other = embedder.embed_documents([QUESTION, "Paris is a city."])
    assert near(first, embedder.embed_query(QUESTION)) and not near(first, other)


def bad_request() -> None:
    for responses in (False, True):
        with refusal(openai.BadRequestError, *TOO_HOT):
            model(temperature=5, responses=responses).invoke(QUESTION)
        with refusal(openai.BadRequestError, *TOO_HOT):
            list(model(temperature=5, responses=responses).stream(QUESTION))


def not_found() -> None:
    with refusal(openai.NotFoundError, *NO_SUCH_MODEL):
        model("nobody").invoke(QUESTION)


run(
    chat,
    stream,
    async_chat_and_stream,
    abort,
    response,
    response_stream,
    response_abort,
    embeddings,
    bad_request,
    not_found,
)
