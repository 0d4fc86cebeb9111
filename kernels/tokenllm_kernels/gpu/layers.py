"""Embedding, norms, rope with the KV store, and the activation, in Triton: one pass over memory each.

Arithmetic is float32 inside, rounded once on the way out. Meanings and shapes: `reference/layers.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenllm_kernels.gpu.launch import after_predecessors, dependent, let_successors_begin


@triton.jit
def _embed_kernel(ids, table, out, vocab, hidden, BLOCK: tl.constexpr):
    token = tl.program_id(0)
    row = tl.minimum(tl.maximum(tl.load(ids + token), 0), vocab - 1)  # whatever the id, memory stays ours
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    value = tl.load(table + row.to(tl.int64) * hidden + column, mask=inside)
    tl.store(out + token.to(tl.int64) * hidden + column, value, mask=inside)


def embed(ids: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of `table` [vocab, hidden] for `ids` [tokens] → [tokens, hidden]; ids are clamped to the vocabulary."""
    tokens, (vocab, hidden) = ids.shape[0], table.shape
    out = torch.empty(tokens, hidden, dtype=dtype, device=table.device)
    block = min(1024, triton.next_power_of_2(hidden))
    _embed_kernel[(tokens, triton.cdiv(hidden, block))](ids, table, out, vocab, hidden, BLOCK=block)
    return out


@triton.jit
def _rms_norm_kernel(x, weight, out, hidden, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * hidden
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    let_successors_begin(PDL)
    gain = tl.load(weight + column, mask=inside, other=0.0)
    after_predecessors(PDL)
    value = tl.load(x + row + column, mask=inside, other=0.0)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / hidden + eps)
    tl.store(out + row + column, (wide * scale).to(value.dtype) * gain, mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension of x [tokens, hidden]."""
    tokens, hidden = x.shape
    out, block, pdl = torch.empty_like(x), triton.next_power_of_2(hidden), dependent(x.device)
    warps = min(16, max(1, block // 512))
    _rms_norm_kernel[(tokens,)](x, weight, out, hidden, eps, BLOCK=block, PDL=pdl, num_warps=warps, launch_pdl=pdl)
    return out


@triton.jit
def _silu_mul_kernel(gate_up, out, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    let_successors_begin(PDL)
    after_predecessors(PDL)
    gate = tl.load(gate_up + token * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (token * 2 + 1) * width + column, mask=inside, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + token * width + column, value.to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of [tokens, 2 · width] → [tokens, width]."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, width)
    pdl = dependent(gate_up.device)
    _silu_mul_kernel[(tokens, triton.cdiv(width, 1024))](gate_up, out, width, BLOCK=1024, PDL=pdl, launch_pdl=pdl)
    return out


@triton.jit
def _rope_and_store_kernel(
    qkv, table, kv, slots, q_weight, k_weight, eps, heads, kv_heads,
    HALF: tl.constexpr, HEADS: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program does some heads of one token; q and k heads come first in `qkv`, then v heads."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    half = tl.arange(0, HALF)[None, :]
    there = head < heads + 2 * kv_heads
    is_v, is_q = head >= heads + kv_heads, head < heads
    let_successors_begin(PDL)
    place = tl.load(slots + token).to(tl.int64) * kv_heads + tl.where(is_v, head - heads - kv_heads, head - heads)
    cos = tl.where(is_v, 1.0, tl.load(table + token * 4 * HALF + half).to(tl.float32))
    sin = tl.where(is_v, 0.0, tl.load(table + token * 4 * HALF + 3 * HALF + half).to(tl.float32))
    after_predecessors(PDL)
    source = qkv + (token * (heads + 2 * kv_heads) + head) * (2 * HALF) + half
    a = tl.load(source, mask=there, other=0.0).to(tl.float32)
    b = tl.load(source + HALF, mask=there, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1))[:, None] / (2 * HALF) + eps)
        gain_a = tl.where(is_q, tl.load(q_weight + half), tl.load(k_weight + half)).to(tl.float32)
        gain_b = tl.where(is_q, tl.load(q_weight + HALF + half), tl.load(k_weight + HALF + half)).to(tl.float32)
        narrow = qkv.dtype.element_ty
        a = tl.where(is_v, a, (a * scale).to(narrow).to(tl.float32) * gain_a)
        b = tl.where(is_v, b, (b * scale).to(narrow).to(tl.float32) * gain_b)
    first = (a * cos - b * sin).to(qkv.dtype.element_ty)
    second = (b * cos + a * sin).to(qkv.dtype.element_ty)
    tl.store(source, first, mask=is_q)
    tl.store(source + HALF, second, mask=is_q)
    target = kv + (place * 2 + is_v) * (2 * HALF) + half
    tl.store(target, first, mask=there & (head >= heads))
    tl.store(target + HALF, second, mask=there & (head >= heads))


def rope_and_store(
    qkv: Tensor,
    table: Tensor,
    kv: Tensor,
    slots: Tensor,
    heads: int,
    qk_norm: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """Split the fused projection, (normalise and) rotate q and k, write k and v to their token slots.

    qkv [tokens, (heads + 2 · kv_heads) · head_dim], contiguous: q is rotated in place. Returns that part of it as
    q [tokens, heads, head_dim]; its rows are as far apart as those of `qkv`. head_dim is a power of two.
    """
    tokens, (kv_heads, head_dim) = qkv.shape[0], (kv.shape[1], kv.shape[3])
    q_weight, k_weight, eps = qk_norm or (qkv, qkv, 0.0)
    at_once = 16 if tokens < 512 else 64
    pdl = dependent(qkv.device)
    grid = (tokens, triton.cdiv(heads + 2 * kv_heads, at_once))
    _rope_and_store_kernel[grid](
        qkv, table, kv, slots, q_weight, k_weight, eps, heads, kv_heads,
        HALF=head_dim // 2, HEADS=at_once, NORM=qk_norm is not None, PDL=pdl, launch_pdl=pdl,
    )  # fmt: skip
    return qkv.view(tokens, -1, head_dim)[:, :heads]
