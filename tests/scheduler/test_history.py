"""What was learned survives a restart; a file that is not understood is left aside with a word."""

from pathlib import Path

import numpy as np
import pytest

from tokenllm.routing.lengths import Lengths
from tokenllm.scheduler import history
from tokenllm.scheduler.history import History

MODEL = Path("/models/a.gguf")


def taught(lengths: Lengths) -> Lengths:
    """An application that answers in 40 tokens, among others that take 300."""
    for _ in range(40):
        lengths.learn(lengths.kind(7, 1000), 40)
        lengths.learn(lengths.kind(-1, 1000), 300)
    return lengths


def expected_length(lengths: Lengths, group: int) -> float:
    kind = lengths.kind(group, 1000)
    lengths.refresh(np.array([kind]), np.array([0]))
    return float(lengths.mean[kind])


def saved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> History:
    monkeypatch.setattr(history, "AT_REST_EVERY_S", 0.0)
    first = History(folder, MODEL)
    taught(first.lengths)
    assert first.save_when_due(busy=False) is None
    return first


def test_what_was_learned_is_known_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = saved(tmp_path / "cache", monkeypatch), History(tmp_path / "cache", MODEL)
    for group in (7, -1):
        assert expected_length(second.lengths, group) == pytest.approx(expected_length(first.lengths, group), rel=0.02)
    assert expected_length(second.lengths, 7) < expected_length(second.lengths, -1) / 2
    other = History(tmp_path / "cache", Path("/models/b.gguf"))
    assert expected_length(other.lengths, 7) == expected_length(Lengths(), 7)


def test_it_is_written_seldom_and_only_if_there_is_something_new(tmp_path: Path) -> None:
    kept = History(tmp_path, MODEL)
    assert kept.save_when_due(busy=False) is None and not list(tmp_path.iterdir())
    taught(kept.lengths)
    at_rest, busy = kept.save_when_due(busy=False), kept.save_when_due(busy=True)
    assert at_rest and busy and 0 < at_rest < 10 < 100 < busy
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["", "{", "[]x", '[{"group": 1}]', "ended", "NaN", "orphan"])
def test_a_file_that_is_broken_is_left_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    saved(tmp_path, monkeypatch)
    (file,) = tmp_path.iterdir()
    text = file.read_text()
    broken = {
        "ended": text.replace("0.0, ", "", 1),
        "NaN": text.replace("0.0, ", "-1.0, ", 1),
        "orphan": text.replace('"group": -1', '"group": 5'),
    }
    file.write_text(broken.get(change, change))
    again = History(tmp_path, MODEL)
    assert "lengths are learned anew" in capsys.readouterr().err
    assert expected_length(again.lengths, 7) == expected_length(Lengths(), 7)


def test_a_folder_that_cannot_be_written_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    saved(tmp_path / "file", monkeypatch)
    assert "lengths are not kept" in capsys.readouterr().err
