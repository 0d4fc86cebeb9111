"""A real gateway process: clients that leave, models that die, keys, drains and everything malformed."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import psutil
import pytest
from fake_generation import MODEL_LEN, MODEL_NAME, GatewayUnderTest, events, eventually, words
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenllm.control import Drain
from tokenllm.gateway.app import ENDPOINTS
from tokenllm_schemas.requests import ChatCompletionRequest

CHAT = {"model": MODEL_NAME, "messages": [{"role": "user", "content": "hello"}]}
Start = Callable[..., GatewayUnderTest]


def fetch(method: str, url: str, **request: Any) -> httpx.Response:
    return httpx.request(method, url, verify=False, timeout=20, **request)  # to load certificates takes long


def post(gateway: GatewayUnderTest, path: str = "/v1/chat/completions", **fields: Any) -> httpx.Response:
    return fetch("POST", gateway.url + path, json={**CHAT, **fields})


@contextmanager
def streaming(gateway: GatewayUnderTest, **fields: Any) -> Iterator[httpx.Response]:
    url = gateway.url + "/v1/chat/completions"
    with httpx.stream("POST", url, json={**CHAT, "stream": True, **fields}, timeout=20, verify=False) as response:
        yield response


def raw(gateway: GatewayUnderTest, request: bytes, wait_s: float = 5) -> bytes:
    """What comes back for these bytes, until the gateway closes the connection."""
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=wait_s) as connection:
        connection.sendall(request)
        received = b""
        while part := connection.recv(65536):
            received += part
    return received


def chat_bytes(head: str = "", **fields: Any) -> bytes:
    body = json.dumps({**CHAT, **fields}).encode()
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{head}"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body


def all_have_ended(gateway: GatewayUnderTest) -> bool:
    assert gateway.generation
    return gateway.finished() == len(gateway.generation.submits)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_frees_its_tokens(fresh: GatewayUnderTest, stream: bool, n: int) -> None:
    gateway, generation = fresh, fresh.generation
    assert generation
    with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
        connection.sendall(chat_bytes(stream=stream, max_tokens=500, n=n))
        eventually(lambda: len(generation.submits) == n)
    eventually(lambda: len(generation.aborts) == n, within_s=1)
    eventually(lambda: gateway.finished("abort") == n, within_s=1)
    assert sorted(generation.aborts) == sorted(submit.uid for submit in generation.submits)
    assert post(gateway, max_tokens=2).status_code == 200


def test_others_do_not_notice(fresh: GatewayUnderTest) -> None:
    gateway = fresh
    with streaming(gateway, max_tokens=300) as bystander:
        lines = bystander.iter_lines()
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
                connection.sendall(chat_bytes(stream=True, max_tokens=400))
                connection.recv(100)
        chunks = [json.loads(data) for data in events(lines) if data != "[DONE]"]
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == words(300)
    eventually(lambda: all_have_ended(gateway))


@pytest.mark.slow
def test_a_client_that_does_not_read_is_let_go(fresh: GatewayUnderTest) -> None:
    process = psutil.Process(fresh.process.pid)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", fresh.port))
        connection.sendall(chat_bytes(stream=True, n=8, logprobs=True, top_logprobs=20))
        eventually(lambda: fresh.generation and len(fresh.generation.submits) == 8)
        assert post(fresh, max_tokens=3).status_code == 200, "others do not wait for it"
        its_port = connection.getsockname()[1]
        eventually(lambda: its_port not in {one.raddr.port for one in process.net_connections() if one.raddr}, 75)
    eventually(lambda: all_have_ended(fresh))


@pytest.mark.parametrize("seed", range(3))
def test_every_request_ends_once_wherever_its_client_leaves(fresh: GatewayUnderTest, seed: int) -> None:
    gateway = fresh
    requests = []
    for number in range(20):
        connection = socket.create_connection(("127.0.0.1", gateway.port))
        request = chat_bytes(stream=number % 2 == 0, max_tokens=20 + number)
        connection.sendall(request if number % 5 else request[: 40 * number])
        requests.append(connection)
    for number, connection in enumerate(requests):
        if (number * 7 + seed) % 3:
            time.sleep(0.003)
        connection.close()
    eventually(lambda: all_have_ended(gateway))
    assert gateway.finished("length", "abort") == gateway.finished()


def test_a_model_that_dies_ends_every_stream_at_once(fresh: GatewayUnderTest) -> None:
    gateway = fresh
    answers: list[httpx.Response] = []
    waiting = threading.Thread(target=lambda: answers.append(post(gateway, max_tokens=500)))
    with streaming(gateway, max_tokens=500) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        waiting.start()
        eventually(lambda: gateway.generation and len(gateway.generation.submits) == 2)
        gateway.kill_model()
        *_, error, done = events(lines)
    assert done == "[DONE]"
    assert json.loads(error)["error"] == {
        "message": "the model process died; try again",
        "type": "server_error",
        "param": None,
        "code": "engine_error",
    }
    waiting.join(5)
    assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "engine_error")
    assert gateway.finished("error") == 2
    assert fetch("GET", gateway.url + "/health/ready").status_code == 503
    assert fetch("GET", gateway.url + "/health/live").status_code == 200
    refused = post(gateway)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "loading")
    assert "retry-after" in refused.headers
    gateway.load_model()
    assert fetch("GET", gateway.url + "/health/ready").status_code == 200
    assert post(gateway, max_tokens=2).json()["choices"][0]["message"]["content"] == words(2)


IMPATIENT = {"x-stainless-read-timeout": "0.3"}


@pytest.mark.parametrize(("content", "stream"), [("HANG", True), ("HANG", False), ("SILENT", False), ("hello", False)])
def test_nobody_works_for_a_client_that_waits_no_longer(fresh: GatewayUnderTest, content: str, stream: bool) -> None:
    asked = {**CHAT, "messages": [{"role": "user", "content": content}], "n": 2, "stream": stream}
    late = fetch("POST", fresh.url + "/v1/chat/completions", json=asked, headers=IMPATIENT)
    error = late.json()["error"]
    assert (late.status_code, error["type"], error["code"]) == (408, "timeout", "timeout")
    assert "0.3 s" in error["message"]
    eventually(lambda: fresh.finished("abort") == 2, within_s=1)


def test_a_stream_that_stalls_ends_with_an_error(fresh: GatewayUnderTest) -> None:
    asked = {**CHAT, "messages": [{"role": "user", "content": "STALL"}], "stream": True}
    late = fetch("POST", fresh.url + "/v1/chat/completions", json=asked, headers=IMPATIENT)
    *chunks, error, done = events(iter(late.text.splitlines()))
    assert late.status_code == 200 and "so far" in chunks[-1]
    assert (json.loads(error)["error"]["code"], done) == ("timeout", "[DONE]")
    assert not any(json.loads(chunk)["choices"][0]["finish_reason"] for chunk in chunks), "no false reason"
    eventually(lambda: fresh.finished("abort") == 1, within_s=1)


@pytest.mark.parametrize("timeout", ["0.3", "600", "-1", "0", "nan", "inf", "None", "", "1e999"])
def test_a_stream_that_moves_on_may_last(fresh: GatewayUnderTest, timeout: str) -> None:
    headers = {"x-stainless-read-timeout": timeout}
    asked = {**CHAT, "max_tokens": 250 if timeout == "0.3" else 2, "stream": True}
    answer = fetch("POST", fresh.url + "/v1/chat/completions", json=asked, headers=headers)
    assert answer.text.endswith("data: [DONE]\n\n") and '"length"' in answer.text


def test_a_drain_lets_streams_finish_and_ends_the_process(start: Start) -> None:
    gateway = start()
    gateway.load_model(step_s=0.01)
    with httpx.Client(verify=False) as keeping_alive, streaming(gateway, max_tokens=60) as response:
        assert keeping_alive.get(gateway.url + "/health/ready").status_code == 200
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        gateway.tell(Drain())
        eventually(lambda: keeping_alive.get(gateway.url + "/health/ready").status_code == 503)
        refused = post(gateway)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert refused.headers["connection"] == "close"
        chunks = events(lines)
    assert chunks[-1] == "[DONE]" and json.loads(chunks[-2])["choices"][0]["finish_reason"] == "length"
    assert gateway.process.wait(5) == 0


def test_a_drain_has_an_end(start: Start) -> None:
    gateway = start(drain_s=0.2)
    gateway.load_model(step_s=0.05)
    with streaming(gateway, max_tokens=500) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        gateway.tell(Drain())
        *_, error, done = events(lines)
    assert (json.loads(error)["error"]["code"], done) == ("draining", "[DONE]")
    assert gateway.process.wait(6) == 0


def test_without_a_supervisor_there_is_no_gateway(start: Start) -> None:
    gateway = start()
    gateway._control.close()
    assert gateway.process.wait(5) == 1


def _paths() -> list[tuple[str, str]]:
    return [(endpoint.method, endpoint.path.replace("{id:path}", MODEL_NAME)) for endpoint in ENDPOINTS]


FIELDS = sorted({*ChatCompletionRequest.model_fields} - {"stream"})
OPEN = {"/health/live", "/health/ready", "/docs"}


@pytest.fixture(scope="module")
def keyed(default_model: Any, tokenizer: Any) -> Iterator[GatewayUnderTest]:
    under_test = GatewayUnderTest(default_model, tokenizer, api_key="the-key")
    under_test.load_model()
    yield under_test
    under_test.close()


@pytest.mark.parametrize(("method", "path"), [*_paths(), ("GET", "/unknown"), ("DELETE", "/v1/models"), ("GET", "/")])
def test_every_path_but_health_needs_the_key(keyed: GatewayUnderTest, method: str, path: str) -> None:
    for authorization in (None, "Bearer the-ke", "Bearer", "the-key", b"Bearer \xc3\xa9"):
        for host in ("x", "x/health/live?y="):
            headers: dict[str, Any] = {"host": host}
            if authorization is not None:
                headers["authorization"] = authorization
            answer = fetch(method, keyed.url + path, headers=headers)
            assert answer.status_code == (200 if path in OPEN else 401)
            assert path in OPEN or answer.json()["error"]["type"] == "authentication_error"
    let_in = fetch(method, keyed.url + path, headers={"authorization": "Bearer the-key"}, json={})
    assert let_in.status_code in (200, 400, 404, 405)


def test_paths_that_only_look_open_need_the_key(keyed: GatewayUnderTest) -> None:
    for target in (
        "//health/live",
        "/health/live/",
        "/health%2flive",
        "/HEALTH/LIVE",
        "/v1/../health/live",
        "/health/live%00",
    ):
        answer = raw(keyed, f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 401 " if target != "/health%2flive" else b"HTTP/1.1 "), target


def test_upgrades_lead_nowhere(keyed: GatewayUnderTest) -> None:
    upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    upgrade += "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    assert raw(keyed, f"GET /v1/models HTTP/1.1\r\nHost: x\r\n{upgrade}\r\n".encode()).startswith(b"HTTP/1.1 403 ")


@pytest.mark.parametrize(
    ("path", "status", "allow"),
    [
        ("/nowhere", 404, None),
        ("/v1/chat/completions/", 404, None),
        ("/v1/chat/completions", 405, "POST"),
    ],
)
def test_wrong_paths_and_methods_have_the_envelope(
    gateway: GatewayUnderTest, path: str, status: int, allow: str | None
) -> None:
    answer = fetch("GET", gateway.url + path)
    assert answer.status_code == status and answer.headers.get("allow") == allow
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"]


def test_head_has_no_body(gateway: GatewayUnderTest) -> None:
    answer = fetch("HEAD", gateway.url + "/v1/models")
    assert (answer.status_code, answer.content) == (200, b"")


def test_large_bodies(gateway: GatewayUnderTest) -> None:
    too_large = b" " * (5 * 2**20)
    announced = fetch(
        "POST", gateway.url + "/tokenize", content=too_large, headers={"content-type": "application/json"}
    )
    assert announced.status_code == 413
    parts = (too_large[i : i + 2**16] for i in range(0, len(too_large), 2**16))
    chunked = fetch("POST", gateway.url + "/tokenize", content=parts, headers={"content-type": "application/json"})
    assert (chunked.status_code, chunked.json()["error"]["code"]) == (413, "request_too_large")
    text = "word " * 200_000
    fits = fetch("POST", gateway.url + "/tokenize", json={"prompt": text})
    assert fits.json()["count"] == len(fits.json()["tokens"]) > 200_000


@pytest.mark.parametrize(("path", "param"), [("/v1/chat/completions", "messages"), ("/v1/completions", "prompt")])
def test_text_that_cannot_fit_is_refused_before_it_is_tokenized(
    gateway: GatewayUnderTest, path: str, param: str
) -> None:
    text = "a" * 1_000_000
    before = time.monotonic()
    answer = post(gateway, path, messages=[{"role": "user", "content": text}], prompt=text)
    assert time.monotonic() - before < 1
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)


def test_text_that_no_tokenizer_takes_is_the_clients_fault(gateway: GatewayUnderTest) -> None:
    answer = fetch("POST", gateway.url + "/tokenize", json={"prompt": " " * 200_000})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


def test_text_without_a_token_is_refused(gateway: GatewayUnderTest) -> None:
    for prompt in ("\x04", ["hello", "\x04"], [[5], []], []):
        answer = post(gateway, "/v1/completions", prompt=prompt)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "invalid_value"), prompt
        assert error["param"].startswith("prompt"), prompt
    assert fetch("POST", gateway.url + "/tokenize", json={"prompt": "\x04"}).json()["tokens"] == []


def test_a_body_that_never_ends_is_cut(gateway: GatewayUnderTest) -> None:
    head = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 999999999\r\n\r\n"
    answer = raw(gateway, head)  # it does not wait for the body
    assert answer.startswith(b"HTTP/1.1 413 ") and b'"request_too_large"' in answer


AS_JSON = "Content-Type: application/json\r\n"
POST_TOKENIZE = "POST /tokenize HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}", b"415"),
        (b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}", b"415"),
        (f"{POST_TOKENIZE}Content-Type: application/jsonp\r\nContent-Length: 2\r\n\r\n{{}}".encode(), b"415"),
        (f"{POST_TOKENIZE}{AS_JSON}Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{{}}".encode(), b"415"),
        (
            f"{POST_TOKENIZE}Content-Type: Application/JSON; charset=utf-8\r\nContent-Length: 2\r\n\r\n{{}}".encode(),
            b"400",
        ),
        (b"POST /version HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}", b"405"),
        (b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}", b"404"),
        (
            b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 2\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
            b"400",
        ),
        (b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n", b"405"),
        (b"TRACE / HTTP/1.1\r\nHost: x\r\n\r\n", b"405"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 200_000 + b"\r\n\r\n", b"431"),
        (b"nonsense\r\n\r\n", b"400"),
    ],
)
def test_malformed_requests(gateway: GatewayUnderTest, head: bytes, status: bytes) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=5) as connection:
        connection.sendall(head)
        answer = connection.recv(65536)
    assert answer.split(b" ")[1] == status, answer


def test_http2_without_tls_is_refused(gateway: GatewayUnderTest) -> None:
    import h2.connection
    import h2.events

    connection = h2.connection.H2Connection()
    connection.initiate_connection()
    headers = [(":method", "GET"), (":path", "/health/live"), (":scheme", "http"), (":authority", "x")]
    connection.send_headers(1, headers, end_stream=True)
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=5) as plain:
        plain.sendall(connection.data_to_send())
        while True:
            for event in connection.receive_data(plain.recv(65536)):
                if isinstance(event, h2.events.ResponseReceived):
                    assert dict(event.headers)[b":status"] == b"505"
                    return


def test_pipelined_requests_are_answered_in_order(gateway: GatewayUnderTest) -> None:
    close = chat_bytes("Connection: close\r\n", max_tokens=2)
    answers = raw(gateway, chat_bytes(max_tokens=1) + close)
    assert answers.count(b"HTTP/1.1 200 ") == 2
    assert answers.index(b'"content":"0 "') < answers.index(b'"content":"0 1 "')


def test_a_full_queue_is_said_early(fresh: GatewayUnderTest) -> None:
    gateway = fresh
    gateway.scheduler_page.set("tokenllm_requests_waiting", 3)
    refused = post(gateway, n=3)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    many = post(gateway, "/v1/completions", prompt=["a", "b"], n=2)
    assert many.status_code == 429
    gateway.refused_early = 3 + 4 + 1
    assert gateway.finished("refused") == gateway.refused_early - 1
    assert refused.json()["error"]["type"] == "rate_limit_error" and refused.headers["retry-after"] == "1"
    gateway.scheduler_page.set("tokenllm_retry_after_seconds", 7)
    assert post(gateway).headers["retry-after"] == "7"
    gateway.scheduler_page.set("tokenllm_retry_after_seconds", 0)
    gateway.scheduler_page.set("tokenllm_requests_waiting", 2)
    assert post(gateway, max_tokens=1).status_code == 200
    gateway.scheduler_page.set("tokenllm_requests_waiting", 0)


def test_readiness_is_progress(fresh: GatewayUnderTest) -> None:
    gateway = fresh

    def ready() -> int:
        return fetch("GET", gateway.url + "/health/ready").status_code

    gateway.kill_model()
    eventually(lambda: ready() == 503)
    gateway.load_model()
    assert ready() == 200
    gateway.scheduler_page.set("tokenllm_requests_running", 1)
    gateway.scheduler_page.set("tokenllm_last_step_monotonic_seconds", time.monotonic() - 31)
    assert ready() == 503
    gateway.scheduler_page.set("tokenllm_last_step_monotonic_seconds", time.monotonic() - 1)
    assert ready() == 200
    gateway.scheduler_page.set("tokenllm_requests_running", 0)


def test_the_numbers_of_requests(fresh: GatewayUnderTest) -> None:
    def numbers() -> dict[str, float]:
        lines = fetch("GET", fresh.url + "/metrics").text.splitlines()
        return {name: float(number) for name, number in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    before = numbers()
    post(fresh, max_tokens=5, n=2)
    after = numbers()
    assert {name: after[name] - before[name] for name in COUNTED} == COUNTED


COUNTED = {
    'tokenllm_requests_finished_total{reason="length"}': 2,
    "tokenllm_time_to_first_token_seconds_count": 2,
    "tokenllm_inter_token_latency_seconds_count": 8,
    "tokenllm_request_seconds_count": 2,
}


def test_tokenize_and_detokenize(gateway: GatewayUnderTest) -> None:
    tokens = fetch("POST", gateway.url + "/tokenize", json={"model": MODEL_NAME, "prompt": "hello wörld 🦊"}).json()
    assert tokens["count"] == len(tokens["tokens"]) and tokens["max_model_len"] == MODEL_LEN
    text = fetch("POST", gateway.url + "/detokenize", json={"model": MODEL_NAME, "tokens": tokens["tokens"]}).json()
    assert text == {"prompt": "hello wörld 🦊"}
    chat = fetch("POST", gateway.url + "/tokenize", json={"messages": CHAT["messages"]}).json()["tokens"]
    assert chat[0] == 1 and post(gateway, max_tokens=1).json()["usage"]["prompt_tokens"] == len(chat)
    unknown = fetch("POST", gateway.url + "/detokenize", json={"tokens": [49152]})
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "tokens")
    assert fetch("POST", gateway.url + "/tokenize", json={"prompt": "x", "model": "other"}).status_code == 404


WORDS = st.text(max_size=20) | st.sampled_from(["<|im_start|>", "<|im_end|>", "{{ 7*7 }}", "\ufdd0", "\0", "e\u0301"])
TURN = st.fixed_dictionaries({"role": st.sampled_from(["system", "developer", "user", "assistant", "tool"])}).flatmap(
    lambda turn: WORDS.map(lambda text: {**turn, "content": text})
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(messages=st.lists(TURN, max_size=4), field=st.sampled_from(FIELDS), value=ANYTHING)
def test_no_words_and_no_values_are_too_much(
    gateway: GatewayUnderTest, messages: list[Any], field: str, value: Any
) -> None:
    content = json.dumps({**CHAT, "messages": messages, "max_tokens": 1, field: value}).encode()
    answer = gateway.http.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_the_description_names_every_endpoint(gateway: GatewayUnderTest) -> None:
    described = fetch("GET", gateway.url + "/openapi.json").json()
    operations = {(method.upper(), path) for path, methods in described["paths"].items() for method in methods}
    assert operations == {(endpoint.method, endpoint.path.replace(":path", "")) for endpoint in ENDPOINTS}
    referred = set(_references(described))
    assert referred and referred <= {f"#/components/schemas/{name}" for name in described["components"]["schemas"]}
    temperature = described["components"]["schemas"]["ChatCompletionRequest"]["properties"]["temperature"]
    assert {"maximum": 2, "minimum": 0, "type": "number"}.items() <= temperature["anyOf"][0].items()


def _references(node: Any) -> Iterator[str]:
    match node:
        case dict():
            if isinstance(reference := node.get("$ref"), str):
                yield reference
            for value in node.values():
                yield from _references(value)
        case list():
            for value in node:
                yield from _references(value)


def test_the_gateway_has_no_torch() -> None:
    program = "import sys, tokenllm.gateway.__main__; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_an_error_is_no_echo_of_what_was_sent(gateway: GatewayUnderTest) -> None:
    answer = post(gateway, model="x" * 100_000)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert len(answer.content) < 1000
