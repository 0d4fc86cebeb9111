"""A whole server as its own processes, with the fake scheduler or the real one, and a model small enough for both."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import msgspec
import psutil
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tokenllm.config import ServeConfig

FAKE = str(Path(__file__).with_name("serve_fake.py"))
ROLES = {
    "gateway": ("tokenllm.gateway",),
    "scheduler": ("tokenllm.scheduler", "fake_scheduler.py"),
    "detokenizer": ("tokenllm.detokenizer",),
}
PATIENCE_S = 60.0


def eventually(what: str, holds: Callable[[], object], within_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        time.sleep(0.02)


class House:
    """One server, watched from outside."""

    def __init__(self, config: ServeConfig, log: Path, command: list[str], environment: dict[str, str]) -> None:
        self.config = config
        self._log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **environment}
            )
        self.ps = psutil.Process(self.process.pid)
        self._family: dict[int, psutil.Process] = {}

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def url(self) -> str:
        found = re.search(r"^tokenllm serves at (http://\S+)/v1$", self.log, re.MULTILINE)
        assert found, self.log
        return found[1]

    def wait_greeted(self) -> "House":
        eventually("the greeting", lambda: "\ntokenllm serves at " in self.log or self.process.poll() is not None)
        assert self.process.poll() is None, self.log
        self.wait_ready()
        return self

    def wait_ready(self) -> None:
        eventually("readiness", lambda: self.status("/health/ready") == 200)

    def status(self, path: str) -> int | None:
        try:
            return httpx.get(self.url + path, timeout=5).status_code
        except httpx.TransportError:
            return None

    def children(self, role: str) -> list[psutil.Process]:
        """The living processes of one role, by age."""
        found = []
        for child in self.ps.children():
            try:
                if any(mark in part for part in child.cmdline() for mark in ROLES[role]):
                    found.append(child)
            except psutil.NoSuchProcess:
                continue
        self._family |= {child.pid: child for child in found}
        return sorted(found, key=lambda child: (child.create_time(), child.pid))

    def family(self) -> list[psutil.Process]:
        """Every child that was ever seen and still runs."""
        for role in ROLES:
            self.children(role)
        return [child for child in self._family.values() if child.is_running() and child.status() != "zombie"]

    def kill(self, role: str, which: int = 0) -> int:
        victim = self.children(role)[which]
        victim.kill()
        return victim.pid

    def metrics(self) -> dict[str, float]:
        lines = httpx.get(self.url + "/metrics", timeout=5).text.splitlines()
        pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in pairs}

    def finished(self) -> dict[str, int]:
        mark = "tokenllm_requests_finished_total"
        return {
            name.partition('reason="')[2].rstrip('"}'): int(value)
            for name, value in self.metrics().items()
            if name.startswith(mark)
        }

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)


@pytest.fixture
def start(tmp_path: Path, tiny_model: Path) -> Iterator[Callable[..., House]]:
    """Starts servers with the fake scheduler; whatever is left of them is killed at the end of the test."""
    houses: list[House] = []

    def start_house(environment: dict[str, str] | None = None, **settings: object) -> House:
        config = ServeConfig(**{"model": str(tiny_model), "load_format": "dummy", "port": 0, **settings})
        command = [sys.executable, FAKE, msgspec.json.encode(config).decode()]
        houses.append(House(config, tmp_path / f"house{len(houses)}.log", command, environment or {}))
        return houses[-1]

    yield start_house
    for house in houses:
        leftover = house.family() if house.process.poll() is None else []
        house.process.kill()
        house.process.wait()
        psutil.wait_procs(leftover, timeout=5)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without weights: a Llama of nearly nothing, and a byte-level tokenizer of 404 tokens."""
    folder = tmp_path_factory.mktemp("tiny-model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=404,
        special_tokens=["<eos>", "<user>", "<assistant>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "the quick brown fox jumps over the lazy dog, då gick räven över ån; 狐は犬を飛び越えた 🦊🐕 "
    tokenizer.train_from_iterator([text * 3, text.upper() * 3, Path(__file__).read_text()], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}<assistant>"
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "chat_template": template}))
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **shape,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
