"""Vectors of prompts are pooled of the hidden states that transformers computes, however prompts are cut and mixed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace

LENGTHS = (1, 2, 33, 64, 65, 200, 201, 600)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Of uneven lengths; the longer ones begin with a shorter one, which is found in the cache."""
    random = np.random.default_rng(11)
    found = [random.integers(3, 49152, length).tolist() for length in LENGTHS]
    return [*found, found[5] + found[2], found[5]]


def of_length_one(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


@pytest.fixture(scope="module")
def expected(oracle: Any, prompts: list[list[int]]) -> dict[str, list[np.ndarray]]:
    with torch.inference_mode():
        states = [oracle.model(torch.tensor([ids])).last_hidden_state[0].numpy() for ids in prompts]
    return {
        "mean": [of_length_one(state.mean(0)) for state in states],
        "last": [of_length_one(state[-1]) for state in states],
    }


@pytest.mark.parametrize(("pooling", "chunk"), [("mean", 64), ("last", 150)])
def test_they_are_those_of_transformers(
    driver: Any,
    submit: Callable[..., Any],
    prompts: list[list[int]],
    expected: dict[str, list[np.ndarray]],
    pooling: str,
    chunk: int,
) -> None:
    wanted = [(i % 4, replace(submit(ids, 1), pooling=pooling)) for i, ids in enumerate(prompts)]
    company = [(i, submit([5 + i, 9, 200], 12)) for i in range(4)]
    told = driver.run(wanted + company, chunk)
    assert [len(tokens) for tokens in told] == [0] * len(wanted) + [12] * len(company)
    assert driver.memory.active == 0 and set(driver.vectors) == set(range(len(wanted)))
    for uid, vector in driver.vectors.items():
        assert vector.dtype == np.float32
        assert of_length_one(vector) == pytest.approx(expected[pooling][uid], abs=driver.tolerance / 10), f"case {uid}"
