"""What stands between the matrix products and attention: embedding, norms, activation, rope."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def embed(ids: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of `table` [vocab, hidden] for `ids` [tokens] → [tokens, hidden] in `dtype`."""
    return table.index_select(0, ids).to(dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in float32 inside (Zhang and Sennrich, 2019)."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of [tokens, 2 · width] → [tokens, width] (SwiGLU: Shazeer, 2020)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def rope_table(inverse_frequencies: Tensor, positions: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Cosines and signed sines for `rope_and_store`: [positions, 2, head_dim] from [head_dim / 2] frequencies."""
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), inverse_frequencies.double())
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), 1).to(dtype)


def _rotate(x: Tensor, table: Tensor) -> Tensor:
    """The rotation of RoPE on halves: (a, b) → (a·cos - b·sin, b·cos + a·sin) (Su et al., 2021)."""
    cos, sin = table[:, :1], table[:, 1:]  # [tokens, 1, head_dim]
    wide = x.to(table.dtype)
    return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def rope_and_store(
    qkv: Tensor,
    table: Tensor,
    kv: Tensor,
    slots: Tensor,
    heads: int,
    qk_norm: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """Split the fused projection, (normalise and) rotate q and k, write k and v to their token slots.

    qkv [tokens, (heads + 2 · kv_heads) · head_dim]; table [tokens, 2, head_dim], the rows of `rope_table` at the
    tokens' positions; kv [slots + 1, kv_heads, 2, head_dim], written in place at `slots` [tokens]; qk_norm (q weight,
    k weight, eps) for families that normalise each head. Returns q [tokens, heads, head_dim].
    """
    kv_heads, head_dim = kv.shape[1], kv.shape[3]
    parts = qkv.view(qkv.shape[0], heads + 2 * kv_heads, head_dim)
    qk, v = parts[:, : heads + kv_heads], parts[:, heads + kv_heads :]
    if qk_norm:
        q_weight, k_weight, eps = qk_norm
        qk = torch.cat((rms_norm(qk[:, :heads], q_weight, eps), rms_norm(qk[:, heads:], k_weight, eps)), 1)
    rotated = _rotate(qk, table)
    kv.index_copy_(0, slots, torch.stack((rotated[:, heads:], v), 2).to(kv.dtype))
    return rotated[:, :heads]
