"""The steps of both Dockerfiles, and what they start, work in a bare Python: a small interpreter carries them out.

It stands in for a Docker engine as far as that matters here: build context and .dockerignore, ARG, ENV, WORKDIR,
COPY and RUN, then ENTRYPOINT as the unprivileged user, with compose.yaml's environment, until HEALTHCHECK succeeds.
The base image is a fresh venv; the steps that change a system (apt-get, useradd) are left out.
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import yaml

ROOT = Path(__file__).parents[2]
SYSTEM_STEPS = ("apt-get ", "useradd ")
NOBODY = 10001


def instructions(dockerfile: Path) -> Iterator[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", dockerfile.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line.strip():
            keyword, _, rest = line.partition(" ")
            yield keyword, rest


def build_context(folder: Path) -> Path:
    rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert rules[0] == "*", "everything is left out but what is named"
    for name in (rule[1:] for rule in rules if rule.startswith("!")):
        copy(ROOT / name, folder / name)
    return folder


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


class Image:
    """A root folder, an environment, and what to start: the outcome of a Dockerfile's instructions."""

    def __init__(self, dockerfile: Path, root: Path, arguments: dict[str, str], pip: dict[str, str]) -> None:
        self.root, self.folder, self.arguments, self.pip = root, root, arguments, pip
        self.context = build_context(root / "context")
        self.environment = {"PATH": f"{root / 'python' / 'bin'}:{os.environ['PATH']}"}
        self.healthcheck: list[str] = []
        self.entrypoint: list[str] = []
        for keyword, rest in instructions(dockerfile):
            self.carry_out(keyword, rest)

    def carry_out(self, keyword: str, rest: str) -> None:
        match keyword:
            case "FROM":
                venv.create(self.root / "python", with_pip=True, symlinks=True)
            case "ARG":
                name, _, default = rest.partition("=")
                self.environment[name] = self.arguments.get(name, default)
            case "ENV":
                given = dict(pair.split("=", 1) for pair in shlex.split(rest))
                self.environment |= {name: self.below_root(value) for name, value in given.items()}
            case "WORKDIR":
                self.folder = self.root / rest.lstrip("/")
                self.folder.mkdir(exist_ok=True)
            case "COPY":
                self.copy_in(*rest.split())
            case "RUN" if not rest.startswith(SYSTEM_STEPS):
                subprocess.run(["sh", "-ec", rest], cwd=self.folder, env=self.environment | self.pip, check=True)
            case "HEALTHCHECK":
                self.healthcheck = json.loads(rest.partition("CMD ")[2])
            case "ENTRYPOINT":
                self.entrypoint = json.loads(rest)
            case _:
                assert keyword in {"RUN", "USER", "VOLUME", "EXPOSE"}

    def below_root(self, value: str) -> str:
        return re.sub(r"^/(cache|tmp)", rf"{self.root}/\1", value)

    def copy_in(self, *names: str) -> None:
        *sources, target = names
        for source in sources:
            copy(self.context / source, self.folder / target / (source if source != "." else ""))

    def start(self, port: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """As the image's user where that is possible."""
        for folder in (self.root / "cache", self.root / "tmp"):
            folder.mkdir(mode=0o777)
            folder.chmod(0o777)
        user = NOBODY if os.geteuid() == 0 and anybody_may_run(self.root / "python" / "bin" / "python") else None
        environment = self.environment | environment | self.pip | {"TOKENLLM_PORT": str(port)}
        return subprocess.Popen(self.entrypoint, cwd=self.root, env=environment, user=user, group=user)

    def is_healthy(self, port: int) -> bool:
        command = [part.replace(":8000/", f":{port}/") for part in self.healthcheck]
        return subprocess.run(command, env=self.environment, stderr=subprocess.DEVNULL, check=False).returncode == 0


def anybody_may_run(program: Path) -> bool:
    """Not so for a Python that lies in the home folder of root."""
    return all(folder.stat().st_mode & stat.S_IXOTH for folder in program.resolve().parents)


def compose_environment(service: str) -> dict[str, str]:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
    given = services[service]["environment"]
    return {name: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value) for name, value in given.items()}


@pytest.fixture
def root() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tokenllm-image-") as folder:
        Path(folder).chmod(0o755)  # the image's user must be able to get in
        yield Path(folder)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_until(holds: Callable[[], bool], server: subprocess.Popen[bytes], patience_s: float = 300) -> None:
    deadline_s = time.monotonic() + patience_s
    while not holds():
        assert server.poll() is None, f"the server ended with {server.returncode}"
        assert time.monotonic() < deadline_s, f"not within {patience_s} s"
        time.sleep(1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_image_installs_starts_answers_and_stops(device: str, root: Path) -> None:
    # the release of torch that needs no GPU, also where the image would take the newest; PyPI is index enough
    pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_") or name.endswith("_proxy")}
    pip |= {"PIP_CONSTRAINT": str(ROOT / "constraints-cpu.txt")}
    image = Image(ROOT / "docker" / f"Dockerfile.{device}", root, {"TORCH_INDEX_URL": ""}, pip)
    port = free_port()
    server = image.start(port, compose_environment(f"tokenllm-{device}"))
    try:
        wait_until(lambda: image.is_healthy(port), server)
        wait_until(lambda: httpx.get(f"http://127.0.0.1:{port}/health/ready").is_success, server)
        question = {"model": "smollm2-135m-instruct", "prompt": "The capital of France is", "max_tokens": 3}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=question, timeout=60)
        assert answer.json()["choices"][0]["finish_reason"] == "length", answer.text
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=45) == 0
    finally:
        server.kill()
        server.wait()
