"""What is refused is refused with the name of the field; what is accepted is what was meant."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tokenllm_schemas.errors import ApiError
from tokenllm_schemas.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    parse,
)

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "m", "prompt": "hi"}


def chat(**fields: Any) -> ChatCompletionRequest:
    return parse(ChatCompletionRequest, json.dumps({**CHAT, **fields}).encode())


def text(**fields: Any) -> CompletionRequest:
    return parse(CompletionRequest, json.dumps({**TEXT, **fields}).encode())


def refusal(ask: Any, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        ask(**fields)
    assert caught.value.status == 400
    return caught.value


RANGES = {  # field: largest below, smallest, largest, smallest above
    "temperature": (-0.001, 0, 2, 2.001),
    "top_p": (0, 1e-9, 1, 1.001),
    "top_k": (-2, -1, 2**31 - 1, 2**31),
    "max_tokens": (0, 1, 2**31 - 1, 2**31),
    "frequency_penalty": (-2.001, -2, 2, 2.001),
    "presence_penalty": (-2.001, -2, 2, 2.001),
    "n": (0, 1, 8, 9),
    "seed": (-(2**63) - 1, -(2**63), 2**63 - 1, 2**63),
    "min_p": (-0.001, 0, 1, 1.001),
    "repetition_penalty": (0.009, 0.01, 100, 100.1),
    "repeat_penalty": (0.009, 0.01, 100, 100.1),
    "truncate_prompt_tokens": (-2, -1, 2**31 - 1, 2**31),
    "prompt_logprobs": (-1, 0, 20, 21),
    "priority": (-(2**31), -(2**31) + 1, 2**31 - 1, 2**31),
}


@pytest.mark.parametrize("ask", [chat, text])
@pytest.mark.parametrize(("field", "numbers"), RANGES.items())
def test_ranges_are_exact(ask: Any, field: str, numbers: tuple[float, ...]) -> None:
    below, smallest, largest, above = numbers
    for number in (smallest, largest):
        assert getattr(ask(**{field: number}), field) == number
    for number in (below, above, 2**64, -(2**64), 10**400, True, "1", [], {}, float("nan"), float("inf")):
        error = refusal(ask, **{field: number})
        if field == "n" and error.code == "unsupported_parameter":
            assert type(number) is int and number > largest
            continue
        # JSON itself has no such numbers, and a number of hundreds of digits is none
        assert (error.param, error.code) in ((field, "invalid_value"), (None, "invalid_json")), error.message
        assert error.param is None or error.message.startswith(f"{field}: ")


@pytest.mark.parametrize("field", [*RANGES, "stop", "stream", "stream_options", "ignore_eos", "logprobs"])
def test_null_means_absent(field: str) -> None:
    assert getattr(chat(**{field: None}), field) is None
    assert getattr(text(**{field: None}), field) is None


def test_more_choices_than_the_server_makes_are_unsupported() -> None:
    error = refusal(chat, n=9)
    assert (
        (error.param, error.code) == ("n", "unsupported_parameter")
        and "at most 8" in error.message
        and "9" in error.message
    )


def test_unknown_fields_are_ignored() -> None:
    assert chat(num_ctx=4096, mirostat=2, store=True, metadata={"a": "b"}, tools=[], user="me").n is None


NEUTRAL = [
    ("response_format", {"type": "text"}, {"type": "json_object"}),
    ("tool_choice", "auto", "required"),
    ("tool_choice", "none", {"type": "function", "function": {"name": "f"}}),
    ("modalities", ["text"], ["text", "audio"]),
    ("audio", None, {"voice": "alloy"}),
    ("web_search_options", None, {}),
]


@pytest.mark.parametrize(("field", "neutral", "meant"), NEUTRAL)
def test_what_is_not_honoured_is_refused(field: str, neutral: object, meant: object) -> None:
    chat(**{field: neutral})
    error = refusal(chat, **{field: meant})
    assert (error.code, error.param) == ("unsupported_parameter", field)


@pytest.mark.parametrize(("field", "neutral", "meant"), [("suffix", "", "x"), ("best_of", 1, 2)])
def test_what_completions_do_not_honour_is_refused(field: str, neutral: object, meant: object) -> None:
    text(**{field: neutral})
    assert refusal(text, **{field: meant}).code == "unsupported_parameter"


MESSAGES = [
    ([], "messages"),
    (None, "messages"),
    ("hi", "messages"),
    ([{"role": "user"}], "messages[0].content"),
    ([{"role": "user", "content": None}], "messages[0].content"),
    ([{"content": "hi"}], "messages[0].role"),
    ([{"role": "robot", "content": "hi"}], "messages[0].role"),
    ([{"role": "user", "content": 5}], "messages[0].content"),
    ([{"role": "user", "content": {"type": "text", "text": "x"}}], "messages[0].content"),
    ([*CHAT["messages"], {"role": "user", "content": [{"type": "text"}]}], "messages[1].content"),
    ([{"role": "user", "content": [{"text": "x"}]}], "messages[0].content[0].type"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}], "messages[0].content"),
]


@pytest.mark.parametrize(("messages", "param"), MESSAGES)
def test_messages_are_checked(messages: object, param: str) -> None:
    assert refusal(chat, messages=messages).param == param


def test_messages_are_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "prompt_cache_breakpoint": {}}]
    body = chat(messages=[{"role": "user", "content": parts}, {"role": "assistant", "content": None}])
    assert [message.text() for message in body.messages] == ["a\nb", ""]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompts_are_a_batch(prompt: object, prompts: object) -> None:
    assert list(text(prompt=prompt).prompts()) == prompts


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ("", "prompt"),
        ([], "prompt"),
        (None, "prompt"),
        (7, "prompt"),
        ([1, "a"], "prompt"),
        ([""], "prompt[0]"),
        ([[1], []], "prompt[1]"),
        ([1, -5], "prompt[1]"),
        ([[1, 2**31]], "prompt[0][1]"),
        ([True], "prompt"),
        ([1.5], "prompt"),
    ],
)
def test_prompts_are_checked(prompt: object, param: str) -> None:
    assert refusal(text, prompt=prompt).param == param


def test_a_request_has_a_limited_number_of_choices() -> None:
    assert text(prompt=["a"] * 16, n=8).choices_each() == 8
    assert len(text(prompt=["a"] * 128).prompts()) == 128
    for fields in ({"prompt": ["a"] * 17, "n": 8}, {"prompt": [[1]] * 43, "n": 3}):
        error = refusal(text, **fields)
        assert (error.param, error.code) == ("n", "invalid_value")
        assert f"{len(fields['prompt'])} prompts" in error.message and f"n {fields['n']}" in error.message
    assert refusal(text, prompt=["a"] * 129).param == "prompt"


@pytest.mark.parametrize("stop", ["", [""], ["a"] * 17, "x" * 1025, 5, [5], {"a": 1}])
def test_stop_strings_are_checked(stop: object) -> None:
    assert str(refusal(chat, stop=stop).param).startswith("stop")


def test_stop_strings() -> None:
    assert chat(stop="a").stop_strings() == ("a",)
    assert chat(stop=["a", "b"]).stop_strings() == ("a", "b")
    assert chat(stop=[]).stop_strings() == chat().stop_strings() == ()


def test_fields_that_need_each_other() -> None:
    assert refusal(chat, stream_options={"include_usage": True}).param == "stream_options"
    assert chat(stream=True, stream_options={"include_usage": True}).include_usage()
    assert refusal(chat, top_logprobs=1).param == "top_logprobs"
    assert refusal(chat, top_logprobs=21, logprobs=True).param == "top_logprobs"
    assert refusal(text, logprobs=21).param == "logprobs"
    assert chat(logprobs=True).alternatives() == 0
    assert chat(logprobs=True, top_logprobs=3).alternatives() == 3
    assert chat(logprobs=False).alternatives() is None
    assert text(logprobs=0).alternatives() == 0


def test_limits() -> None:
    assert chat().token_limit() is None
    assert chat(max_tokens=5).token_limit() == 5
    assert chat(max_tokens=5, max_completion_tokens=6).token_limit() == 6
    assert text().token_limit() == 16
    assert (text(n=3).choices_each(), text().choices_each()) == (3, 1)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe{}",
        b"\xef\xbb\xbf{}",
        b"[" * 200_000,
        '{"model": "m"}'.encode("utf-16"),
        b'{"model": "m", "prompt": "\\ud800"}',
        b'{"model": "m", "prompt": "\xff"}',
        b'{"model": "m", "prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_json_is_said_to_be_none(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse(CompletionRequest, body)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


@pytest.mark.parametrize("kind", [ChatCompletionRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest])
@given(body=st.binary() | st.text().map(str.encode))
def test_nothing_but_a_400_comes_of_any_bytes(kind: Any, body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse(kind, body)
    assert caught.value.status == 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("kind", [ChatCompletionRequest, CompletionRequest])
@given(data=st.data())
def test_any_value_in_any_field_is_taken_or_named(kind: Any, data: st.DataObject) -> None:
    field = data.draw(st.sampled_from(sorted(kind.model_fields)))
    body = json.dumps({**CHAT, **TEXT, field: data.draw(JSON)}).encode()
    try:
        parse(kind, body)
    except ApiError as error:
        assert error.status == 400
        known = {field, "stream_options", "top_logprobs"}
        assert error.code == "invalid_json" or str(error.param).split("[")[0].split(".")[0] in known


def test_tokenize_needs_one_of_two() -> None:
    for fields in ({}, {"prompt": "a", "messages": CHAT["messages"]}):
        with pytest.raises(ApiError, match="either"):
            parse(TokenizeRequest, json.dumps(fields).encode())


@pytest.mark.parametrize(
    ("field", "good", "bad", "param"),
    [
        ("logit_bias", {"0": -100, "15": 100}, {"1": 100.1}, "logit_bias"),
        ("logit_bias", {}, {"x": 1}, "logit_bias"),
        ("logit_bias", {}, {"-1": 1}, "logit_bias"),
        ("logit_bias", {}, {"01": 1}, "logit_bias"),
        ("logit_bias", {str(i): 1 for i in range(512)}, {str(i): 1 for i in range(513)}, "logit_bias"),
        ("allowed_token_ids", [1, 2], [-1], "allowed_token_ids[0]"),
        ("bad_words", ["a"] * 64, ["a"] * 65, "bad_words"),
        ("bad_words", ["a" * 128], ["ok", "a" * 129], "bad_words[1]"),
        ("bad_words", [], [""], "bad_words[0]"),
        ("stop_token_ids", [0] * 64, [0] * 65, "stop_token_ids"),
        ("stop_token_ids", [], ["1"], "stop_token_ids[0]"),
        ("min_tokens", 5, 6, "min_tokens"),
        ("truncate_prompt_tokens", 1, 0, "truncate_prompt_tokens"),
        ("prompt_logprobs", False, True, "prompt_logprobs"),
        ("service_tier", "fast", "slow", "service_tier"),
        ("metadata", {str(i): "x" * 512 for i in range(16)}, {str(i): "" for i in range(17)}, "metadata"),
        ("metadata", {"a" * 64: ""}, {"a": 5}, "metadata"),
        ("return_token_ids", True, 1, "return_token_ids"),
        ("skip_special_tokens", False, "no", "skip_special_tokens"),
    ],
)
def test_what_is_said_of_tokens_is_checked(field: str, good: object, bad: object, param: str) -> None:
    for ask in (chat, text):
        assert getattr(ask(**{"max_tokens": 5, field: good}), field) == good
        error = refusal(ask, **{"max_tokens": 5, field: bad})
        assert (str(error.param).startswith(param), error.code) == (True, "invalid_value"), error.message


def test_prompt_logprobs_are_for_whole_answers() -> None:
    assert refusal(chat, prompt_logprobs=0, stream=True).param == "prompt_logprobs"
    assert chat(prompt_logprobs=False, stream=True).prompt_alternatives() is None
    assert text(prompt_logprobs=2, logprobs=5, echo=True).prompt_alternatives() == 5
    assert text(prompt_logprobs=2, logprobs=5).prompt_alternatives() == 2
    assert text(logprobs=5).prompt_alternatives() is None


def test_nothing_is_generated_only_for_an_echo() -> None:
    assert refusal(text, max_tokens=0).param == "max_tokens"
    assert text(max_tokens=0, echo=True).token_limit() == 0
    assert refusal(chat, max_tokens=0).param == "max_tokens"


MANY = 100_000
WRONG = {  # as many mistakes as fit into a body
    "prompt": [None] * MANY,
    "messages": [0] * MANY,
    "tools": [0] * MANY,
    "functions": [0] * MANY,
    "tokens": ["1"] * MANY,
    "logit_bias": dict.fromkeys(map(str, range(MANY)), "x"),
    "metadata": dict.fromkeys(map(str, range(MANY)), 1),
    "chat_template_kwargs": {str(key): {} for key in range(MANY)},
}


@pytest.mark.parametrize(("field", "value"), WRONG.items())
def test_many_mistakes_cost_no_more_than_one(field: str, value: Any) -> None:
    kind = {"prompt": CompletionRequest, "tokens": DetokenizeRequest}.get(field, ChatCompletionRequest)
    told: list[int] = []

    class Counted(kind):  # type: ignore[misc, valid-type]
        @classmethod
        def model_validate_json(cls, *args: Any, **kwargs: Any) -> Any:
            try:
                return super().model_validate_json(*args, **kwargs)
            except ValidationError as error:
                told.append(error.error_count())
                raise

    body = json.dumps({**CHAT, **TEXT, field: value}).encode()
    assert (refusal(lambda: parse(Counted, body)).param or "").startswith(field)
    assert told and told[0] < 10


def test_parts_of_messages_fail_with_the_first_wrong_one() -> None:
    turns = [{"role": "user", "content": [0] * 1000}] * 1000
    assert refusal(chat, messages=turns).param == "messages[0].content[0]"
    variables = refusal(chat, chat_template_kwargs=dict.fromkeys(map(str, range(129)), 1))
    assert "at most 128 entries, not 129" in variables.message
