"""The OpenAPI document is true: schemathesis asks every operation what the document allows, and what it does not."""

import json
import re
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from fake_generation import MODEL_NAME, GatewayUnderTest

from tokenllm.gateway.app import ENDPOINTS
from tokenllm.gateway.docs import CONTENT_SECURITY_POLICY
from tokenllm.gateway.openapi import document, statuses

KEY = "the-key"
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "ignored_auth",
    "negative_data_rejection",
)
FEW, MANY = 2, 100  # examples of each operation, beside those for each field and each limit


def described() -> dict[str, Any]:
    return json.loads(document(ENDPOINTS))


def references(node: Any) -> Iterator[str]:
    match node:
        case dict():
            if isinstance(reference := node.get("$ref"), str):
                yield reference
            for value in node.values():
                yield from references(value)
        case list():
            for value in node:
                yield from references(value)


def with_a_model_that_exists(whole: dict[str, Any]) -> dict[str, Any]:
    """Hardly a name that is made up is the model's, and who asks for another one is told nothing else."""
    for name, schema in whole["components"]["schemas"].items():
        if name.endswith("Request"):
            optional = [] if "model" in schema.get("required", []) else [None]
            schema["properties"]["model"] = {"enum": [MODEL_NAME, *optional]}
    return whole


@pytest.fixture
def keyed(start: Callable[..., GatewayUnderTest]) -> GatewayUnderTest:
    gateway = start(api_key=KEY)
    gateway.load_model(step_s=0.0001)
    return gateway


@pytest.mark.parametrize(
    ("examples", "phases"),
    [
        pytest.param(FEW, "examples,fuzzing", id="short"),
        pytest.param(MANY, "examples,coverage,fuzzing", id="long", marks=pytest.mark.slow),
    ],
)
def test_every_operation_does_what_is_described(
    keyed: GatewayUnderTest, tmp_path: Path, examples: int, phases: str
) -> None:
    file = tmp_path / "openapi.json"
    file.write_text(json.dumps(with_a_model_that_exists(described())))
    command = [sys.executable, "-m", "schemathesis.cli", "run", str(file)]
    command += ["--url", keyed.url, "--header", f"Authorization: Bearer {KEY}", "--phases", phases]
    command += ["--checks", ",".join(CHECKS), "--max-examples", str(examples), "--seed", "1", "--no-color"]
    command += [
        "--continue-on-failure",
        "--warnings",
        "off",
        "--request-timeout",
        "20",
        "--generation-database",
        "none",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = re.search(r"([0-9]+) generated", done.stdout)
    assert cases, done.stdout
    print(f"schemathesis: {cases[1]} cases")
    assert int(cases[1]) >= examples * len(ENDPOINTS) / 2
    assert keyed.process.poll() is None


def test_an_operation_has_the_statuses_that_it_can_give() -> None:
    told = {(endpoint.method, endpoint.path): set(statuses(endpoint)) for endpoint in ENDPOINTS}
    generating = {400, 401, 404, 408, 413, 415, 429, 500, 503}
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages"):
        assert told["POST", path] == generating
    assert told["POST", "/detokenize"] == generating - {429}
    assert told["GET", "/v1/models"] == told["GET", "/version"] == {401, 500, 503}
    assert told["GET", "/health/live"] == told["GET", "/docs"] == {500}
    assert told["GET", "/health/ready"] == {500, 503}


def test_every_field_of_a_request_has_a_schema_and_a_meaning() -> None:
    """A field that accepts anything would be a promise that is broken with a 400."""
    whole = described()
    for endpoint in ENDPOINTS:
        if endpoint.body:
            for name, field in whole["components"]["schemas"][endpoint.body.__name__]["properties"].items():
                assert {"type", "anyOf", "oneOf", "enum", "const", "$ref"} & set(field), (endpoint.path, name, field)
                assert field.get("description") or described_inside(field), (endpoint.path, name)


def described_inside(field: dict[str, Any]) -> bool:
    return any("description" in choice for choice in field.get("anyOf", []))


def test_a_field_that_is_not_honoured_shows_what_asks_for_nothing() -> None:
    field = described()["components"]["schemas"]["ChatCompletionRequest"]["properties"]["web_search_options"]
    assert field["enum"] == [None]


def test_the_page_runs_its_own_script_and_loads_nothing(gateway: GatewayUnderTest) -> None:
    page = gateway.http.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
    assert "default-src 'none'" in CONTENT_SECURITY_POLICY and "unsafe" not in CONTENT_SECURITY_POLICY
    for name in ("script", "style"):
        [content] = re.findall(f"<{name}>(.*?)</{name}>", page.text, re.DOTALL)
        digest = b64encode(sha256(content.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in CONTENT_SECURITY_POLICY
    assert not re.search(r"https?://|\bon\w+=|\bstyle=|innerHTML|eval\(", page.text)


def test_no_reference_leads_nowhere() -> None:
    whole = described()
    found = set(references(whole))
    assert found and found <= {f"#/components/schemas/{name}" for name in whole["components"]["schemas"]}
