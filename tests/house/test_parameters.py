"""What requests may ask of tokens, of the whole server with the embedded model: streamed or not, it is the same."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from house import REAL, House

REFERENCE = json.loads((Path(__file__).parents[1] / "data" / "smollm2_reference.json").read_text())["refs"]
MODEL = "smollm2-135m-instruct"
CAPITAL = "The capital of France is"
PARIS, OF = 7042, 282


@pytest.fixture(scope="module")
def house(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    flags = ["--port", "0", "--max-total-tokens", "9000", "--max-model-len", "1024", "--dtype", "float32"]
    house = House([*REAL, *flags], tmp_path_factory.mktemp("parameters") / "server.log")
    try:
        yield house.wait_greeted()
    finally:
        house.raze()


def post(house: House, path: str, **fields: Any) -> httpx.Response:
    return httpx.post(f"{house.url}{path}", json={"model": MODEL, "temperature": 0, **fields}, timeout=60)


def complete(house: House, **fields: Any) -> Any:
    answer = post(house, "/v1/completions", **{"prompt": CAPITAL, "max_tokens": 8, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def text(house: House, **fields: Any) -> str:
    return complete(house, **fields)["choices"][0]["text"]


def streamed(house: House, **fields: Any) -> dict[int, dict[str, Any]]:
    answer = post(house, "/v1/completions", **{"prompt": CAPITAL, "max_tokens": 8, "stream": True, **fields})
    choices: dict[int, dict[str, Any]] = {}
    for line in answer.text.split("\n\n")[:-2]:
        for choice in json.loads(line.removeprefix("data: "))["choices"]:
            mine = choices.setdefault(choice["index"], {"text": "", "logprobs": [], "ids": [], "finish_reason": None})
            mine["text"] += choice["text"]
            mine["logprobs"] += (choice["logprobs"] or {}).get("token_logprobs", [])
            mine["ids"] += choice.get("token_ids", [])
            mine["finish_reason"] = choice["finish_reason"]
    return choices


WISHES: list[dict[str, Any]] = [
    {"temperature": 1, "seed": 5, "n": 2, "prompt": [CAPITAL, "Once upon a time"]},
    {"temperature": 0.8, "seed": -7, "top_k": 20, "min_p": 0.05, "stop": ["e", "th"], "logprobs": 2},
    {"repetition_penalty": 1.4, "frequency_penalty": 0.5, "presence_penalty": -0.2, "max_tokens": 24},
    {"echo": True, "logprobs": 1, "return_token_ids": True, "stop": " The"},
    {"echo": True, "logprobs": 3, "max_tokens": 0, "prompt": "a b c " * 60, "n": 2},
    {"stop_token_ids": [30], "logprobs": 0, "return_token_ids": True},
    {"ignore_eos": True, "skip_special_tokens": False, "max_tokens": 20, "bad_words": ["Paris", "the capital"]},
]


@pytest.mark.parametrize("wish", WISHES, ids=lambda wish: ",".join(wish))
def test_a_stream_is_the_whole_answer(house: House, wish: dict[str, Any]) -> None:
    whole = complete(house, **wish)["choices"]
    pieces = streamed(house, **wish)
    prompts = wish["prompt"] if isinstance(wish.get("prompt"), list) else [CAPITAL]
    assert len(whole) == len(pieces) == len(prompts) * wish.get("n", 1)
    for choice in whole:
        mine = pieces[choice["index"]]
        assert (mine["text"], mine["finish_reason"]) == (choice["text"], choice["finish_reason"])
        assert mine["ids"] == choice.get("token_ids", [])
        told = (choice["logprobs"] or {}).get("token_logprobs", [])
        # what shares a step is computed in other shapes: the sums' last bits differ
        assert [round(value or 1, 3) for value in mine["logprobs"]] == pytest.approx(
            [round(value or 1, 3) for value in told], abs=0.002
        )


def test_what_is_asked_of_tokens_holds(house: House) -> None:
    assert text(house).startswith(" Paris")
    assert text(house, logit_bias={str(OF): 100}, max_tokens=3) == " of of of"
    assert set(complete(house, allowed_token_ids=[OF, PARIS], return_token_ids=True)["choices"][0]["token_ids"]) <= {
        OF,
        PARIS,
    }
    assert "Paris" not in text(house, bad_words=["Paris"], max_tokens=20)
    assert text(house, min_p=1.0, temperature=2, seed=1) == text(house)
    stopped = complete(house, stop_token_ids=[PARIS], return_token_ids=True)["choices"][0]
    assert (stopped["text"], stopped["finish_reason"], stopped["token_ids"]) == ("", "stop", [PARIS])
    unstopped = complete(house, stop_token_ids=[PARIS], min_tokens=5, max_tokens=6, return_token_ids=True)
    assert PARIS not in unstopped["choices"][0]["token_ids"][:5] and unstopped["usage"]["completion_tokens"] >= 5
    short = complete(house, truncate_prompt_tokens=2, return_token_ids=True)
    assert short["choices"][0]["prompt_token_ids"] == [4649, 314] and short["usage"]["prompt_tokens"] == 2


def test_loglikelihoods_are_transformers(house: House) -> None:
    """As lm-eval asks for them: the prompt and what follows it echoed, with logprobs and nothing generated."""
    for reference in REFERENCE[:2]:
        prompt, said = reference["prompt_ids"], reference["output_ids"]
        fields = {"prompt": prompt + said, "echo": True, "logprobs": 1, "max_tokens": 0}
        [choice] = complete(house, **fields)["choices"]
        told = choice["logprobs"]
        assert told["token_logprobs"][0] is None and len(told["tokens"]) == len(prompt) + len(said)
        for step, top in enumerate(reference["top5"]):
            if top[0][1] - top[1][1] < 0.001:
                break
            place = len(prompt) + step
            assert told["token_logprobs"][place] == pytest.approx(top[0][1], abs=2e-3), f"step {step}"
            assert max(told["top_logprobs"][place], key=told["top_logprobs"][place].get) == told["tokens"][place]
        usage = complete(house, **fields)["usage"]
        assert (usage["completion_tokens"], usage["prompt_tokens"]) == (0, len(prompt) + len(said))


def test_a_chat_tells_what_was_asked(house: House) -> None:
    asked = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 4, "logprobs": True}
    asked |= {"prompt_logprobs": 1, "service_tier": "fast", "metadata": {"a": "b"}, "return_token_ids": True}
    answer = post(house, "/v1/chat/completions", **asked, user="me", store=True, num_ctx=4096).json()
    assert (answer["service_tier"], answer["metadata"]) == ("priority", {"a": "b"})
    assert len(answer["prompt_token_ids"]) == len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert answer["prompt_logprobs"][0] is None
    [choice] = answer["choices"]
    assert len(choice["token_ids"]) == len(choice["logprobs"]["content"]) == answer["usage"]["completion_tokens"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"49152": 1}}, "logit_bias"),
        ({"stop_token_ids": [49152]}, "stop_token_ids"),
        ({"allowed_token_ids": [2], "min_tokens": 1}, "allowed_token_ids"),
        ({"bad_words": ["a b c d e f g h i j"]}, "bad_words[0]"),
        ({"best_of": 2}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ],
)
def test_what_cannot_be_kept_is_refused(house: House, fields: dict[str, Any], param: str) -> None:
    answer = post(house, "/v1/completions", **{"prompt": CAPITAL, **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
