"""From a validated request to what the scheduler is asked."""

import asyncio
import json
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from tokenllm.checkpoint.description import SamplingDefaults
from tokenllm.gateway.circuit import Circuit
from tokenllm.gateway.gateway import Gateway, room, sampling, tenant_of
from tokenllm.gateway.reply import Said, total_usage
from tokenllm.gateway.served_model import template_options
from tokenllm.messages import Finish, Ready, TokenText
from tokenllm_schemas.errors import ApiError
from tokenllm_schemas.requests import ChatCompletionRequest, parse


def body(**fields: Any) -> ChatCompletionRequest:
    messages = [{"role": "user", "content": "hi"}]
    return parse(ChatCompletionRequest, json.dumps({"model": "m", "messages": messages, **fields}).encode())


def test_the_clients_word_comes_first_then_the_models() -> None:
    recommended = SamplingDefaults(temperature=0.6, top_p=0.9, top_k=20)
    ours = sampling(body(), recommended, seed=1)
    assert (ours.temperature, ours.top_p, ours.top_k) == (0.6, 0.9, 20)
    theirs = sampling(body(temperature=0, top_p=0.5, top_k=0), recommended, seed=1)
    assert (theirs.temperature, theirs.top_p, theirs.top_k) == (0, 0.5, 0)
    assert sampling(body(top_k=-1), recommended, seed=1).top_k == 0
    usual = sampling(body(), SamplingDefaults(), seed=1)
    assert (usual.temperature, usual.top_p, usual.top_k) == (1, 1, 0)


def test_other_words_for_the_same() -> None:
    assert sampling(body(repeat_penalty=1.5), SamplingDefaults(), seed=1).repetition_penalty == 1.5
    assert template_options(body(verbosity="low")).variables == {"verbosity": "low"}
    kwargs = {"verbosity": "high", "x": 1}
    assert template_options(body(verbosity="low", chat_template_kwargs=kwargs)).variables == kwargs


@pytest.mark.parametrize(("tokens", "aside"), [(0, False), (1000, False), (1001, True)])
def test_long_answers_are_worded_beside_the_event_loop(tokens: int, aside: bool) -> None:
    async def scenario() -> None:
        gateway = Gateway(model=None, circuit=None, pages=(), max_queued_requests=0, responses=None)  # type: ignore[arg-type]
        said = [Said(0, "", (TokenText("a", b"a", -1.0),) * tokens, None)]
        assert (await gateway.worded(said, threading.get_ident) != threading.get_ident()) == aside

    asyncio.run(scenario())


def test_no_prompt_waits_for_what_is_done_aside() -> None:
    async def scenario() -> None:
        gateway = Gateway(model=None, circuit=None, pages=(), max_queued_requests=0, responses=None)  # type: ignore[arg-type]
        over = threading.Event()
        aside = [asyncio.create_task(gateway.aside(over.wait)) for _ in range(3)]
        await asyncio.sleep(0)
        assert await asyncio.wait_for(gateway.off_loop(pow, 2, 3), 5) == 8
        over.set()
        assert await asyncio.gather(*aside) == [True] * 3

    asyncio.run(scenario())


@given(st.integers(-(2**63), 2**63 + 7))
def test_every_seed_fits(seed: int) -> None:
    assert 0 <= sampling(body(), SamplingDefaults(), seed).seed < 2**63


@given(st.integers(1, 200), st.integers(1, 200), st.none() | st.integers(1, 300))
def test_prompt_and_completion_fit_the_context(prompt_tokens: int, max_model_len: int, wanted: int | None) -> None:
    asked = body(max_tokens=wanted)
    if prompt_tokens >= max_model_len:
        with pytest.raises(ApiError) as caught:
            room(prompt_tokens, max_model_len, asked)
        assert caught.value.code == "context_length_exceeded"
    else:
        granted = room(prompt_tokens, max_model_len, asked)
        assert 1 <= granted <= max_model_len - prompt_tokens
        assert granted == (wanted or granted) or prompt_tokens + granted == max_model_len


def test_a_prompt_without_a_token_is_refused() -> None:
    with pytest.raises(ApiError, match="messages: has no token the model knows") as caught:
        room(0, 10, body())
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "invalid_value", "messages")


def test_a_seeded_prompt_says_the_same_in_any_batch() -> None:
    def seeds(prompts: list[list[int]], **fields: Any) -> list[int]:
        circuit = Circuit(1, 7, page=None, on_ready=lambda ready: None)  # type: ignore[arg-type]
        circuit.ready = Ready(1, 1000, 100)
        model = SimpleNamespace(sampling=SamplingDefaults())
        gateway = Gateway(model=model, circuit=circuit, pages=(), max_queued_requests=0, responses=None)  # type: ignore[arg-type]
        return [submit.sampling.seed for submit in gateway.submits(body(**fields), prompts, 0.0, "")]

    assert seeds([[1], [2]], n=3, seed=7) == [7, 8, 9] * 2
    unseeded = seeds([[1], [1]], n=2)
    assert len({*unseeded}) == 4, "the same prompt twice is answered in two ways"


def test_a_tenant_is_who_shows_the_same_key() -> None:
    def tenant(**headers: str) -> str:
        raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        return tenant_of(Request({"type": "http", "headers": raw}))

    shown = [{"authorization": "Bearer a"}, {"authorization": "Bearer b"}, {"x_api_key": "a"}, {"x_api_key": "b"}, {}]
    assert len({tenant(**headers) for headers in shown}) == len(shown)
    assert tenant(x_api_key="a") == tenant(x_api_key="a", accept="*/*")
    assert tenant() == tenant(authorization="") == ""


def test_a_prompt_counts_once_however_many_choices_it_has() -> None:
    finishes = {index: Finish("stop", 10 + index // 2, index // 2, 3) for index in range(4)}  # 2 prompts, 2 choices
    usage = total_usage(finishes, choices_each=2)
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (21, 12, 33)
    assert usage.prompt_tokens_details.cached_tokens == 1
