"""What the documents say in code, and a real server to say it to."""

import re
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


@pytest.fixture(scope="session")
def server_url(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The real server with the embedded model."""
    house = House([*REAL, "--port", "0", "--max-total-tokens", "8192"], tmp_path_factory.mktemp("docs") / "server.log")
    try:
        yield house.wait_greeted().url
    finally:
        house.raze()
