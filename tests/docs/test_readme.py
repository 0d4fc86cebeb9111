"""What the README promises: its snippets run as they are pasted, its flags and links exist."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tokenllm.engine.start import CPU_BATCH, CUDA_BATCH
from tokenllm.settings import TABLE

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README_URL = "http://127.0.0.1:8000"


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_the_python_snippet_works(blocks: Callable[[str, str], list[str]], server_url: str) -> None:
    for snippet in blocks("README.md", "python"):
        assert README_URL in snippet
        assert run([sys.executable, "-c", snippet.replace(README_URL, server_url)]).strip()


def test_the_curl_snippets_work(blocks: Callable[[str, str], list[str]], server_url: str) -> None:
    snippets = [block for block in blocks("README.md", "sh") if block.startswith("curl ")]
    assert snippets
    for snippet in snippets:
        assert README_URL in snippet
        checked = snippet.replace(README_URL, server_url).replace("curl ", "curl -sS --fail-with-body ", 1)
        assert run(["sh", "-ec", checked]).strip()


def test_every_flag_in_the_table_exists_with_that_default() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.split("|")] for line in lines if line.startswith("| `--")]
    settings = {field.flag: field.default for field in TABLE.values()}
    given = {
        flag: default
        for _, flags, defaults, *_ in rows
        for flag, default in zip(flags.replace("`", "").split(", "), defaults.split(", "), strict=True)
    }
    assert given.keys() <= settings.keys()
    rows = f"{CPU_BATCH.rows}; on a GPU {CUDA_BATCH.rows}"
    in_words = {"the model's own", "measured", rows, ""}  # for an empty text or a zero
    for flag, default in given.items():
        assert str(settings[flag]) == default or (default in in_words and not settings[flag]), flag


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_to_a_file_leads_somewhere(document: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)#:]+)\)", prose)
    assert [target for target in targets if not (document.parent / target).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_make_target_that_is_named_exists(document: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = re.findall(r"(?:^|`)make ([a-z-]+)", document.read_text(encoding="utf-8"), re.MULTILINE)
    assert [target for target in named if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []
