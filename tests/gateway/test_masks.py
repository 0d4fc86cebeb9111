"""What a client says of tokens becomes what the sampler is told; what the tables cannot hold is refused by name."""

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest

from tokenllm.gateway.gateway import priority_of, telling, truncated
from tokenllm.gateway.masks import with_masks
from tokenllm.messages import Sampling, Telling
from tokenllm_schemas.errors import ApiError
from tokenllm_schemas.requests import CompletionRequest, parse

INF = math.inf


def encode(text: str, first: bool = True) -> list[int]:
    """A token a letter; "the" and " the" are one each."""
    return {"the": [200], " the": [201]}.get(text, list(text.encode()))


TOKENIZER = SimpleNamespace(encode=encode, eos_ids=frozenset({2, 999}))
MODEL: Any = SimpleNamespace(tokenizer=TOKENIZER, vocab_size=256)


def body(**fields: Any) -> CompletionRequest:
    return parse(CompletionRequest, json.dumps({"model": "m", "prompt": "hi", **fields}).encode())


def masked(**fields: Any) -> Sampling:
    return with_masks(Sampling(seed=1, temperature=0.5, logprobs=3), body(**fields), MODEL)


def refusal(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        masked(**fields)
    assert caught.value.status == 400
    return caught.value


def test_who_asks_nothing_pays_nothing() -> None:
    how = Sampling(seed=1)
    assert with_masks(how, body(logit_bias={}, bad_words=[], allowed_token_ids=[], min_tokens=0), MODEL) is how
    assert masked(stop_token_ids=[5]) == Sampling(seed=1, temperature=0.5, logprobs=3)


def test_biases_and_masks() -> None:
    assert masked(logit_bias={"5": 1.5, "7": -100}).logit_bias == ((5, 1.5), (7, -100.0))
    allowed = masked(allowed_token_ids=[5, 6], logit_bias={"5": 2, "7": 3})
    assert (allowed.logit_bias, allowed.only_biased) == (((5, 2.0), (6, 0.0)), True)
    single = masked(bad_words=["the"], logit_bias={"200": 9})
    assert (dict(single.logit_bias), single.only_biased, single.bad_words) == ({200: -INF, 201: -INF}, False, ())
    both = masked(bad_words=["the", "ab"], allowed_token_ids=[200, 9])
    assert dict(both.logit_bias) == {200: -INF, 9: 0.0}
    assert both.bad_words == ((97, 98), (32, 97, 98))


def test_what_ends_an_answer_is_muted_until_there_are_enough_tokens() -> None:
    how = masked(min_tokens=3, stop_token_ids=[9, 2])
    assert (how.muted, how.min_tokens) == ((2, 9), 3), "999 is no token of the model"
    assert masked(min_tokens=3, allowed_token_ids=[2, 3]).only_biased
    assert refusal(min_tokens=3, allowed_token_ids=[2]).param == "allowed_token_ids"


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"logit_bias": {"256": 1}}, "logit_bias", "token id 256 is not in the vocabulary of 256"),
        ({"allowed_token_ids": [1, 300]}, "allowed_token_ids", "300"),
        ({"stop_token_ids": [256]}, "stop_token_ids", "256"),
        ({"allowed_token_ids": [200], "bad_words": ["the"]}, "allowed_token_ids", "nothing is left"),
        ({"bad_words": ["ok", "abcdefgh"]}, "bad_words[1]", "'abcdefgh' has 9 tokens, at most 8"),
        ({"bad_words": [f"w{i}" for i in range(33)]}, "bad_words", "66 sequences of tokens, at most 64"),
    ],
)
def test_what_cannot_be_held_is_refused_by_name(fields: dict[str, Any], param: str, said: str) -> None:
    error = refusal(**fields)
    assert error.param == param and said in error.message


def test_the_tables_have_room_for_so_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODEL, "vocab_size", 1000)
    most = {str(id_): 1 for id_ in range(300, 812)}
    assert len(masked(logit_bias=most).logit_bias) == 512
    error = refusal(logit_bias=most, bad_words=["the"])
    assert error.param == "logit_bias" and "514 tokens" in error.message and "512" in error.message


def test_prompts_are_cut_at_their_beginning() -> None:
    prompt = list(range(100))
    assert truncated(prompt, 50, body()) == prompt
    assert truncated(prompt, 50, body(truncate_prompt_tokens=3)) == [97, 98, 99]
    assert len(truncated(prompt, 50, body(truncate_prompt_tokens=-1, max_tokens=10))) == 40
    assert truncated(prompt, 50, body(truncate_prompt_tokens=-1, max_tokens=90)) == [99]
    assert truncated(prompt[:5], 50, body(truncate_prompt_tokens=7)) == prompt[:5]


def test_tiers_and_priorities() -> None:
    """A lower number goes first, as clients of other servers know it; the scheduler takes the higher one first."""
    ranks = [priority_of(body(service_tier=tier)) for tier in ("flex", "auto", "default", "scale", "fast", "priority")]
    assert ranks == [-10, 0, 0, 0, 10, 10]
    assert priority_of(body(priority=-3)) == 3 and priority_of(body(priority=5, service_tier="fast")) == 5


def test_what_the_detokenizer_is_told() -> None:
    assert telling(body()) == Telling()
    assert telling(body(stop="a", skip_special_tokens=False)) == Telling(("a",), special_tokens=True)
    assert telling(body(return_token_ids=True)).each_token
    usage = {"include_usage": True, "continuous_usage_stats": True}
    assert telling(body(stream=True, stream_options=usage)).each_token
    assert telling(body(max_tokens=0, echo=True)).nothing
