"""The greeting's snippets, as the programs that a user pastes them into see them."""

import ast
import json
import shlex

import pytest

from tokenllm.config import ServeConfig
from tokenllm.control import ModelReady
from tokenllm.supervisor.greeting import KEY_PLACEHOLDER, greeting

READY = ModelReady(1, 1000, 500)
NAMES = ["smollm2-135m-instruct", 'it\'s "quoted" $HOME `ls`', "näme/模型"]


def parts(config: ServeConfig, name: str) -> tuple[list[str], str, str]:
    _, curl, python, last = greeting(config, 8123, name, READY).split("\n\n")
    return shlex.split(curl), python, last


@pytest.mark.parametrize("name", NAMES)
def test_curl_survives_the_shell(name: str) -> None:
    curl, _, _ = parts(ServeConfig(), name)
    assert curl[:2] == ["curl", "http://127.0.0.1:8123/v1/chat/completions"]
    assert json.loads(curl[curl.index("-d") + 1])["model"] == name


@pytest.mark.parametrize("name", NAMES)
def test_python_names_the_model_and_the_address(name: str) -> None:
    strings = {
        node.value for node in ast.walk(ast.parse(parts(ServeConfig(), name)[1])) if isinstance(node, ast.Constant)
    }
    assert {name, "http://127.0.0.1:8123/v1"} <= strings


def test_a_key_is_only_hinted_at() -> None:
    config = ServeConfig(api_key="sesame")
    text = greeting(config, 8123, "m", READY)
    assert "sesame" not in text
    assert f"Authorization: Bearer {KEY_PLACEHOLDER}" in parts(config, "m")[0]
    assert KEY_PLACEHOLDER not in greeting(ServeConfig(), 8123, "m", READY)


@pytest.mark.parametrize(
    ("host", "reachable"),
    [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("::1", "[::1]"), ("10.0.0.2", "10.0.0.2"), ("localhost", "localhost")],
)
def test_the_last_line_is_an_address_that_can_be_reached(host: str, reachable: str) -> None:
    assert parts(ServeConfig(host=host), "m")[2] == f"tokenllm serves at http://{reachable}:8123/v1"
