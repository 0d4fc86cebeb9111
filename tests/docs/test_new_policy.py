"""docs/new-policy.md is true: its policy does on its load what the text says, and would not if it forgot how far
everybody has got.
"""

from collections.abc import Callable
from subprocess import CompletedProcess

DOCUMENT = "docs/new-policy.md"


def test_the_example_runs(run_example: Callable[..., CompletedProcess[str]]) -> None:
    done = run_example(DOCUMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "│ mean-beyond " in done.stdout
    assert done.stdout.endswith("mean-beyond fills memory and pauses few\n")


def test_its_check_sees_a_mean_of_all(run_example: Callable[..., CompletedProcess[str]]) -> None:
    done = run_example(DOCUMENT, "self._past, requests.generated,", "self._past, 0 * requests.generated,")
    assert done.returncode == 1 and "44% paused" in done.stderr, done.stdout + done.stderr
