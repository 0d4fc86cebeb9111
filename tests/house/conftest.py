"""Servers that never outlive their test."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from tiny_model import write_tiny_model

from house import House, fake_house


@pytest.fixture
def start(tmp_path: Path, tiny_model: Path) -> Iterator[Callable[..., House]]:
    """Starts servers with the fake scheduler."""
    yield from _starter(tmp_path, tiny_model)


@pytest.fixture(scope="module")
def start_once(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Callable[..., House]]:
    """The same, for servers that several tests use."""
    yield from _starter(tmp_path_factory.mktemp("house"), tiny_model)


def _starter(folder: Path, model: Path) -> Iterator[Callable[..., House]]:
    houses: list[House] = []

    def start_house(environment: Mapping[str, str] = {}, **settings: object) -> House:
        houses.append(fake_house(model, folder / f"house{len(houses)}.log", environment, **settings))
        return houses[-1]

    yield start_house
    for house in houses:
        house.raze()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny-model"))
