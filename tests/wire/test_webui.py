"""What a chat page with many tools sends is answered, whether or not the model's template knows tools."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import webui_bodies
from fake_generation import MODEL_NAME, GatewayUnderTest, events

QWEN = Path(__file__).parents[1] / "data" / "templates" / "qwen2.5.jinja"
URL = "/v1/chat/completions"


def streamed(gateway: GatewayUnderTest, body: dict[str, Any]) -> list[Any]:
    with gateway.http.stream("POST", URL, json=body) as response:
        assert response.status_code == 200, response.read()
        *chunks, done = events(response.iter_lines())
    assert done == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


def test_bodies_are_as_large_as_theirs() -> None:
    assert len(webui_bodies.tools()) == 36
    assert 24_000 < len(json.dumps(webui_bodies.tools())) < 40_000


def test_chats_with_36_tools_stream(fresh: GatewayUnderTest) -> None:
    assert fresh.generation
    for body in (webui_bodies.chat(MODEL_NAME), webui_bodies.after_a_call(MODEL_NAME)):
        chunks = streamed(fresh, body | {"max_tokens": 5})
        assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == "0 1 2 3 4 "
        prompt = fresh.generation.prompt(fresh.generation.submits[-1])
        assert "capital of France" in prompt and "search_note" not in prompt


def test_tasks_are_answered(gateway: GatewayUnderTest) -> None:
    for body in webui_bodies.tasks(MODEL_NAME):
        answer = gateway.http.post(URL, json=body | {"max_tokens": 3})
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"] == "0 1 2 "


def test_a_template_that_knows_tools_shows_them(start: Callable[..., GatewayUnderTest]) -> None:
    gateway = start(chat_template=str(QWEN))
    generation = gateway.load_model()
    body = webui_bodies.after_a_call(MODEL_NAME) | {"max_tokens": 3}
    few = body | {"tools": body["tools"][:1]}
    streamed(gateway, few)
    prompt = generation.prompt(generation.submits[-1])
    assert json.dumps(few["tools"][0], ensure_ascii=False) in prompt
    assert '<tool_call>\n{"name": "search_note", "arguments": {"query": "France"}}\n</tool_call>' in prompt
    refused = gateway.http.post(URL, json=body)  # the context of this test's model has no room for all of them
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    streamed(gateway, body | {"tool_choice": "none"})
    assert "search_folder" not in generation.prompt(generation.submits[-1])


def test_the_last_message_is_continued(fresh: GatewayUnderTest) -> None:
    assert fresh.generation
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "The answer is"}]
    body = {"model": MODEL_NAME, "messages": messages, "continue_final_message": True, "max_tokens": 1}
    assert fresh.http.post(URL, json=body).status_code == 200
    assert fresh.generation.prompt(fresh.generation.submits[-1]).endswith("<|im_start|>assistant\nThe answer is")
    count = fresh.http.post("/tokenize", json={key: body[key] for key in ("messages", "continue_final_message")})
    assert count.json()["count"] == len(fresh.generation.submits[-1].prompt) // 4
