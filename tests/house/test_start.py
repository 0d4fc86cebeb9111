"""How a server starts, refuses to start, drains and dies: each with a clear word, and nothing left behind."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest
from openai import OpenAI

from house import REAL, House, eventually, fake_house

Start = Callable[..., House]
SMALL_FILES = (  # a prefix of a command
    sys.executable,
    "-c",
    "import os, resource as r, sys; r.setrlimit(r.RLIMIT_FSIZE, (1 << 20,) * 2); os.execv(sys.argv[1], sys.argv[1:])",
)
SLOW_STEPS = {"FAKE_STEP_S": "0.02"}


def body(**more: object) -> dict:
    return {"model": "tiny", "prompt": "the quick", "max_tokens": 8, "seed": 1, "ignore_eos": True, **more}


class Stream(threading.Thread):
    """Reads one stream to its end."""

    def __init__(self, url: str, **more: object) -> None:
        super().__init__()
        self.url, self.body = url, body(stream=True, **more)
        self.lines: list[str] = []
        self.lost: httpx.TransportError | None = None
        self.start()

    def run(self) -> None:
        try:
            with httpx.stream("POST", f"{self.url}/v1/completions", json=self.body, timeout=60) as response:
                assert response.status_code == 200, response.read()
                self.lines += (line for line in response.iter_lines() if line)
        except httpx.TransportError as error:
            self.lost = error

    def begun(self) -> "Stream":
        eventually("the first event", lambda: self.lines)
        return self

    @property
    def text(self) -> str:
        events = [json.loads(line.removeprefix("data: ")) for line in self.lines if line != "data: [DONE]"]
        return "".join(choice["text"] for event in events for choice in event["choices"])


@pytest.fixture(scope="module")
def house(start_once: Start) -> House:
    """One server for all tests that do not end it."""
    return start_once({**SLOW_STEPS, "FAKE_LOAD_S": "0.5"}, gateway_processes=2).wait_greeted()


def test_the_sdk_streams_and_completes(house: House) -> None:
    client = OpenAI(base_url=house.url + "/v1", api_key="none", max_retries=0)
    question = {"model": "tiny", "prompt": "the quick", "max_tokens": 8, "seed": 1, "extra_body": {"ignore_eos": True}}
    whole = client.completions.create(**question)
    chunks = list(client.completions.create(**question, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert (whole.choices[0].finish_reason, whole.usage.completion_tokens) == ("length", 8)
    answer = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hello"}], max_tokens=8)
    assert answer.choices[0].message.role == "assistant"


def test_only_the_scheduler_process_has_torch(house: House) -> None:
    for process in (house.ps, *house.members("gateway"), *house.members("detokenizer")):
        assert not [line.path for line in process.memory_maps() if "torch" in line.path]


def test_ctrl_c_reaches_the_supervisor_alone(house: House) -> None:
    """A terminal sends it to every process of the group."""
    assert {os.getpgid(child.pid) for child in house.family()}.isdisjoint({os.getpgid(house.process.pid)})


@pytest.mark.parametrize("role", ["scheduler", "detokenizer"])
def test_streams_of_a_dead_generation_end_with_an_error_and_a_new_one_serves(house: House, role: str) -> None:
    earlier = house.metrics()
    before = httpx.post(house.url + "/v1/completions", json=body()).json()["choices"]
    stream = Stream(house.url, max_tokens=1000).begun()
    members = house.members("scheduler") + house.members("detokenizer")
    house.members(role)[0].kill()
    stream.join(2)
    assert not stream.is_alive(), "the stream ends at once"
    eventually(
        "no memory while a new one loads", lambda: house.metrics()["tokenllm_kv_tokens_capacity"] == 0, within_s=2
    )
    assert '"error"' in "".join(stream.lines[-2:])
    assert not any('"finish_reason":"' in line for line in stream.lines)
    eventually("a new one", lambda: len(house.family()) == 4 and not any(old in house.family() for old in members))
    house.wait_ready()
    assert httpx.post(house.url + "/v1/completions", json=body()).json()["choices"] == before
    for name in ("tokenllm_restarts_total", 'tokenllm_requests_finished_total{reason="error"}'):
        assert house.metrics()[name] - earlier[name] == 1


def test_a_dead_gateway_takes_only_its_own_streams_along(house: House) -> None:
    alone = Stream(house.url, max_tokens=100)
    alone.join()
    generated = house.metrics()["tokenllm_generation_tokens_total"]
    streams = [Stream(house.url, max_tokens=100) for _ in range(16)]
    for stream in streams:
        stream.begun()
    old = {role: house.members(role) for role in ("scheduler", "detokenizer", "gateway")}
    old["gateway"][0].kill()
    for stream in streams:
        stream.join()
    lost = [stream for stream in streams if stream.lost]
    assert 0 < len(lost) < 16, "the kernel spreads connections over both gateways"
    assert all(stream.text == alone.text for stream in streams if not stream.lost)
    eventually("a successor", lambda: len(house.members("gateway")) == 2)
    eventually("no tokens are held", lambda: house.metrics()["tokenllm_kv_tokens_active"] == 0, within_s=5)
    generated = house.metrics()["tokenllm_generation_tokens_total"] - generated
    assert generated < 16 * 100, "nobody generates for the dead"
    house.wait_ready()
    assert house.members("scheduler") + house.members("detokenizer") == old["scheduler"] + old["detokenizer"]
    assert old["gateway"][1] in house.members("gateway")


def test_a_second_server_on_the_same_port_leaves_the_first_alone(house: House, start: Start) -> None:
    second = start(port=int(house.url.rpartition(":")[2]))
    assert second.wait(10) == 1
    assert "Address already in use" in second.log
    for _ in range(8):
        assert httpx.post(house.url + "/v1/completions", json=body()).status_code == 200


def test_a_gateway_that_does_not_read_delays_nobody_else_and_misses_nothing(start: Start) -> None:
    fast = {"FAKE_STEP_S": "0.003"}
    house = start(
        fast, gateway_processes=2, ring_bytes=1 << 16, max_running_requests=64, max_total_tokens=1 << 15
    ).wait_greeted()
    streams = [Stream(house.url, max_tokens=1000) for _ in range(16)]
    for stream in streams:
        stream.begun()
    stopped = house.members("gateway")[0]
    stopped.suspend()
    eventually("the other gateway's streams end", lambda: any(not stream.is_alive() for stream in streams))
    assert any(stream.is_alive() for stream in streams), "some belong to the one that was stopped"
    stopped.resume()  # by now its ring was full for long: its streams' deltas take twice as much room
    for stream in streams:
        stream.join(10)
    assert len({stream.text for stream in streams}) == 1
    assert all(stream.lines[-1] == "data: [DONE]" for stream in streams)


def test_a_drain_lets_streams_finish_and_takes_no_new_ones(start: Start) -> None:
    house = start(SLOW_STEPS, drain_s=20).wait_greeted()
    stream = Stream(house.url, max_tokens=150).begun()
    house.signal(signal.SIGTERM)
    eventually("unready", lambda: house.status("/health/ready") == 503, within_s=2)
    assert httpx.post(house.url + "/v1/completions", json=body()).status_code == 503
    stream.join()
    assert stream.lines[-1] == "data: [DONE]"
    assert any('"finish_reason":"length"' in line for line in stream.lines)
    assert house.wait(8) == 0
    assert not house.family()


def test_the_end_of_a_drain_ends_what_still_runs(start: Start) -> None:
    house = start(SLOW_STEPS, drain_s=0.3).wait_greeted()
    stream = Stream(house.url, max_tokens=1000).begun()
    house.signal(signal.SIGINT)
    stream.join(5)
    assert '"error"' in "".join(stream.lines[-2:])
    assert house.wait(5) == 0
    assert not house.family()


@pytest.mark.slow
def test_a_gateway_that_hangs_does_not_hold_up_the_end(start: Start) -> None:
    house = start(drain_s=0).wait_greeted()
    house.members("gateway")[0].suspend()
    house.signal(signal.SIGTERM)
    assert house.wait(8) == 0
    assert not house.family()


def test_a_second_signal_ends_everything_at_once(start: Start) -> None:
    house = start(SLOW_STEPS).wait_greeted()
    stream = Stream(house.url, max_tokens=1000).begun()
    house.signal(signal.SIGTERM)
    eventually("the drain", lambda: "running streams have" in house.log, within_s=2)
    house.family()
    house.signal(signal.SIGTERM)
    assert house.wait(3) == 128 + signal.SIGTERM
    assert not house.family()
    stream.join(3)


def test_a_signal_while_loading_ends_everything(start: Start) -> None:
    house = start({"FAKE_LOAD_S": "60"})
    eventually("the scheduler", lambda: house.members("scheduler"))
    house.signal(signal.SIGTERM)
    assert house.wait(3) == 0
    assert not house.family()


def test_a_generation_that_was_never_ready_ends_the_server(start: Start) -> None:
    house = start({"FAKE_LOAD_S": "60"})
    eventually("the scheduler", lambda: house.members("scheduler"))
    house.members("scheduler")[0].kill()
    assert house.wait(5) == 128 + signal.SIGKILL
    assert "the scheduler was killed by SIGKILL before the model was ready" in house.log
    assert not house.family()


def test_a_generation_that_was_ready_a_moment_ago_is_replaced(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    house = start({"FAKE_LOAD_S": "1"}, port=port)
    eventually("the scheduler", lambda: house.members("scheduler"))
    scheduler = house.members("scheduler")[0]
    scheduler.suspend()
    eventually("the gateway", lambda: healthy(port, "live"))
    house.ps.suspend()  # so that it hears of the readiness and of the death at once
    scheduler.resume()
    eventually("readiness", lambda: healthy(port, "ready"))
    scheduler.kill()
    eventually("its death", lambda: scheduler.status() == psutil.STATUS_ZOMBIE)
    house.ps.resume()
    house.wait_greeted()
    assert house.metrics()["tokenllm_restarts_total"] == 1


def healthy(port: int, what: str) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health/{what}").status_code == 200
    except httpx.TransportError:
        return False


def test_a_gateway_that_never_serves_ends_the_server(start: Start, tmp_path: Path) -> None:
    (tmp_path / "broken.jinja").write_text("{% for %}")
    house = start(chat_template=str(tmp_path / "broken.jinja"))
    assert house.wait(30) == 1
    assert "gateway 0 ended with exit code 1 before it served, twice in a row" in house.log
    assert not house.family()


def test_nothing_outlives_the_supervisor(start: Start) -> None:
    house = start(SLOW_STEPS, gateway_processes=2).wait_greeted()
    family, port = house.family(), int(house.url.rpartition(":")[2])
    assert len(family) == 4
    house.process.kill()
    house.wait()
    eventually("no children", lambda: not house.family(), within_s=2)
    assert start(port=port).wait_greeted().status("/health/live") == 200


def test_a_port_in_use_is_a_clear_error(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        number = other.getsockname()[1]
        house = start(port=number)
        assert house.wait(10) == 1
    assert house.log == f"tokenllm: cannot listen on 127.0.0.1 port {number}: Address already in use\n"


def test_too_little_memory_for_the_rings_is_a_clear_error(tiny_model: Path, tmp_path: Path) -> None:
    house = fake_house(tiny_model, tmp_path / "log", prefix=SMALL_FILES)
    assert house.wait(10) == 1
    assert house.log.startswith("tokenllm: too little memory for 3 rings of 16777216 bytes (--ring-bytes): ")


def tokenllm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*REAL, *arguments, "--port", "0"], capture_output=True, text=True, timeout=60, check=False)


def test_a_model_that_is_not_there_is_named() -> None:
    ended = tokenllm("no/such/model.gguf")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "no/such/model.gguf" in ended.stderr


def test_a_folder_without_weights_is_named(tiny_model: Path) -> None:
    ended = tokenllm(str(tiny_model))
    assert ended.returncode == 1
    assert f"{tiny_model}: holds no weights" in ended.stderr


@pytest.mark.slow
def test_a_truncated_safetensors_file_is_named(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (folder / "model.safetensors").write_bytes((1000).to_bytes(8, "little") + b'{"lm_head.weight":')
    ended = tokenllm(str(folder))
    assert ended.returncode == 1
    assert str(folder / "model.safetensors") in ended.stderr
    assert "Traceback" not in ended.stderr


def test_no_start_on_a_reachable_address_without_a_key() -> None:
    ended = tokenllm("--host", "0.0.0.0")
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1


def test_a_truncated_weights_file_is_named(default_model: Path, tmp_path: Path) -> None:
    truncated = tmp_path / "truncated.gguf"
    with default_model.open("rb") as whole:
        truncated.write_bytes(whole.read(20 << 20))
    ended = tokenllm(str(truncated))
    assert ended.returncode not in (0, 2)
    assert str(truncated) in ended.stderr
    assert "Traceback" not in ended.stderr
