"""The comparison of peers: processes come and go cleanly, and a noisy sample does not count."""

import sys
import time
from pathlib import Path

import psutil
import pytest

from loadgen import processes
from loadgen.client import Answered
from loadgen.figures import summarise
from loadgen.peer_report import Life, PeersReport, Sample, markdown, plot, rows_of
from loadgen.peers import BatchPeer, HttpPeer, running
from loadgen.processes import Child, Memory, OthersClock, ProcessError, process_name
from loadgen.workload import IdsPrompt

PYTHON = sys.executable

SERVER = """
import http.server, sys
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(404 if self.path == "/nothing" else 200)
        self.end_headers()
        models = b'{"data": [{"id": "fake"}]}'
        self.wfile.write(models if self.path == "/v1/models" else b"tokenllm_kv_tokens_capacity 4096.0\\n")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Page).serve_forever()
"""

ECHO = """
import json, sys
print("ready", flush=True)
for line in sys.stdin:
    batch = json.loads(line)
    assert len({len(prompt) for prompt in batch["prompts"]}) == 1
    print(json.dumps({"token_s": [0.5 + 0.1 * n for n in range(batch["output_tokens"])]}), flush=True)
"""


def test_a_server_is_awaited_weighed_and_gone(tmp_path: Path) -> None:
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    peer = HttpPeer("fake", f"{PYTHON} {script} {{port}}", "/ready")
    with running(peer, Path("model.gguf"), tmp_path / "log") as up:
        assert 0 < up.start_s < 30
        assert up.kv_tokens == 4096
        (memory,) = up.child.memory()
        assert memory.name == "server.py"
        assert 1e6 < memory.pss_bytes <= memory.rss_bytes
    assert up.child.process.returncode is not None
    assert not psutil.pid_exists(up.child.process.pid)


def test_a_batch_child_gives_all_prompts_of_a_batch_the_same_times(tmp_path: Path) -> None:
    script = tmp_path / "echo.py"
    script.write_text(ECHO)
    with running(BatchPeer("fake", f"{PYTHON} {script}"), Path("m"), tmp_path / "log") as up:
        outcomes = up.ask([IdsPrompt([1, 2], 3)] * 5, 2)
    answers = [outcome for outcome in outcomes if isinstance(outcome, Answered)]
    assert len(answers) == 5
    assert len({answer.started_s for answer in answers}) == 3
    assert all(answer.ttft_s == 0.5 and answer.inter_token_s == pytest.approx([0.1, 0.1]) for answer in answers)


def test_a_child_that_dies_leaves_its_last_words(tmp_path: Path) -> None:
    command = [PYTHON, "-c", "raise SystemExit('no such model')"]
    with Child(command, tmp_path / "log") as child, pytest.raises(ProcessError, match="no such model"):
        child.wait_until_ready("http://127.0.0.1:9/")


def test_a_child_that_does_not_listen_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "STOP_LIMIT_S", 0.2)
    deaf = "import signal, sys; signal.signal(15, signal.SIG_IGN); print(flush=True); signal.pause()"
    with Child([PYTHON, "-c", deaf], tmp_path / "log", piped=True) as child:
        child.read_line()
    assert child.process.returncode == -9


def test_ones_own_work_and_that_of_children_is_not_the_work_of_others(tmp_path: Path) -> None:
    others, began = OthersClock(), time.monotonic()
    burn = "import time, sys\nwhile time.process_time() < 0.4: pass\nprint(flush=True)\nsys.stdin.read()"
    with Child([PYTHON, "-c", burn], tmp_path / "log", piped=True) as child:
        used = time.process_time()
        while time.process_time() < used + 0.3:
            pass
        child.read_line()
        cores, own_s = others.cores(), processes.own_s() - others.own
        assert own_s > 0.6
        assert cores <= psutil.cpu_count() - own_s / (time.monotonic() - began) + 0.2


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["/x/python3.11", "-m", "tokenllm.gateway"], "tokenllm.gateway"),
        (["/x/python", "/y/peers/llama_server.py", "model"], "llama_server.py"),
        (["/x/llama-server", "-m", "model.gguf"], "model.gguf"),
        (["/x/llama-server", "--model", "model.gguf"], "llama-server"),
        ([], "?"),
    ],
)
def test_a_process_is_named_by_what_runs(words: list[str], name: str) -> None:
    assert process_name(words) == name


def sample(peer: str, streams: int, seconds: float, other_cores: float = 0.0) -> Sample:
    answer = Answered(0.0, seconds / 2, seconds, [seconds / 20] * 10, 128, 64, 64, True)
    outcomes = [answer] * streams
    return Sample(peer, 1, streams, other_cores, summarise(list(outcomes)), list(outcomes))


def test_medians_are_over_quiet_samples_and_ratios_to_each_peer(tmp_path: Path) -> None:
    samples = [
        *(sample("tokenllm", 8, seconds) for seconds in (1.0, 2.0, 4.0)),
        sample("tokenllm", 8, 99.0, other_cores=1.5),
        sample("llama.cpp", 8, 50.0, other_cores=0.9),
        sample("llama.cpp", 8, 4.0),
        sample("transformers", 8, 50.0, other_cores=0.9),
        sample("transformers", 8, 4.0, other_cores=0.3),
        sample("llama.cpp", 1, 1.0),
    ]
    rows = {(row.peer, row.streams): row for row in rows_of(samples)}
    ours, noisy = rows["tokenllm", 8], rows["transformers", 8]
    assert (ours.quiet_samples, ours.output_tokens_per_s, ours.lowest, ours.highest) == (3, 256.0, 128.0, 512.0)
    assert (noisy.quiet_samples, noisy.output_tokens_per_s) == (0, 128.0), "none was quiet: the quietest is shown"
    lives = [Life("tokenllm", 1, 6.0, 12345, [Memory("tokenllm.scheduler", 2_000_000, 1_000_000)])]
    report = PeersReport("today", "a machine", [], "128 in, 64 out", samples, lives)
    text = markdown(report)
    assert "| 8 | llama.cpp | 128.0 | 128.0 - 128.0 | 2.00 | 2.000 | 0.50 |" in text
    assert "| 8 | transformers | 128.0 | 128.0 - 128.0 | noisy | 2.000 | noisy |" in text
    assert "| tokenllm | 6.00 | 12,345 | tokenllm.scheduler | 2 | 1 |" in text
    plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
