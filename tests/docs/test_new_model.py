"""docs/new-model.md is true: its family is read and says what transformers says, and would not if a line were missing."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def run(blocks: Callable[[str, str], list[str]], tmp_path: Path) -> Callable[[str, str], subprocess.CompletedProcess]:
    """Runs the document's example, with something in it replaced."""

    def run(old: str, new: str) -> subprocess.CompletedProcess:
        text = "".join(blocks("docs/new-model.md", "python"))
        assert old in text
        script = tmp_path / "new_model.py"
        script.write_text(text.replace(old, new), encoding="utf-8")
        return subprocess.run([sys.executable, script], cwd="/", capture_output=True, text=True, check=False)

    return run


def test_the_example_runs(run: Callable[[str, str], subprocess.CompletedProcess]) -> None:
    done = run("qkv_bias=True", "qkv_bias=True")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "harbor is served\n"


def test_its_check_sees_a_forgotten_bias(run: Callable[[str, str], subprocess.CompletedProcess]) -> None:
    done = run("qkv_bias=True", "qkv_bias=False")
    assert done.returncode == 1 and "chunks of 60" in done.stderr, done.stdout + done.stderr
