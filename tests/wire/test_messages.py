"""What Anthropic's clients see: `/v1/messages` of a real gateway process."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fake_generation import MODEL_NAME, GatewayUnderTest, eventually, words

from tokenllm_schemas.anthropic import MessagesRequest
from tokenllm_schemas.errors import ApiError
from tokenllm_schemas.requests import parse

ASK = {"model": MODEL_NAME, "max_tokens": 5, "messages": [{"role": "user", "content": "hello"}]}


def post(gateway: GatewayUnderTest, path: str = "/v1/messages", headers: Any = None, **fields: Any) -> httpx.Response:
    return gateway.http.post(path, json={**ASK, **fields}, headers=headers)


def streamed(text: str) -> list[tuple[str, dict[str, Any]]]:
    frames = [frame.split("\n") for frame in text.split("\n\n") if frame and not frame.startswith(":")]
    pairs = [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in frames]
    assert all(name == data["type"] for name, data in pairs)
    return pairs


def test_a_message(gateway: GatewayUnderTest) -> None:
    message = post(gateway).json()
    prompt_tokens = gateway.http.post("/tokenize", json={"messages": ASK["messages"]}).json()["count"]
    assert message.pop("id").startswith("msg-")
    assert message == {
        "type": "message",
        "role": "assistant",
        "model": MODEL_NAME,
        "content": [{"type": "text", "text": words(5)}],
        "stop_reason": "max_tokens",
        "stop_sequence": None,
        "usage": {
            "input_tokens": prompt_tokens - 1,
            "cache_read_input_tokens": 1,
            "cache_creation_input_tokens": 0,
            "output_tokens": 5,
        },
    }


@pytest.mark.parametrize(("stops", "told"), [(["3"], "3"), (["7", "3"], None)])
def test_a_stop_sequence_is_a_reason(gateway: GatewayUnderTest, stops: list[str], told: str | None) -> None:
    message = post(gateway, stop_sequences=stops, max_tokens=9).json()
    assert (message["content"][0]["text"], message["stop_reason"]) == (words(3), "stop_sequence")
    assert message["stop_sequence"] == told


def test_a_stream_says_the_same_in_order(gateway: GatewayUnderTest) -> None:
    whole = post(gateway, max_tokens=40, stop_sequences=["30"]).json()
    events = streamed(post(gateway, max_tokens=40, stop_sequences=["30"], stream=True).text)
    names = [name for name, _ in events if name not in ("content_block_delta", "ping")]
    assert names == ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]
    begun = events[0][1]["message"]
    assert (begun["content"], begun["stop_reason"], begun["role"]) == ([], None, "assistant")
    assert begun["usage"]["input_tokens"] == whole["usage"]["input_tokens"] + whole["usage"]["cache_read_input_tokens"]
    deltas = [data for name, data in events if name == "content_block_delta"]
    assert {(data["index"], data["delta"]["type"]) for data in deltas} == {(0, "text_delta")}
    assert "".join(data["delta"]["text"] for data in deltas) == whole["content"][0]["text"]
    ended = events[-2][1]
    assert ended["delta"] == {"stop_reason": whole["stop_reason"], "stop_sequence": whole["stop_sequence"]}
    assert ended["usage"] == whole["usage"]


def test_the_conversation_is_the_same_as_of_a_chat(fresh: GatewayUnderTest) -> None:
    blocks = [{"type": "text", "text": "one", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "two"}]
    post(fresh, system=blocks, messages=[{"role": "user", "content": blocks}])
    chat = [
        {"role": role, "content": [{"type": "text", "text": one} for one in ("one", "two")]}
        for role in ("system", "user")
    ]
    fresh.http.post("/v1/chat/completions", json={"model": MODEL_NAME, "messages": chat, "max_tokens": 1})
    assert fresh.generation
    asked, chatted = fresh.generation.submits
    assert asked.prompt == chatted.prompt and b"one" not in asked.prompt
    counted = post(fresh, "/v1/messages/count_tokens", system=blocks, messages=[{"role": "user", "content": blocks}])
    assert counted.json() == {"input_tokens": len(asked.prompt) // 4}


def test_how_to_sample_is_passed_on(fresh: GatewayUnderTest) -> None:
    post(fresh, temperature=0.5, top_p=0.25, top_k=7, max_tokens=3)
    assert fresh.generation
    [submit] = fresh.generation.submits
    assert (submit.sampling.temperature, submit.sampling.top_p, submit.sampling.top_k) == (0.5, 0.25, 7)
    assert submit.max_tokens == 3


def chat_of(**fields: Any) -> dict[str, Any]:
    return parse(MessagesRequest, json.dumps({**ASK, **fields}).encode())._asked()


def test_uses_and_results_of_tools_are_calls_and_messages() -> None:
    turns = [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "t1", "name": "look", "input": {"where": "Köln"}},
                {"type": "tool_use", "id": "t2", "name": "look", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "rain"},
                {"type": "tool_result", "tool_use_id": "t2", "content": [{"type": "text", "text": "sun"}]},
                {"type": "text", "text": "And now?"},
            ],
        },
    ]
    tools = [{"name": "look", "description": "Looks.", "input_schema": {"type": "object"}}]
    chat = chat_of(messages=turns, tools=tools, system="Be brief.")
    assert chat["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "I look."}],
            "tool_calls": [
                {"id": "t1", "type": "function", "function": {"name": "look", "arguments": '{"where": "Köln"}'}},
                {"id": "t2", "type": "function", "function": {"name": "look", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "rain"},
        {"role": "tool", "tool_call_id": "t2", "content": [{"type": "text", "text": "sun"}]},
        {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
    ]
    function = {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}
    assert (chat["tools"], chat["tool_choice"]) == ([{"type": "function", "function": function}], "auto")
    assert chat_of(messages=turns, tools=tools, tool_choice={"type": "none"})["tool_choice"] == "none"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"tool_choice": {"type": "any"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "tool", "name": "x"}}, "tool_choice.type"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "format"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ],
)
def test_what_cannot_be_kept_is_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat_of(**fields)
    assert caught.value.status == 400 and caught.value.message.startswith(f"{named}: ")


@pytest.mark.parametrize(
    ("ask", "status", "type"),
    [
        (lambda gateway: post(gateway, max_tokens=0), 400, "invalid_request_error"),
        (lambda gateway: post(gateway, model="other"), 404, "not_found_error"),
        (lambda gateway: post(gateway, "/v1/messages/nowhere"), 404, "not_found_error"),
        (lambda gateway: gateway.http.get("/v1/messages"), 405, "invalid_request_error"),
        (lambda gateway: gateway.http.post("/v1/messages", content=b"{}"), 415, "invalid_request_error"),
        (lambda gateway: post(gateway, messages=[{"role": "user", "content": "REFUSE"}]), 429, "rate_limit_error"),
        (lambda gateway: post(gateway, messages=[{"role": "user", "content": "FAIL"}]), 500, "api_error"),
        (
            lambda gateway: post(
                gateway,
                messages=[{"role": "user", "content": "HANG"}],
                headers={"x-stainless-read-timeout": "0.2"},
            ),
            408,
            "timeout_error",
        ),
    ],
)
def test_errors_are_worded_as_anthropics(
    fresh: GatewayUnderTest, ask: Callable[[GatewayUnderTest], httpx.Response], status: int, type: str
) -> None:
    answer = ask(fresh)
    assert answer.status_code == status
    error = answer.json()
    assert (set(error), error["type"], error["error"]["type"]) == ({"type", "error"}, "error", type)
    assert error["error"]["message"] and answer.headers["x-request-id"]


@pytest.mark.parametrize(("content", "type"), [("FAIL", "api_error"), ("STALL", "timeout_error")])
def test_a_stream_that_fails_ends_with_an_error(fresh: GatewayUnderTest, content: str, type: str) -> None:
    turns = [{"role": "user", "content": content}]
    answer = post(fresh, messages=turns, stream=True, headers={"x-stainless-read-timeout": "0.3"})
    if answer.status_code != 200:  # both words came at once, before the headers
        assert content == "FAIL" and answer.json()["error"]["type"] == type
        return
    events = streamed(answer.text)
    assert (events[-1][0], events[-1][1]["error"]["type"]) == ("error", type)
    assert not {"message_delta", "message_stop"} & {name for name, _ in events}, "no false reason"


def test_a_client_that_leaves_ends_its_message(fresh: GatewayUnderTest) -> None:
    with fresh.http.stream("POST", "/v1/messages", json={**ASK, "max_tokens": 400, "stream": True}) as answer:
        next(answer.iter_lines())
    eventually(lambda: fresh.finished("abort") == 1, within_s=1)
