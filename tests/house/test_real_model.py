"""The whole server with the embedded model and the official client: what it says, how it streams, whom it lets go."""

import json
import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from house import REAL, House, eventually

REFERENCE = json.loads((Path(__file__).parents[1] / "data" / "smollm2_reference.json").read_text())["refs"]
MODEL = "smollm2-135m-instruct"
# how near two tokens may be before either is right, and how far logprobs may be off, in each precision
PRECISIONS = {"float32": (0.001, 1e-3), "auto": (0.03, 0.02)}


@pytest.fixture(scope="module", params=PRECISIONS)
def house(
    request: pytest.FixtureRequest, default_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[House]:
    flags = ["--port", "0", "--max-total-tokens", "20000", "--max-model-len", "2048", "--dtype", request.param]
    house = House([*REAL, *flags], tmp_path_factory.mktemp("real") / "server.log")
    house.precision = PRECISIONS[request.param]  # type: ignore[attr-defined]
    try:
        yield house.wait_greeted()
    finally:
        house.raze()


@pytest.fixture(scope="module")
def client(house: House) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{house.url}/v1", api_key="none", max_retries=0)


def messages(text: str) -> Any:
    return [{"role": "user", "content": text}]


def greedy(client: openai.OpenAI, text: str, tokens: int = 64, **more: Any) -> Any:
    return client.chat.completions.create(
        model=MODEL, messages=messages(text), max_tokens=tokens, temperature=0, **more
    )


def streamed(client: openai.OpenAI, text: str, tokens: int = 64, **more: Any) -> str:
    chunks = greedy(client, text, tokens, stream=True, **more)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


@pytest.fixture(params=["alone", "while 16 others run"])
def company(request: pytest.FixtureRequest, house: House, client: openai.OpenAI) -> Iterator[None]:
    """Others that run for as long as the test does."""
    others = [
        greedy(client, f"Tell me story {number}.", 1000, stream=True, extra_body={"ignore_eos": True})
        for number in range(16 if request.param != "alone" else 0)
    ]
    eventually("all run", lambda: house.metrics()["tokenllm_requests_running"] == len(others), 20)
    yield
    still_running = house.metrics()["tokenllm_requests_running"]
    for other in others:
        other.close()
    assert still_running == len(others)
    eventually("all have left", lambda: house.metrics()["tokenllm_requests_running"] == 0, 5)


@pytest.mark.usefixtures("company")
@pytest.mark.parametrize("reference", [0, 2, 3])
def test_says_what_transformers_says(house: House, client: openai.OpenAI, reference: int) -> None:
    check_against(REFERENCE[reference], house, client)


def check_against(reference: dict[str, Any], house: House, client: openai.OpenAI) -> None:
    margin, tolerance = house.precision  # type: ignore[attr-defined]
    answer = greedy(client, reference["prompt"], len(reference["output_ids"]), logprobs=True, top_logprobs=2)
    assert answer.usage.prompt_tokens == len(reference["prompt_ids"])
    told = answer.choices[0].logprobs.content
    near_ties = [step for step, top in enumerate(reference["top5"]) if top[0][1] - top[1][1] < margin]
    certain = min([*near_ties, len(reference["output_ids"])])
    assert certain > 7, "too little to compare"
    for step in range(certain):
        assert told[step].logprob == pytest.approx(reference["top5"][step][0][1], abs=tolerance), f"step {step}"
    if certain == len(reference["output_ids"]):
        assert answer.choices[0].finish_reason == reference["finish"]
        assert answer.usage.completion_tokens == len(reference["output_ids"])


def test_a_stream_says_what_a_whole_answer_says(client: openai.OpenAI) -> None:
    for reference in REFERENCE[:3]:
        whole = greedy(client, reference["prompt"], 32).choices[0].message.content
        assert streamed(client, reference["prompt"], 32) == whole
        cut = whole.find("a")
        assert streamed(client, reference["prompt"], 32, stop="a") == (whole[:cut] if cut >= 0 else whole)


def test_thirty_two_streams_at_once_all_finish(house: House, client: openai.OpenAI) -> None:
    started = threading.Barrier(32)

    def one(number: int) -> tuple[str, int]:
        started.wait()
        chunks = list(greedy(client, f"Count from {number}.", 24, stream=True, stream_options={"include_usage": True}))
        reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
        assert len(reasons) == 1
        return reasons[0], chunks[-1].usage.completion_tokens

    with ThreadPoolExecutor(32) as pool:
        ends = list(pool.map(one, range(32)))
    assert all(reason == "stop" or (reason, tokens) == ("length", 24) for reason, tokens in ends)
    eventually("all tokens are free", lambda: house.metrics()["tokenllm_kv_tokens_active"] == 0, 2)


def test_a_client_that_leaves_frees_its_tokens_and_nobody_notices(house: House, client: openai.OpenAI) -> None:
    prompts = [reference["prompt"] for reference in REFERENCE[:3]]
    alone = [streamed(client, prompt, 48) for prompt in prompts]

    leaving = greedy(client, "Tell me everything about the sea.", 1500, stream=True, extra_body={"ignore_eos": True})
    next(leaving)
    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(streamed, client, prompt, 48) for prompt in prompts]
        eventually("all run", lambda: house.metrics()["tokenllm_requests_running"] >= 2, 10)
        aborted = house.metrics()['tokenllm_requests_finished_total{reason="abort"}']
        leaving.close()
        left = time.monotonic()
        eventually(
            "the abort",
            lambda: house.metrics()['tokenllm_requests_finished_total{reason="abort"}'] == aborted + 1,
            within_s=1,
        )
        assert time.monotonic() - left < 1
        assert [other.result() for other in others] == alone
    eventually("all tokens are free", lambda: house.metrics()["tokenllm_kv_tokens_active"] == 0, 1)
    metrics = house.metrics()
    free, cached = metrics["tokenllm_kv_tokens_free"], metrics["tokenllm_kv_tokens_cached"]
    assert free + cached == metrics["tokenllm_kv_tokens_capacity"] == 20000


def test_equal_prompts_that_arrive_together_are_computed_once(house: House, client: openai.OpenAI) -> None:
    """P tokens for the first and one for each of its twins: the rest they share, and say so."""
    text, computed = "Sixty-four ask the same at once. " * 20, "tokenllm_prompt_tokens_computed_total"
    before = house.metrics()[computed]
    with ThreadPoolExecutor(64) as threads:
        answers = list(threads.map(lambda _: greedy(client, text, 8), range(64)))
    prompt = answers[0].usage.prompt_tokens
    assert prompt > 100
    assert house.metrics()[computed] - before <= prompt + 64
    cached = sorted(answer.usage.prompt_tokens_details.cached_tokens for answer in answers)
    assert cached[1:] == [prompt - 1] * 63
    assert len({answer.choices[0].message.content for answer in answers}) == 1


def test_a_long_shared_prefix_is_waited_for_once(house: House, client: openai.OpenAI) -> None:
    """Whoever comes later computes its own words alone, and has its first token as soon as if there were no others."""

    def first_token(text: str) -> tuple[float, int]:
        """How long it took, and how many prompt tokens were computed for it."""
        began, before = time.monotonic(), house.metrics()["tokenllm_prompt_tokens_computed_total"]
        chunks = greedy(client, text, 1, stream=True)
        next(chunk for chunk in chunks if chunk.choices and chunk.choices[0].delta.content)
        took = time.monotonic() - began
        chunks.close()
        return took, house.metrics()["tokenllm_prompt_tokens_computed_total"] - before

    shared = "Whoever wants to know what the sea says has to listen for a long time. " * 110
    first_s, first = first_token(shared + "Why?")
    _, own = first_token("Why?")
    later = [first_token(shared + end) for end in ("Where?", "Who?", "Since when?")]
    assert first > 1700
    assert max(computed for _, computed in later) <= own + 8
    assert min(took for took, _ in later) < first_s / 5


def test_seeds_and_choices(house: House, client: openai.OpenAI) -> None:
    def choices() -> list[str]:
        answer = client.chat.completions.create(
            model=MODEL, messages=messages("Invent a name."), max_tokens=12, n=3, seed=7, top_p=0.7
        )
        return [choice.message.content for choice in answer.choices]

    first = choices()
    assert len(set(first)) > 1
    # among likely tokens: what a batch rounds differently moves the edges, and those of rare ones lie close together
    if house.precision == PRECISIONS["float32"]:  # type: ignore[attr-defined]
        assert choices() == first


def test_penalties_change_what_is_said(client: openai.OpenAI) -> None:
    prompt = client.completions.create(model=MODEL, prompt="a a a a a a a a", max_tokens=16, temperature=0)
    punished = client.completions.create(
        model=MODEL, prompt="a a a a a a a a", max_tokens=16, temperature=0, frequency_penalty=2, presence_penalty=2
    )
    assert prompt.choices[0].text != punished.choices[0].text


def test_clear_words_for_bad_input(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-4' does not exist"):
        client.chat.completions.create(model="gpt-4", messages=messages("Hi"))
    with pytest.raises(openai.BadRequestError, match="2048") as error:
        client.completions.create(model=MODEL, prompt=[5] * 2048, max_tokens=1)
    assert (error.value.code, error.value.param) == ("context_length_exceeded", "prompt")


def test_vectors_of_texts(house: House, client: openai.OpenAI) -> None:
    """They are those of each text alone, whatever else is read in the same steps; nothing is left of them."""
    texts = ["The cat sits on the mat.", "A", "word " * 1200, "A cat is sitting on a mat."]
    generated = house.metrics()["tokenllm_generation_tokens_total"]
    for pooling in ("mean", "last"):

        def embed(given: Any, pooling: str = pooling, **more: Any) -> Any:
            return client.embeddings.create(model=MODEL, input=given, extra_body={"pooling": pooling}, **more)

        together = embed(texts)
        alone = [embed(text) for text in texts]
        assert together.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone) > 1200
        for index, (one, other) in enumerate(zip(together.data, alone, strict=True)):
            assert one.index == index and len(one.embedding) == 576
            assert math.hypot(*one.embedding) == pytest.approx(1, abs=1e-5)
            assert one.embedding == pytest.approx(other.data[0].embedding, abs=1e-3)
        cat, _, _, other_cat = (one.embedding for one in together.data)
        assert math.dist(cat, other_cat) > 0.01
        [short] = embed(texts[0], dimensions=10).data
        length = math.hypot(*cat[:10])
        assert short.embedding == pytest.approx([value / length for value in cat[:10]], abs=1e-3)
    assert house.metrics()["tokenllm_generation_tokens_total"] == generated
    assert house.metrics()["tokenllm_kv_tokens_active"] == 0
    assert house.metrics()["tokenllm_requests_running"] == 0


def test_who_leaves_before_the_vectors_come_lets_go(house: House, client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIError):  # the client has had enough, unless the server says so first
        client.with_options(timeout=0.5).embeddings.create(model=MODEL, input=["word " * 1800] * 20)
    eventually("nothing is held", lambda: house.metrics()["tokenllm_kv_tokens_active"] == 0, 5)
    assert len(client.embeddings.create(model=MODEL, input="still there").data) == 1
