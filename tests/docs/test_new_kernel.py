"""docs/new-kernel.md is true: its kernel is what it means, on a GPU or in Triton's interpreter, and its check would see
the mistake that the text warns of.
"""

from collections.abc import Callable
from subprocess import CompletedProcess

DOCUMENT = "docs/new-kernel.md"


def test_the_example_runs(run_example: Callable[..., CompletedProcess[str]]) -> None:
    done = run_example(DOCUMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "layer_norm is what it means\n"


def test_its_check_sees_columns_outside_the_row(run_example: Callable[..., CompletedProcess[str]]) -> None:
    centred = "value - tl.sum(value, 0) / hidden"
    done = run_example(DOCUMENT, f"tl.where(inside, {centred}, 0.0)", centred)
    assert done.returncode == 1 and "5 x 96" in done.stderr, done.stdout + done.stderr
