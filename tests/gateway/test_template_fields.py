"""What clients may hand to a chat template, and in which words it arrives there."""

import json
from pathlib import Path
from typing import Any

import pytest

from tokenllm.checkpoint.description import SamplingDefaults
from tokenllm.gateway.served_model import ServedModel, template_options
from tokenllm.text.template import ChatTemplate
from tokenllm.text.tokenizer import load_tokenizer
from tokenllm_schemas.errors import ApiError
from tokenllm_schemas.requests import ChatCompletionRequest, TokenizeRequest, parse

USER = {"role": "user", "content": "hi"}
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {}}, "unknown": 1}
TOOL = {"type": "function", "function": FUNCTION}


def chat(*messages: dict[str, Any], **fields: Any) -> ChatCompletionRequest:
    return parse(ChatCompletionRequest, json.dumps({"model": "m", "messages": messages or [USER], **fields}).encode())


def refusal(*messages: dict[str, Any], **fields: Any) -> tuple[str | None, str]:
    with pytest.raises(ApiError) as caught:
        chat(*messages, **fields)
    assert caught.value.status == 400
    return caught.value.param, caught.value.code


def test_tools_are_shown_as_they_were_written() -> None:
    swapped = {"function": FUNCTION, "type": "function"}
    assert json.dumps(chat(tools=[swapped]).shown_tools()) == json.dumps([swapped])
    assert chat(tools=[]).shown_tools() == []
    assert chat(functions=[FUNCTION], function_call="auto").shown_tools() == [TOOL]
    assert chat(tools=[TOOL], tool_choice="none").shown_tools() == []
    assert chat(functions=[FUNCTION], function_call="none").shown_tools() == []


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"tools": [TOOL, {"type": "custom", "custom": {"name": "x"}}]}, "tools[1].type", "unsupported_parameter"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter"),
        ({"tools": [{"type": "function", "function": {"name": "x" * 65}}]}, "tools[0].function.name", "invalid_value"),
        ({"tools": {}}, "tools", "invalid_value"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice", "unsupported_parameter"),
        ({"chat_template": "{{ 1 }}"}, "chat_template", "unsupported_parameter"),
        ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs.messages", "invalid_value"),
        ({"chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs.bos_token", "invalid_value"),
        ({"chat_template_kwargs": {"deep": {"a": 1}}}, "chat_template_kwargs", "invalid_value"),
        ({"documents": ["x"]}, "documents[0]", "invalid_value"),
        ({"reasoning_effort": "very"}, "reasoning_effort", "invalid_value"),
        (
            {"add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
            "invalid_value",
        ),
    ],
)
def test_what_no_template_may_be_given(fields: dict[str, Any], param: str, code: str) -> None:
    assert refusal(**fields) == (param, code)
    if "tool_choice" not in fields:
        with pytest.raises(ApiError):
            parse(TokenizeRequest, json.dumps({"messages": [USER], **fields}).encode())


def test_a_contradiction_names_both_fields() -> None:
    with pytest.raises(ApiError, match=r"continue_final_message.*add_generation_prompt"):
        chat(add_generation_prompt=True, continue_final_message=True)
    chat(add_generation_prompt=False, continue_final_message=True)


def test_options_say_what_was_asked() -> None:
    assert template_options(chat()).add_generation_prompt
    assert not template_options(chat(add_generation_prompt=False)).add_generation_prompt
    options = template_options(
        chat(
            continue_final_message=True,
            chat_template_kwargs={"enable_thinking": False, "n": 1.5, "words": ["a"]},
            reasoning_effort="low",
            documents=[{"text": "x"}],
        )
    )
    assert options.continue_final_message and options.reasoning_effort == "low"
    assert options.variables == {"enable_thinking": False, "n": 1.5, "words": ["a"]}
    assert options.documents == [{"text": "x"}]


@pytest.fixture(scope="module")
def seen(default_model: Path) -> ServedModel:
    """A model whose template shows all that it is given."""
    source = "{% for message in messages %}{{ message | tojson }}\n{% endfor %}{{ tools | tojson }}"
    template = ChatTemplate({"default": source}, {}, "test")
    return ServedModel("m", 0, load_tokenizer(default_model), template, SamplingDefaults(), 100, 49152, 576)


def shown(seen: ServedModel, body: ChatCompletionRequest) -> list[Any]:
    ids = seen.chat_prompt(body.messages, body.shown_tools(), template_options(body))
    return [json.loads(line) for line in seen.tokenizer.decode(ids, skip_special=False).splitlines()]


def test_messages_arrive_in_the_words_of_templates(seen: ServedModel) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, null]}'}}
    parsed = call | {"function": {"name": "f", "arguments": {"a": [1, None]}}}
    parts = [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}]
    body = chat(
        {"role": "developer", "content": "Be kind."},
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "why"},
        {"role": "tool", "content": [{"type": "text", "text": "12"}], "tool_call_id": "c", "name": "f"},
        {"role": "assistant", "content": parts},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "content": "13", "name": "f"},
        {"role": "assistant", "content": None, "refusal": "No."},
        tools=[TOOL],
    )
    empty = {"type": "function", "function": {"name": "f", "arguments": {}}}
    assert shown(seen, body) == [
        {"role": "system", "content": "Be kind."},
        USER,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [parsed],
            "reasoning_content": "why",
            "thinking": "why",
        },
        {"role": "tool", "content": "12", "name": "f", "tool_call_id": "c"},
        {"role": "assistant", "content": "a\nb"},
        {"role": "assistant", "content": "", "tool_calls": [empty]},
        {"role": "tool", "content": "13", "name": "f"},
        {"role": "assistant", "content": "No."},
        [TOOL],
    ]


def test_arguments_that_are_no_object_stay_as_they_are(seen: ServedModel) -> None:
    for text in ('{"a', "[1]", "x"):
        call = {"function": {"name": "f", "arguments": text}}
        [turn, _] = shown(seen, chat({"role": "assistant", "tool_calls": [call]}))
        assert turn["tool_calls"][0]["function"]["arguments"] == text


def test_what_cannot_fit_is_not_tokenized(seen: ServedModel) -> None:
    body = chat(tools=[{"type": "function", "function": FUNCTION | {"description": "x" * 10_000}}])
    with pytest.raises(ApiError) as caught:
        seen.chat_prompt(body.messages, body.shown_tools(), max_model_len=100)
    assert caught.value.code == "context_length_exceeded"
