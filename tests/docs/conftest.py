"""What the documents say in code, and a real server to say it to."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from house import REAL, House

ROOT = Path(__file__).parents[2]


@pytest.fixture
def blocks() -> Callable[[str, str], list[str]]:
    """The fenced blocks of a document in one language."""

    def blocks(document: str, language: str) -> list[str]:
        text = (ROOT / document).read_text(encoding="utf-8")
        found = re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        assert found, f"{document} has no {language} in it"
        return found

    return blocks


@pytest.fixture
def run_example(
    blocks: Callable[[str, str], list[str]], tmp_path: Path
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the Python blocks of a document as one script, with something in it replaced."""

    def run_example(document: str, old: str = "", new: str = "") -> subprocess.CompletedProcess[str]:
        text = "".join(blocks(document, "python"))
        assert old in text
        script = tmp_path / "example.py"
        script.write_text(text.replace(old, new) if old else text, encoding="utf-8")
        environment = os.environ | {"TMPDIR": str(tmp_path)}
        return subprocess.run([sys.executable, script], cwd="/", env=environment, capture_output=True, text=True)

    return run_example


@pytest.fixture(scope="session")
def server_url(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The real server with the embedded model."""
    house = House([*REAL, "--port", "0", "--max-total-tokens", "8192"], tmp_path_factory.mktemp("docs") / "server.log")
    try:
        yield house.wait_greeted().url
    finally:
        house.raze()
