"""Fixtures that more than one room needs."""

import os
from pathlib import Path

import pytest

# before torch is imported: its threads must not spin while other tests' processes need the cores
os.environ.setdefault("GOMP_SPINCOUNT", "0")

from tokenllm.checkpoint.source import resolve


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The embedded default model's file, downloaded once into the cache folder."""
    return resolve("")
