"""docs/new-kernel.md is true: its kernel is what it means, on a GPU or in Triton's interpreter, and its check would see
the mistake that the text warns of.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

RIGHT, WRONG = "tl.where(inside, value - tl.sum(value, 0) / hidden, 0.0)", "value - tl.sum(value, 0) / hidden"


@pytest.fixture
def run(blocks: Callable[[str, str], list[str]], tmp_path: Path) -> Callable[[str, str], subprocess.CompletedProcess]:
    """Runs the document's example, with something in it replaced."""

    def run(old: str, new: str) -> subprocess.CompletedProcess:
        text = "".join(blocks("docs/new-kernel.md", "python"))
        assert old in text
        script = tmp_path / "layer_norm.py"
        script.write_text(text.replace(old, new), encoding="utf-8")
        return subprocess.run([sys.executable, script], cwd="/", capture_output=True, text=True, check=False)

    return run


def test_the_example_runs(run: Callable[[str, str], subprocess.CompletedProcess]) -> None:
    done = run(RIGHT, RIGHT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "layer_norm is what it means\n"


def test_its_check_sees_columns_outside_the_row(run: Callable[[str, str], subprocess.CompletedProcess]) -> None:
    done = run(RIGHT, WRONG)
    assert done.returncode == 1 and "5 x 96" in done.stderr, done.stdout + done.stderr
