"""`/v1/embeddings` as clients ask for it: the official one, and by hand where that one would not."""

import base64
from typing import Any

import numpy as np
import openai
import pytest
from fake_generation import HIDDEN, MODEL_LEN, MODEL_NAME, GatewayUnderTest, eventually


def embed(client: openai.OpenAI, **fields: object) -> Any:
    return client.embeddings.create(**{"model": MODEL_NAME, **fields})


def vector(length: int, last: int, pooling: float = 1.0, dimensions: int = HIDDEN) -> np.ndarray:
    """What the fake generation makes of a prompt, brought to length one."""
    whole = np.zeros(HIDDEN)
    whole[:3] = length, last, pooling
    return (whole / np.linalg.norm(whole[:dimensions]))[:dimensions]


def refusal(client: openai.OpenAI, **fields: object) -> Any:
    with pytest.raises(openai.BadRequestError) as caught:
        embed(client, **fields)
    assert caught.value.body["param"] in caught.value.body["message"]  # type: ignore[index]
    return caught.value


def test_the_client_gets_numbers_of_its_usual_base64(client: openai.OpenAI, gateway: GatewayUnderTest) -> None:
    answer = embed(client, input=[5, 6, 7], user="somebody")
    assert (answer.object, answer.model) == ("list", MODEL_NAME)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (3, 3)
    [one] = answer.data
    assert (one.object, one.index) == ("embedding", 0)
    assert one.embedding == pytest.approx(vector(3, 7), abs=1e-6)
    assert gateway.generation
    assert gateway.generation.submits[-1].pooling == "mean"


def test_both_formats_are_the_same_float32(gateway: GatewayUnderTest) -> None:
    def ask(**fields: object) -> Any:
        body = {"model": MODEL_NAME, "input": "hello", **fields}
        return gateway.http.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]

    decoded = np.frombuffer(base64.b64decode(ask(encoding_format="base64")), "<f4")
    assert decoded.tolist() == ask() == ask(encoding_format="float")
    assert len(decoded) == HIDDEN and np.linalg.norm(decoded) == pytest.approx(1, abs=1e-6)


def test_the_order_is_that_of_the_inputs_however_many(client: openai.OpenAI) -> None:
    """More than are under way at once, and of uneven lengths."""
    prompts = [[9] * (1 + i * 7 % 11) + [100 + i] for i in range(150)]
    answer = embed(client, input=prompts)
    assert [one.index for one in answer.data] == list(range(150))
    for one, prompt in zip(answer.data, prompts, strict=True):
        assert one.embedding == pytest.approx(vector(len(prompt), prompt[-1]), abs=1e-6)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, prompts))


def test_texts_are_tokenized(client: openai.OpenAI, gateway: GatewayUnderTest) -> None:
    texts = ["The first.", "And a second one, which is longer."]
    answer = embed(client, input=texts)
    for text, one in zip(texts, answer.data, strict=True):
        ids = gateway.http.post("/tokenize", json={"prompt": text}).json()["tokens"]
        assert one.embedding == pytest.approx(vector(len(ids), ids[-1]), abs=1e-6)


def test_fewer_dimensions_are_the_first_and_of_length_one(client: openai.OpenAI) -> None:
    for dimensions in (1, 2, HIDDEN - 1, HIDDEN):
        [one] = embed(client, input=[5, 6, 7], dimensions=dimensions).data
        assert one.embedding == pytest.approx(vector(3, 7, dimensions=dimensions), abs=1e-6)


def test_the_last_token_may_be_pooled_and_the_prompt_cut(client: openai.OpenAI) -> None:
    [one] = embed(client, input=[5, 6, 7], extra_body={"pooling": "last"}).data
    assert one.embedding == pytest.approx(vector(3, 7, 2.0), abs=1e-6)
    long = list(range(3, 3 + MODEL_LEN + 1))
    for keep, left in ((4, 4), (-1, MODEL_LEN)):
        answer = embed(client, input=[long], extra_body={"truncate_prompt_tokens": keep})
        assert answer.usage.prompt_tokens == left
        assert answer.data[0].embedding == pytest.approx(vector(left, long[-1]), abs=1e-6)
    assert embed(client, input=long[1:]).usage.prompt_tokens == MODEL_LEN, "all of the context"


@pytest.mark.parametrize("empty", ["", [], [""], ["a", ""], [[]], [[1], []]])
def test_what_is_empty_is_refused(client: openai.OpenAI, empty: object) -> None:
    assert refusal(client, input=empty).param.startswith("input")


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"input": 5}, "input", "a list of strings"),
        ({"input": ["a", [1]]}, "input", ""),
        ({"input": [-1]}, "input", ""),
        ({"input": [1 << 30]}, "input", "vocabulary"),
        ({"input": ["a"] * 2049}, "input", "2048"),
        ({"input": "a", "dimensions": 0}, "dimensions", f"from 1 to {HIDDEN}"),
        ({"input": "a", "dimensions": HIDDEN + 1}, "dimensions", f"from 1 to {HIDDEN}"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "base64"),
        ({"input": "a", "extra_body": {"pooling": "max"}}, "pooling", "last"),
        ({"input": "a", "extra_body": {"truncate_prompt_tokens": 0}}, "truncate_prompt_tokens", "at least 1"),
    ],
)
def test_a_refusal_names_the_field(client: openai.OpenAI, fields: dict[str, Any], param: str, said: str) -> None:
    error = refusal(client, **fields)
    assert error.param.partition("[")[0] == param and said in error.message


@pytest.mark.parametrize("long", [[[5], [5] * (MODEL_LEN + 1)], "word " * (MODEL_LEN * 2), "w" * 1_000_000])
def test_what_is_too_long_is_refused(client: openai.OpenAI, long: object) -> None:
    error = refusal(client, input=long)
    assert (error.param, error.code) == ("input", "context_length_exceeded")


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="text-embedding-3-small", input="a")


def test_a_refusal_or_failure_of_one_is_that_of_all(client: openai.OpenAI) -> None:
    with pytest.raises(openai.RateLimitError):
        embed(client, input=["a", "REFUSE"])
    with pytest.raises(openai.InternalServerError):
        embed(client, input=["a", "FAIL"])


def test_who_leaves_lets_go_of_all(fresh: GatewayUnderTest) -> None:
    """Of what was under way; the rest was never asked for."""
    assert fresh.generation
    generation = fresh.generation
    leaving = openai.OpenAI(base_url=f"{fresh.url}/v1", api_key="none", max_retries=0, timeout=1)
    with pytest.raises(openai.APIError):  # the client has had enough, unless the server says so first
        embed(leaving, input=["HANG"] * 100)
    eventually(lambda: len(generation.aborts) == 64)
    eventually(lambda: fresh.finished("abort") == 64)
    assert len(generation.submits) == 64
