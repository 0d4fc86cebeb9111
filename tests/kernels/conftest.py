"""Where the kernels run: on a GPU, or on CPU tensors in Triton's interpreter (`tests/conftest.py`)."""

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
