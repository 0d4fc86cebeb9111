"""A server's folder is its own, and goes with it or with the next server."""

import os
import tempfile
import time
from pathlib import Path

import pytest

from tokenllm.supervisor import StartError
from tokenllm.supervisor.private_folder import NEWBORN_S, PREFIX, private_folder


@pytest.fixture(autouse=True)
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def grow_old(folder: Path) -> None:
    birth = time.time() - NEWBORN_S - 1
    os.utime(folder, (birth, birth))


def test_it_is_private_and_goes_with_its_server(parent: Path) -> None:
    with private_folder() as folder:
        (folder / "responses").write_text("secret")
        assert folder.parent == parent and folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()


def test_what_a_dead_server_left_is_removed_and_nothing_else(parent: Path) -> None:
    dead, newborn, foreign = parent / f"{PREFIX}dead", parent / f"{PREFIX}newborn", parent / "somebody-else"
    for folder in (dead, newborn, foreign):
        folder.mkdir()
        (folder / "file").write_text("x")
    grow_old(dead)
    grow_old(foreign)
    with private_folder() as living:
        assert not dead.exists() and newborn.exists() and foreign.exists()
        grow_old(living)
        with private_folder():
            assert living.exists()


def test_no_place_for_it_is_said(monkeypatch: pytest.MonkeyPatch, parent: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(parent / "missing"))
    with pytest.raises(StartError, match="temporary"), private_folder():
        pass
