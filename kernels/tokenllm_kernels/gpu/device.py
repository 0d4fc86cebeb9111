"""What the kernels ask of the device they run on."""

from functools import cache

import torch


@cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors; 4 where Triton's interpreter plays the GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@cache
def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
