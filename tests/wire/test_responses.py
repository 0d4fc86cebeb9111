"""`/v1/responses`, with the official client against a real gateway process."""

import json
import socket
from typing import Any

import openai
import pytest
from fake_generation import MODEL_LEN, MODEL_NAME, GatewayUnderTest, eventually, words
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenllm_schemas.response_request import ResponseRequest

WEATHER: dict[str, Any] = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": True}
ORDER = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]


def ask(client: openai.OpenAI, **fields: object) -> Any:
    return client.responses.create(**{"model": MODEL_NAME, "input": "hello", **fields})


def read_by_the_model(gateway: GatewayUnderTest) -> str:
    assert gateway.generation
    return gateway.generation.prompt(gateway.generation.submits[-1])


def turns(*said: tuple[str, str]) -> str:
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in said) + "<|im_start|>assistant\n"


SYSTEM = ("system", "You are a helpful AI assistant named SmolLM, trained by Hugging Face")


def test_a_response(client: openai.OpenAI, gateway: GatewayUnderTest) -> None:
    answer = ask(client, max_output_tokens=5, metadata={"a": "b"}, instructions="be brief", temperature=0.5, user="me")
    assert answer.id.startswith("resp_") and answer.object == "response" and answer.model == MODEL_NAME
    assert answer.output_text == words(5) and answer.error is None
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    [message] = answer.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "incomplete")
    assert message.content[0].annotations == [] and message.content[0].logprobs == []
    assert (answer.metadata, answer.instructions, answer.temperature) == ({"a": "b"}, "be brief", 0.5)
    assert (answer.tools, answer.tool_choice, answer.parallel_tool_calls) == ([], "auto", True)
    assert (answer.store, answer.truncation, answer.top_logprobs, answer.background) == (True, "disabled", 0, False)
    usage = answer.usage
    assert usage.output_tokens == 5 and usage.total_tokens == usage.input_tokens + 5
    assert (usage.input_tokens_details.cached_tokens, usage.input_tokens_details.cache_write_tokens) == (1, 0)
    assert usage.output_tokens_details.reasoning_tokens == 0
    assert read_by_the_model(gateway) == turns(("system", "be brief"), ("user", "hello"))


def test_the_end_of_the_context_is_no_completion(client: openai.OpenAI) -> None:
    answer = ask(client, store=False)
    assert answer.status == "incomplete" and answer.usage.total_tokens == MODEL_LEN


def test_a_stream_has_its_events_in_order(client: openai.OpenAI) -> None:
    events = list(ask(client, max_output_tokens=4, stream=True, stream_options={"include_obfuscation": False}))
    kinds = [event.type for event in events]
    assert list(dict.fromkeys(kinds)) == [*ORDER, "response.incomplete"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].response.status == events[1].response.status == "in_progress"
    assert events[0].response.output == [] and events[0].response.usage is None
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == words(4) and all(event.logprobs == [] for event in deltas)
    ids = {event.item_id for event in events if hasattr(event, "item_id")}
    ids |= {event.item.id for event in events if hasattr(event, "item")}
    final = events[-1].response
    assert ids == {final.output[0].id}
    assert final.output_text == words(4) and final.id == events[0].response.id and final.usage.output_tokens == 4


def test_the_wire_has_named_events_and_no_done(gateway: GatewayUnderTest) -> None:
    body = {"model": MODEL_NAME, "input": "hello", "stream": True, "max_output_tokens": 2}
    answer = gateway.http.post("/v1/responses", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    frames = answer.text.removesuffix("\n\n").split("\n\n")
    for frame in frames:
        name, data = frame.split("\n")
        assert name.removeprefix("event: ") == json.loads(data.removeprefix("data: "))["type"]
    assert "[DONE]" not in answer.text


def test_the_strict_helper(client: openai.OpenAI) -> None:
    with client.responses.stream(model=MODEL_NAME, input="BRIEF", tools=[WEATHER]) as stream:  # type: ignore[list-item]
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert snapshots[-1] == final.output_text == words(6)
    assert (final.status, final.output[0].status, final.incomplete_details) == ("completed", "completed", None)  # type: ignore[union-attr]
    assert final.completed_at and final.tools[0].name == "weather" and final.tools[0].strict  # type: ignore[union-attr]
    stored = client.responses.retrieve(final.id)
    assert stored.output_text == final.output_text and stored.usage == final.usage


def test_a_stream_says_what_the_whole_would(client: openai.OpenAI) -> None:
    fields = {"input": "BRIEF", "include": ["message.output_text.logprobs"], "top_logprobs": 2, "tools": [WEATHER]}
    whole = ask(client, **fields)
    streamed = list(ask(client, **fields, stream=True))[-1].response
    changing: Any = {"id", "created_at", "completed_at", "output"}
    assert streamed.model_dump(exclude=changing) == whole.model_dump(exclude=changing)
    assert streamed.output[0].model_dump(exclude={"id"}) == whole.output[0].model_dump(exclude={"id"})


def test_logprobs(client: openai.OpenAI) -> None:
    include: Any = ["message.output_text.logprobs"]
    [part] = ask(client, max_output_tokens=2, include=include, top_logprobs=1).output[0].content
    assert [(one.token, one.bytes, one.logprob) for one in part.logprobs] == [
        ("0 ", [48, 32], -9999.0),
        ("1 ", [49, 32], -0.5),
    ]
    assert [(top.token, top.logprob) for top in part.logprobs[1].top_logprobs] == [("t0", -1.0)]
    events = list(ask(client, max_output_tokens=2, include=include, stream=True))
    deltas = [one.token for event in events if event.type == "response.output_text.delta" for one in event.logprobs]
    [done] = [event for event in events if event.type == "response.output_text.done"]
    assert deltas == [one.token for one in done.logprobs] == ["0 ", "1 "]


def test_a_conversation_that_the_server_remembers(client: openai.OpenAI, gateway: GatewayUnderTest) -> None:
    first = ask(client, input="BRIEF", instructions="be rude")
    second = ask(client, input="and then?", previous_response_id=first.id, max_output_tokens=2)
    said = [("user", "BRIEF"), ("assistant", words(6)), ("user", "and then?")]
    assert read_by_the_model(gateway) == turns(SYSTEM, *said), "instructions are not carried over"
    assert second.previous_response_id == first.id
    ask(client, input="go on", previous_response_id=second.id, instructions="be kind", max_output_tokens=2)
    said += [("assistant", words(2)), ("user", "go on")]
    assert read_by_the_model(gateway) == turns(("system", "be kind"), *said)
    client.responses.delete(first.id)
    assert ask(client, previous_response_id=second.id, max_output_tokens=1).output_text == words(1)


def test_what_is_not_to_be_stored_is_not(client: openai.OpenAI) -> None:
    streamed = list(ask(client, store=False, max_output_tokens=1, stream=True))[-1].response
    for id in (ask(client, store=False, max_output_tokens=1).id, streamed.id):
        with pytest.raises(openai.NotFoundError) as caught:
            client.responses.retrieve(id)
        assert (caught.value.code, caught.value.param) == ("response_not_found", "id")
        with pytest.raises(openai.NotFoundError) as caught:
            ask(client, previous_response_id=id)
        assert (caught.value.code, caught.value.param) == ("response_not_found", "previous_response_id")


def test_delete(client: openai.OpenAI, gateway: GatewayUnderTest) -> None:
    id = ask(client, max_output_tokens=1).id
    deleted = gateway.http.delete(f"/v1/responses/{id}", headers={"authorization": "Bearer none"})
    assert (deleted.status_code, deleted.json()) == (200, {"id": id, "object": "response", "deleted": True})
    for again in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            again(id)
    with pytest.raises(openai.NotFoundError):
        client.responses.input_items.list(id)


def test_a_response_belongs_to_the_key_that_made_it(gateway: GatewayUnderTest) -> None:
    mine, yours = (openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0) for key in ("a", "b"))
    made = ask(mine, max_output_tokens=1)
    for ask_for in (yours.responses.retrieve, yours.responses.delete, yours.responses.input_items.list):
        with pytest.raises(openai.NotFoundError):
            ask_for(made.id)
    reference: Any = [{"type": "item_reference", "id": made.output[0].id}, {"role": "user", "content": "x"}]
    for fields in ({"previous_response_id": made.id}, {"input": reference}):
        with pytest.raises(openai.NotFoundError):
            ask(yours, **fields)
    assert mine.responses.retrieve(made.id).id == made.id
    assert ask(mine, input=reference, max_output_tokens=1).output_text == words(1)


def test_input_items(client: openai.OpenAI) -> None:
    call: Any = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"}
    given: Any = [
        {"role": "user", "content": "hello"},
        {"type": "reasoning", "id": "rs_mine", "summary": [{"type": "summary_text", "text": "hm"}]},
        call,
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
    ]
    first = ask(client, input=given, max_output_tokens=1)
    second = ask(client, input="thanks", previous_response_id=first.id, max_output_tokens=1)
    items = client.responses.input_items.list(second.id, order="asc").data
    assert [item.type for item in items] == [*(one.get("type", "message") for one in given), "message", "message"]
    assert [items[1].id, items[4].id] == ["rs_mine", first.output[0].id] and len({item.id for item in items}) == 6
    assert items[0].content[0].text == "hello" and items[2].arguments == "{}" and items[5].content[0].text == "thanks"  # type: ignore[union-attr,index]
    page = client.responses.input_items.list(second.id, limit=4)
    assert [item.id for item in page.data] == [item.id for item in items[:1:-1]] and page.has_more
    assert [item.id for page in page.iter_pages() for item in page.data] == [item.id for item in items[::-1]]
    for query in ({"limit": 0}, {"limit": "x"}, {"order": "up"}, {"after": "nothing"}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.input_items.list(second.id, extra_query=query)  # type: ignore[arg-type]
        assert caught.value.param in query


def test_items_become_turns(client: openai.OpenAI, gateway: GatewayUnderTest) -> None:
    made = ask(client, input="BRIEF")
    items: Any = [
        {"role": "developer", "content": "two"},
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}],
        },
        *(item.model_dump() for item in made.output),
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "xyz"},
        {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"type": "item_reference", "id": made.output[0].id},
        {"role": "user", "content": "c"},
    ]
    ask(client, input=items, instructions="one", max_output_tokens=1)
    said = [("user", "a\nb"), ("assistant", words(6)), ("assistant", "no"), ("assistant", words(6)), ("user", "c")]
    assert read_by_the_model(gateway) == turns(("system", "one\n\ntwo"), *said)


def test_what_is_referred_to_is_no_larger_than_a_body(client: openai.OpenAI) -> None:
    huge: Any = [{"role": "user", "content": "a" * 1_500_000}, {"role": "user", "content": "now"}]
    made = [ask(client, input=huge, truncation="auto", max_output_tokens=1).id for _ in range(3)]
    items = [client.responses.input_items.list(id, order="asc").data[0].id for id in made]
    references: Any = [{"type": "item_reference", "id": id} for id in items]
    now = huge[1:]
    two = ask(client, input=references[:2] + now, truncation="auto", max_output_tokens=1, store=False)
    assert two.output_text == words(1)
    for input, code in ((references + now, "context_length_exceeded"), (references[:1] * 2 + now, "invalid_value")):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, input=input, truncation="auto")
        assert caught.value.code == code


def test_input_tokens(client: openai.OpenAI) -> None:
    made = ask(client, max_output_tokens=1, instructions="be brief")
    assert client.responses.input_tokens.count(
        model=MODEL_NAME, input="hello", instructions="be brief"
    ).input_tokens == (made.usage.input_tokens)
    longer = client.responses.input_tokens.count(input="more", previous_response_id=made.id)
    assert longer.object == "response.input_tokens" and longer.input_tokens > made.usage.input_tokens


def test_truncation_leaves_out_the_oldest_turns(client: openai.OpenAI, gateway: GatewayUnderTest) -> None:
    old: Any = [{"role": "user", "content": "long ago " * 30}, {"role": "assistant", "content": "yes"}]
    items = [*old * 20, {"role": "user", "content": "now"}]
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, input=items)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")
    answer = ask(client, input=items, truncation="auto", instructions="be brief", max_output_tokens=8)
    assert answer.output_text == words(8) and answer.truncation == "auto"
    assert MODEL_LEN // 2 < answer.usage.input_tokens <= MODEL_LEN - 8
    read = read_by_the_model(gateway)
    assert read.startswith(turns(("system", "be brief"), ("user", "long")).split("long")[0]) and "now" in read
    unlimited = ask(client, input=items, truncation="auto")
    assert MODEL_LEN // 2 < unlimited.usage.input_tokens <= MODEL_LEN * 3 // 4, "an answer needs room too"
    huge: Any = [{"role": "user", "content": "a" * 1_000_000}, {"role": "user", "content": "now"}]
    ask(client, input=huge, truncation="auto", max_output_tokens=1)
    assert read_by_the_model(gateway) == turns(SYSTEM, ("user", "now"))
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, input=huge[:1], truncation="auto")
    assert caught.value.code == "context_length_exceeded"


PICTURE = [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}]


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"model": "other"}, 404, "model_not_found", "model"),
        ({"input": None}, 400, "missing_required_parameter", "input"),
        ({"input": []}, 400, "missing_required_parameter", "input"),
        ({"input": 5}, 400, "invalid_value", "input"),
        ({"input": [5]}, 400, "invalid_value", "input[0]"),
        ({"input": [{"role": "pirate", "content": "x"}]}, 400, "invalid_value", "input[0].role"),
        ({"input": [{"role": "user"}]}, 400, "missing_required_parameter", "input[0].content"),
        (
            {"input": [{"type": "message", "role": "user", "content": [{}]}]},
            400,
            "missing_required_parameter",
            "input[0].content[0].type",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
            400,
            "missing_required_parameter",
            "input[0].content[0]",
        ),
        ({"input": PICTURE}, 400, "unsupported_parameter", "input[0].content[0]"),
        (
            {"input": [{"type": "function_call", "call_id": "a", "name": "b"}]},
            400,
            "missing_required_parameter",
            "input[0].arguments",
        ),
        ({"input": [{"type": "computer_call", "id": "x"}]}, 400, "unsupported_parameter", "input[0].type"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, 404, "item_not_found", "input[0].id"),
        ({"previous_response_id": "resp_1"}, 404, "response_not_found", "previous_response_id"),
        ({"max_output_tokens": 0}, 400, "invalid_value", "max_output_tokens"),
        ({"temperature": 3}, 400, "invalid_value", "temperature"),
        ({"top_logprobs": 21}, 400, "invalid_value", "top_logprobs"),
        ({"metadata": {str(i): "" for i in range(17)}}, 400, "invalid_value", "metadata"),
        ({"metadata": {"a": "x" * 513}}, 400, "invalid_value", "metadata"),
        ({"background": True}, 400, "unsupported_parameter", "background"),
        ({"conversation": "conv_1"}, 400, "unsupported_parameter", "conversation"),
        ({"prompt": {"id": "p"}}, 400, "unsupported_parameter", "prompt"),
        ({"tool_choice": "required"}, 400, "unsupported_parameter", "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "f"}}, 400, "unsupported_parameter", "tool_choice"),
        ({"tools": [{"type": "web_search"}]}, 400, "unsupported_parameter", "tools[0].type"),
        ({"tools": [{"type": "function"}]}, 400, "missing_required_parameter", "tools[0].name"),
        ({"text": {"format": {"type": "json_object"}}}, 400, "unsupported_parameter", "text.format"),
        ({"truncation": "middle"}, 400, "invalid_value", "truncation"),
        ({"stream_options": {"include_obfuscation": True}}, 400, "invalid_value", "stream_options"),
        ({"input": "REFUSE"}, 429, "queue_full", None),
        ({"input": "REFUSE", "stream": True}, 429, "queue_full", None),
        ({"input": "FAIL"}, 500, "engine_error", None),
    ],
)
def test_every_error(
    gateway: GatewayUnderTest, fields: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    answer = gateway.http.post("/v1/responses", json={"model": MODEL_NAME, "input": "hello", **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code), error
    assert param is None or error["param"] == param, error
    assert param is None or param in error["message"]


def test_what_promises_nothing_is_accepted(client: openai.OpenAI) -> None:
    answer = ask(
        client,
        max_output_tokens=1,
        text={"format": {"type": "text"}, "verbosity": "low"},
        reasoning={"effort": "low", "summary": "auto"},
        include=["reasoning.encrypted_content"],
        tools=[],
        tool_choice="none",
        parallel_tool_calls=False,
        background=False,
        prompt_cache_key="k",
        safety_identifier="s",
        service_tier="auto",
        extra_body={"client_metadata": {"a": 1}, "whatever": [1]},
    )
    assert (answer.prompt_cache_key, answer.safety_identifier, answer.tool_choice) == ("k", "s", "none")
    assert (answer.reasoning.effort, answer.text.verbosity, answer.parallel_tool_calls) == ("low", "low", False)


def test_a_stored_response_cannot_be_cancelled_or_streamed(client: openai.OpenAI) -> None:
    id = ask(client, max_output_tokens=1).id
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(id)
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.retrieve(id, stream=True)


def test_a_failure_in_the_middle_of_a_stream(client: openai.OpenAI) -> None:
    *_, delta, error, failed = ask(client, input="FAIL", stream=True)
    assert (delta.type, delta.delta) == ("response.output_text.delta", "so far ")
    assert (error.type, error.code, error.message) == ("error", "engine_error", "the model failed on this request")
    assert (failed.type, failed.response.status, failed.response.store) == ("response.failed", "failed", False)
    assert failed.response.error.code == "server_error" and failed.sequence_number == error.sequence_number + 1
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(failed.response.id)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_the_work(fresh: GatewayUnderTest, stream: bool) -> None:
    generation = fresh.generation
    assert generation
    body = json.dumps({"model": MODEL_NAME, "input": "hello", "stream": stream}).encode()
    head = "POST /v1/responses HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", fresh.port)) as connection:
        connection.sendall(head.encode() + body)
        eventually(lambda: len(generation.submits) == 1)
    eventually(lambda: generation.aborts == [generation.submits[0].uid], within_s=1)


ITEM = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(
            ["message", "function_call", "function_call_output", "reasoning", "item_reference", "x"]
        ),
        "role": st.sampled_from(["user", "assistant", "system", "developer", "tool"]),
        "content": st.text(max_size=8)
        | st.lists(
            st.fixed_dictionaries(
                {
                    "type": st.sampled_from(["input_text", "output_text", "refusal", "input_image"]),
                    "text": st.text(max_size=4),
                }
            ),
            max_size=2,
        ),
        "output": st.text(max_size=8),
        "id": st.text(max_size=8),
        "call_id": st.text(max_size=4),
        "name": st.text(max_size=4),
        "arguments": st.text(max_size=8),
        "summary": st.lists(
            st.fixed_dictionaries({"type": st.just("summary_text"), "text": st.text(max_size=4)}), max_size=2
        ),
    },
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=80, deadline=None)
@given(
    items=st.lists(ITEM, max_size=4) | st.text(max_size=8),
    field=st.sampled_from(sorted({*ResponseRequest.model_fields} - {"stream"})),
    value=ANYTHING,
)
def test_no_items_and_no_values_are_too_much(gateway: GatewayUnderTest, items: Any, field: str, value: Any) -> None:
    body = {"model": MODEL_NAME, "input": items, "max_output_tokens": 1, field: value}
    for path in ("/v1/responses", "/v1/responses/input_tokens"):
        content = json.dumps(body).encode()
        answer = gateway.http.post(path, content=content, headers={"content-type": "application/json"})
        assert answer.status_code in (200, 400, 404), answer.text
        if answer.status_code != 200:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        elif path == "/v1/responses" and answer.json()["store"]:
            id = answer.json()["id"]
            assert gateway.http.get(f"/v1/responses/{id}").json() == answer.json()
            assert gateway.http.get(f"/v1/responses/{id}/input_items").status_code == 200
