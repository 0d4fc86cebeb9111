"""The embedded model answers what a chat page with 36 tools sends."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import webui_bodies

from house import REAL, House

MODEL = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def house(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    house = House([*REAL, "--port", "0", "--max-total-tokens", "9000"], tmp_path_factory.mktemp("webui") / "server.log")
    try:
        yield house.wait_greeted()
    finally:
        house.raze()


def answer(house: House, body: dict[str, Any]) -> str:
    """Of a stream, or of a whole."""
    url = f"{house.url}/v1/chat/completions"
    response = httpx.post(url, json=body | {"temperature": 0}, timeout=120)
    assert response.status_code == 200, response.text
    if not body["stream"]:
        return response.json()["choices"][0]["message"]["content"]
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    deltas = [choice["delta"] for line in lines[:-1] for choice in json.loads(line)["choices"]]
    return "".join(delta.get("content") or "" for delta in deltas)


def test_chats_and_tasks_are_answered(house: House) -> None:
    assert "Paris" in answer(house, webui_bodies.chat(MODEL) | {"max_tokens": 40})
    assert "Paris" in answer(house, webui_bodies.after_a_call(MODEL) | {"max_tokens": 60})
    for body in webui_bodies.tasks(MODEL):
        assert answer(house, body | {"max_tokens": 60}).strip()
