"""A response's items become a chat, and what is stored becomes items again."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tokenllm.gateway.response_prompt import as_chat, conversation, listed
from tokenllm.gateway.response_store import Stored
from tokenllm_schemas.requests import parse
from tokenllm_schemas.response_request import ResponseRequest

CALL = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"in": "Oslo"}'}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "sun"}]}
THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}


def asked(**fields: Any) -> ResponseRequest:
    return parse(ResponseRequest, json.dumps({"model": "m", "input": "hi", **fields}).encode())


def chat(**fields: Any) -> Any:
    body = asked(**fields)
    return as_chat("m", body, body.items())


def turns(*items: Any) -> list[dict[str, Any]]:
    return [message.model_dump(exclude_none=True) for message in chat(input=items).messages]


def call(id: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": "weather", "arguments": '{"in": "Oslo"}'}}


def test_calls_and_thoughts_belong_to_the_turn_that_made_them() -> None:
    said = {"role": "assistant", "content": "let me see"}
    assert turns({"role": "user", "content": "?"}, THOUGHT, CALL, {**CALL, "call_id": "c2"}, OUTPUT) == [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [call("c1"), call("c2")]},
        {"role": "tool", "tool_call_id": "c1", "content": "sun"},
    ]
    assert turns(THOUGHT, said, CALL) == [{**said, "reasoning_content": "hm", "tool_calls": [call("c1")]}]
    assert turns(CALL, OUTPUT, CALL)[2] == {"role": "assistant", "content": "", "tool_calls": [call("c1")]}
    assert turns(said, THOUGHT, {"role": "user", "content": "?"})[0] == said


def test_a_summary_stands_for_a_thought_that_is_not_told() -> None:
    thought = {"type": "reasoning", "id": "rs_2", "summary": [{"type": "summary_text", "text": "so"}]}
    said = {"role": "assistant", "content": "x"}
    assert turns(thought, said) == [{**said, "reasoning_content": "so"}]
    assert turns({**thought, "summary": [], "encrypted_content": "zzz"}, said) == [said]


def test_instructions_and_leading_system_messages_are_one() -> None:
    body = asked(instructions="a", input=[{"role": role, "content": role} for role in ("developer", "system", "user")])
    messages = as_chat("m", body, body.items()).messages
    assert [(one.role, one.text()) for one in messages] == [("system", "a\n\ndeveloper\n\nsystem"), ("user", "user")]


def test_the_manner_is_a_chats() -> None:
    tool = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}}
    same = chat(max_output_tokens=5, temperature=0.5, top_p=0.25, tools=[tool], reasoning={"effort": "low"})
    assert (same.token_limit(), same.temperature, same.top_p, same.reasoning_effort) == (5, 0.5, 0.25, "low")
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    assert list(same.shown_tools()) == [{"type": "function", "function": function}]
    assert same.alternatives() is None and chat(top_logprobs=0).alternatives() is None
    assert chat(top_logprobs=3).alternatives() == 3
    assert chat(include=["message.output_text.logprobs"]).alternatives() == 0


TEXT = st.text(max_size=5)
PART = st.fixed_dictionaries({"type": st.just("input_text"), "text": TEXT})
ITEM = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": TEXT | st.lists(PART)}),
    st.sampled_from([CALL, OUTPUT, THOUGHT]),
)


@given(items=st.lists(ITEM, min_size=1, max_size=6), said=TEXT)
def test_what_was_stored_reads_the_same(items: list[Any], said: str) -> None:
    body = asked(input=items)
    answer = {"role": "assistant", "type": "message", "content": [{"type": "output_text", "text": said}]}
    stored = Stored(json.dumps({"output": [answer]}).encode(), listed(body.items(), "0" * 24))
    shown = json.loads(stored.items)
    assert len({item["id"] for item in shown if item["id"] != "rs_1"}) == len([i for i in items if i is not THOUGHT])
    whole = asked(input=[*items, answer])
    assert as_chat("m", whole, conversation(stored)) == as_chat("m", whole, whole.items())
