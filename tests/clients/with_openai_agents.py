"""OpenAI's Agents SDK, with each of its models: responses, which it takes by itself, and chats."""

from collections.abc import Callable
from typing import Any, TypeAlias

import openai
from agents import (
    Agent,
    Model,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    set_tracing_disabled,
)
from client_checks import (
    ANSWER,
    API_KEY,
    BASE_URL,
    ENDLESS,
    MODEL,
    NO_SUCH_MODEL,
    QUESTION,
    TOO_HOT,
    async_aborting,
    refusal,
    run,
)

Kind: TypeAlias = Callable[[str, openai.AsyncOpenAI], Model]
CLIENT = openai.AsyncOpenAI(base_url=BASE_URL, api_key=API_KEY, max_retries=0)
KINDS: tuple[Kind, ...] = (OpenAIResponsesModel, OpenAIChatCompletionsModel)
set_tracing_disabled(True)


def agent(kind: Kind, name: str = MODEL, temperature: float = 0, max_tokens: int = 20) -> Agent[Any]:
    settings = ModelSettings(temperature=temperature, max_tokens=max_tokens)
    return Agent(name="guide", model=kind(name, CLIENT), model_settings=settings)


async def chat() -> None:
    for kind in KINDS:
        result = await Runner.run(agent(kind), QUESTION)
        assert result.final_output == ANSWER
        assert result.context_wrapper.usage.output_tokens > 0


async def second_turn() -> None:
    for kind in KINDS:
        first = await Runner.run(agent(kind), QUESTION)
        again: Any = [*first.to_input_list(), {"role": "user", "content": QUESTION}]
        assert (await Runner.run(agent(kind), again)).final_output


async def stream() -> None:
    for kind in KINDS:
        result = Runner.run_streamed(agent(kind), QUESTION)
        assert "".join([text async for text in deltas(result)]) == result.final_output == ANSWER


async def abort() -> None:
    for kind in KINDS:
        async with async_aborting():
            result = Runner.run_streamed(agent(kind, max_tokens=2000), ENDLESS)
            assert await anext(deltas(result))
            result.cancel()
            async for _ in result.stream_events():
                pass


async def deltas(result: Any) -> Any:
    async for event in result.stream_events():
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
            yield event.data.delta


async def bad_request() -> None:
    for kind in KINDS:
        with refusal(openai.BadRequestError, *TOO_HOT):
            await Runner.run(agent(kind, temperature=5), QUESTION)


async def not_found() -> None:
    for kind in KINDS:
        with refusal(openai.NotFoundError, *NO_SUCH_MODEL):
            await Runner.run(agent(kind, "nobody"), QUESTION)


run(chat, second_turn, stream, abort, bad_request, not_found)
