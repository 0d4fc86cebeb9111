"""Fixtures that more than one room needs."""

import os
from pathlib import Path

import pytest

# before anything imports Triton: where there is no GPU, its interpreter plays one
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"
# before torch is imported: its threads must not spin for long while other processes need the cores
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

from tokenllm.checkpoint.source import resolve


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The embedded default model's file, downloaded once into the cache folder."""
    return resolve("")
