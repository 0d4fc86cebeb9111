"""docs/new-model.md is true: its family says what transformers says, and would not if a line were missing."""

from collections.abc import Callable
from subprocess import CompletedProcess

DOCUMENT = "docs/new-model.md"


def test_the_example_runs(run_example: Callable[..., CompletedProcess[str]]) -> None:
    done = run_example(DOCUMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "harbor is served\n"


def test_its_check_sees_a_forgotten_bias(run_example: Callable[..., CompletedProcess[str]]) -> None:
    done = run_example(DOCUMENT, "qkv_bias=True", "qkv_bias=False")
    assert done.returncode == 1 and "chunks of 60" in done.stderr, done.stdout + done.stderr
