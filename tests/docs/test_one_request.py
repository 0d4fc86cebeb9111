"""docs/one-request.md is true: its blocks run one after another, as a reader would paste them."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def test_the_walk_of_one_request_runs(
    blocks: Callable[[str, str], list[str]], default_model: Path, tmp_path: Path
) -> None:
    script = tmp_path / "one_request.py"
    script.write_text("".join(blocks("docs/one-request.md", "python")), encoding="utf-8")
    done = subprocess.run([sys.executable, script], cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("The capital of France is Paris.\n")
