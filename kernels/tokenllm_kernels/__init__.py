"""What the processor computes: each function as plain torch in `reference`, its definition, oracle and CPU path, and as
Triton in `gpu`, which is imported where there is a GPU alone.
"""

from typing import Protocol

import torch
from torch import Tensor

from tokenllm_kernels import reference
from tokenllm_kernels.reference import (
    Attention,
    Linear,
    LogitsRule,
    attention,
    embed,
    in_half_range,
    linear,
    linear_add,
    linear_silu_mul,
    philox_uniform,
    plan_attention,
    prepare_linear,
    rms_norm,
    rope_and_store,
    rope_table,
    sample,
    silu_mul,
    top_logprobs,
)

__all__ = [
    "Attention",
    "Kernels",
    "Linear",
    "LogitsRule",
    "attention",
    "embed",
    "in_half_range",
    "kernels_for",
    "linear",
    "linear_add",
    "linear_silu_mul",
    "philox_uniform",
    "plan_attention",
    "prepare_linear",
    "rms_norm",
    "rope_and_store",
    "rope_table",
    "sample",
    "silu_mul",
    "top_logprobs",
]


class Kernels(Protocol):
    """What a decoder is made of; both modules offer it. See `reference` for shapes and meanings."""

    def embed(self, ids: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor: ...
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...
    def linear(self, x: Tensor, w: Linear, out: Tensor | None = None) -> Tensor: ...
    def linear_add(self, x: Tensor, w: Linear, residual: Tensor) -> Tensor: ...
    def linear_silu_mul(self, x: Tensor, w: Linear) -> Tensor: ...
    def rope_and_store(
        self,
        qkv: Tensor,
        table: Tensor,
        kv: Tensor,
        slots: Tensor,
        heads: int,
        qk_norm: tuple[Tensor, Tensor, float] | None = None,
    ) -> Tensor: ...


def kernels_for(device: torch.device) -> Kernels:
    """The kernels of a device: Triton's on a GPU, plain torch elsewhere."""
    if device.type == "cuda":
        from tokenllm_kernels import gpu

        return gpu
    return reference
