"""Where the kernels run: on a GPU, or on CPU tensors in Triton's interpreter (`tests/conftest.py`).

KERNEL_SIZES=small has a GPU do the interpreter's small cases, so that compute-sanitizer comes to an end.
"""

import os

import pytest
import torch

from tokenllm_kernels.gpu import prefill_hopper


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What only a GPU can show is no test elsewhere."""
    present = set() if os.environ.get("KERNEL_SIZES") == "small" else {"large"}
    if torch.cuda.is_available():
        present |= {"gpu", "hopper"} if prefill_hopper.is_available(torch.device("cuda")) else {"gpu"}
    needed = {"gpu", "hopper", "large"}
    items[:] = [item for item in items if {mark.name for mark in item.iter_markers()} & needed <= present]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
