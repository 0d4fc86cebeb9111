"""What an engine says when it cannot start, or go on."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tokenllm.config import ServeConfig
from tokenllm.engine.start import DeviceFault, device_faults, start_engine


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"),
            "the GPU ran out of memory: CUDA out of memory. Tried",
        ),
        (torch.AcceleratorError("CUDA error: an illegal memory access"), "the GPU failed: CUDA error: an illegal"),
    ],
)
def test_a_failing_gpu_is_told_in_a_line(error: Exception, word: str) -> None:
    with pytest.raises(DeviceFault, match=word), device_faults():
        raise error


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="ours"), device_faults():
        raise RuntimeError("ours")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(default_model: Path) -> None:
    with pytest.raises(ValueError, match="device: cuda was asked for"):
        start_engine(ServeConfig(device="cuda"), default_model, lambda doing: iter)


def test_a_head_that_no_kernel_serves() -> None:
    from tokenllm.engine.cuda_start import start_cuda

    decoder = SimpleNamespace(head_dim=96)
    with pytest.raises(ValueError, match="head_dim 96"):
        start_cuda(decoder, 4, 16, 64, 0, lambda doing: iter)  # type: ignore[arg-type]
