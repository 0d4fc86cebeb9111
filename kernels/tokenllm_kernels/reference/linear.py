"""Matrix products, with a weight laid out as suits the processor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tokenllm_kernels.reference.layers import silu_mul


@dataclass(frozen=True)
class Linear:
    """A weight in the form in which its product is quickest. `kind` says which: plain, packed (float32) or half."""

    kind: str
    weight: Any
    bias: Tensor | None
    out_features: int


def prepare_linear(weight: Tensor, bias: Tensor | None = None, *, half_weights: bool = False) -> Linear:
    """Lay out `weight` [out, in] for `linear`.

    On a CPU float32 weights are reordered once for oneDNN, about three times quicker than row-major at small batches.
    `half_weights` stores them as float16 for FBGEMM, which multiplies them with float32 activations: half the bytes of
    a decode step, and exact enough (the perplexity of SmolLM2 does not move in five digits). Values beyond float16's
    range are refused, since FBGEMM would saturate them.
    """
    out_features = weight.shape[0]
    if weight.is_cuda or weight.dtype != torch.float32:
        return Linear("plain", weight, bias, out_features)
    if half_weights and "fbgemm" in torch.backends.quantized.supported_engines:
        return Linear("half", torch.ops.quantized.linear_prepack_fp16(in_half_range(weight), bias), None, out_features)
    if torch.backends.mkldnn.is_available():
        return Linear("packed", torch.ops.mkldnn._reorder_linear_weight(weight, 8), bias, out_features)
    return Linear("plain", weight, bias, out_features)


def in_half_range(weight: Tensor) -> Tensor:
    """The weight itself; a ValueError when float16 cannot hold it."""
    if weight.abs().max() > torch.finfo(torch.float16).max:
        raise ValueError("weights beyond the range of float16: serve them with --dtype float32")
    return weight


def linear(x: Tensor, w: Linear, out: Tensor | None = None) -> Tensor:
    """x [tokens, in] @ weight.T + bias → [tokens, out], into `out` where one is given."""
    return _linear(x, w) if out is None else out.copy_(_linear(x, w))


def _linear(x: Tensor, w: Linear) -> Tensor:
    match w.kind:
        case "half":
            return torch.ops.quantized.linear_dynamic_fp16(x, w.weight)
        case "packed":
            return torch.ops.mkldnn._linear_pointwise(x, w.weight, w.bias, "none", [], "")
        case _:
            return functional.linear(x, w.weight, w.bias)


def linear_add(x: Tensor, w: Linear, residual: Tensor) -> Tensor:
    """residual + x @ weight.T, written over `residual`."""
    return residual.add_(linear(x, w))


def linear_silu_mul(x: Tensor, w: Linear) -> Tensor:
    """silu(gate) · up of (gate ‖ up) = x @ weight.T: [tokens, in] → [tokens, out / 2]."""
    return silu_mul(linear(x, w))
