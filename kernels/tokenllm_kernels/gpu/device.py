"""What the kernels ask of the device they run on."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton


@cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors; 4 where Triton's interpreter plays the GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@cache
def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def on_compilation(tell: Callable[[], None]) -> None:
    """From now on, call `tell` whenever a kernel is compiled, or read from Triton's cache."""

    def hook(**_: Any) -> None:
        tell()

    triton.knobs.runtime.jit_post_compile_hook = hook
