"""The benchmarks of the CUDA engine, where there is no GPU: they run, count every token, and divide the time right."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
GPU = ROOT / "load_tests" / "gpu"
sys.path.append(str(GPU))

from bench_idle import Work, gaps_us, idle, kernel_times  # noqa: E402
from driving import Meter  # noqa: E402
from model_folder import weight_shapes, write_model_folder, write_random_weights  # noqa: E402

TINY = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 2000,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


def run(script: str, *arguments: object) -> dict:
    """What the script left behind."""
    *words, out = map(str, arguments)
    path = f"{ROOT / 'load_tests'}:{ROOT / 'src'}:{ROOT / 'kernels'}:{ROOT / 'api_schemas'}"
    environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, str(GPU / f"bench_{script}.py"), *words, "--out", out]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = Path(out).glob(f"gpu-{script}-*.json")
    return json.loads(file.read_text())


@pytest.mark.slow
def test_decode_steps_are_measured_for_every_batch_and_context(config: Path, tmp_path: Path) -> None:
    flags = ("--device", "cpu", "--steps", "4", "--prefill-chunk-tokens", "32")
    found = run("steps", config, "--batches", "1,3,8", "--contexts", "20,60", *flags, tmp_path / "out")
    assert [(step["context"], step["batch"]) for step in found["steps"]] == [
        (c, b) for c in (20, 60) for b in (1, 3, 8)
    ]
    assert all(step["ms"] > 0 and step["launch_us"] > 0 for step in found["steps"])
    floors = [step["floor_ms"] for step in found["steps"]]
    assert floors[:3] == sorted(floors[:3]) and floors[3] > floors[0]


@pytest.mark.slow
def test_offline_counts_every_token_of_the_workload(config: Path, tmp_path: Path) -> None:
    workload = tmp_path / "six.json"
    workload.write_text(json.dumps({"requests": [[20, 5], [70, 9], [3, 4], [90, 20], [20, 5], [20, 1]]}))
    flags = ("--device", "cpu", "--max-running-requests", "4", "--prefill-chunk-tokens", "64")
    found = run("offline", config, workload, *flags, tmp_path / "out")
    assert found["output_tokens"] == 5 + 9 + 4 + 20 + 5 + 1
    assert sum(turn.get("prompt_tokens", 0) for turn in found["turns"]) == 20 + 70 + 3 + 90 + 20 + 20
    assert found["steps"] == sum(kind["steps"] for kind in found["host"])


@pytest.mark.slow
def test_prefill_and_idle_leave_their_figures(config: Path, tmp_path: Path) -> None:
    chunk = ("--device", "cpu", "--prefill-chunk-tokens", "64")
    found = run("prefill", config, "--cases", "1x200,4x50", "--rounds", "2", *chunk, tmp_path / "out")
    assert [(case["prompts"], len(case["seconds"])) for case in found["cases"]] == [(1, 2), (4, 2)]
    workload = tmp_path / "w.json"
    workload.write_text(json.dumps({"requests": [[20, 40]] * 6}))
    found = run("idle", config, workload, "--before", "3", "--steps", "10", *chunk, tmp_path / "out")
    assert found["steps"] == 10 and 0 < found["gaps_share"] < 1 and found["kernels"]


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


def test_phases_exclude_the_phases_inside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, meter = Clock(), Meter()
    monkeypatch.setattr("driving.time", clock)
    wait = meter.timing("wait", clock.spend)

    def collect() -> None:
        wait(20)
        clock.spend(3)

    with meter.turn() as turn:
        meter.timing("collect", collect)()
        wait(5)
        clock.spend(7)
    assert turn.seconds == {"wait": 25, "collect": 3, "rest": 7}
    assert turn.total_s == 35 and turn.host_s == 10


intervals = st.tuples(st.integers(0, 300), st.integers(1, 40)).map(lambda at: Work("k", at[0], at[0] + at[1]))


@given(st.lists(intervals, min_size=1, max_size=12))
def test_gaps_are_what_no_kernel_covers(work: list[Work]) -> None:
    work = sorted(work, key=lambda done: done.start_us)
    first, last = int(work[0].start_us), int(max(done.end_us for done in work))
    covered = {at for done in work for at in range(int(done.start_us), int(done.end_us))}
    assert sum(gaps_us(work)) == last - first - len(covered)
    assert idle(work, 2, 0).gaps_share == pytest.approx(1 - len(covered) / (last - first))
    (time_,) = kernel_times(work, 2)
    assert time_.us_per_step == sum(done.end_us - done.start_us for done in work) / 2 and time_.share == 1


def test_random_weights_are_a_checkpoint_of_the_shape(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    import model_folder
    from tokenllm.checkpoint.description import describe
    from tokenllm.models.weights import Precision, load_decoder, open_weights
    from tokenllm.text.tokenizer import load_tokenizer

    monkeypatch.setattr(model_folder, "SHARD_BYTES", 30_000)
    folder = write_model_folder(config, tmp_path / "model")
    total = write_random_weights(folder, torch.device("cpu"))
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert "model.layers.1.self_attn.q_norm.weight" in weight_shapes(folder)
    d, cpu = describe(folder), torch.device("cpu")
    source = open_weights(folder, d, cpu, dummy=False, dtype=torch.float32)
    decoder = load_decoder(source, d, Precision(torch.float32), cpu, 8)
    assert decoder.vocab_size == 2000 and 0.015 < decoder.embedding.std() < 0.025
    assert total == sum(torch.Size(shape).numel() * 2 for shape in weight_shapes(folder).values())
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == 2000 and tokenizer.decode(tokenizer.encode("fox över 狐")) == "fox över 狐"
