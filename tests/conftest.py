"""Fixtures that more than one room needs."""

from pathlib import Path

import pytest

from tokenllm.checkpoint.source import resolve


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The embedded default model's file, downloaded once into the cache folder."""
    return resolve("")
