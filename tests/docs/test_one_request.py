"""docs/one-request.md is true: its blocks run one after another, as a reader would paste them."""

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess


def test_the_walk_of_one_request_runs(run_example: Callable[..., CompletedProcess[str]], default_model: Path) -> None:
    done = run_example("docs/one-request.md")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("The capital of France is Paris.\n")
