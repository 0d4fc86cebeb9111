"""Attention of prompt chunks over token-granular KV memory, straight from the pool: works on every GPU.

A program takes TOKENS_TILE consecutive tokens of one chunk with all query heads of one kv head, packed into the rows of
one tile, so K and V are read once for the whole group (FlashAttention-2, Dao, 2023, with a gather). The grid is fixed;
which chunk a program works on, it looks up on the device, and programs without work leave at once.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from tokenllm_kernels.gpu.running_softmax import LOG2_E, load_tile, take_in


@dataclass(frozen=True)
class ChunkTable:
    """The chunks of one step, in the order of their tokens, padded with chunks of no tokens."""

    rows: Tensor  # [chunks] int32: row of the index
    starts: Tensor  # [chunks] int32: where the chunk's tokens begin in the batch
    counts: Tensor  # [chunks] int32: its tokens, the last ones of …
    ends: Tensor  # [chunks] int32: … a context of that many


@triton.jit
def find_chunk(counts, tile, TILE: tl.constexpr, CHUNKS: tl.constexpr):
    """(chunk, tile of the chunk) of the `tile`-th tile of the step; chunk == CHUNKS past the last."""
    chunk = tl.arange(0, CHUNKS)
    tiles = tl.cdiv(tl.load(counts + chunk), TILE)
    upto = tl.cumsum(tiles, 0)
    found = tl.sum((upto <= tile).to(tl.int32), 0)
    return found, tile - tl.sum(tl.where(chunk < found, tiles, 0), 0)


@triton.jit
def _prefill_kernel(
    q, kv, out, rows, starts, counts, ends, index,
    q_stride, index_stride, kv_heads, scale,
    GROUP: tl.constexpr, MEMBERS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = BLOCK_M // MEMBERS
    head = tl.program_id(1)
    chunk, tile = find_chunk(counts, tl.program_id(0), TOKENS, CHUNKS)
    if chunk == CHUNKS:
        return
    count, end = tl.load(counts + chunk), tl.load(ends + chunk)
    tile = tl.cdiv(count, TOKENS) - 1 - tile  # the longest first
    r = tl.arange(0, BLOCK_M)
    token, member = tile * TOKENS + r // MEMBERS, r % MEMBERS
    mine = (token < count) & (member < GROUP)
    place = (tl.load(starts + chunk) + token).to(tl.int64)
    d = tl.arange(0, HEAD_DIM)
    columns = (head * GROUP + member)[:, None] * HEAD_DIM + d[None, :]
    packed = tl.load(q + place[:, None] * q_stride + columns, mask=mine[:, None], other=0.0)
    position = end - count + tl.minimum(token, count - 1)
    slots = index + tl.load(rows + chunk).to(tl.int64) * index_stride
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    values = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    first = end - count + tile * TOKENS  # position of the tile's first token: what all of its tokens see ends there
    seen = tl.minimum(first + TOKENS, end)
    whole = (first + 1) // BLOCK_N * BLOCK_N
    highest, weight, values = _attend(
        packed, kv, slots, position, highest, weight, values, 0, whole, seen, head, kv_heads, scale,
        HEAD_DIM, BLOCK_N, False, STAGES, PRECISION,
    )  # fmt: skip
    highest, weight, values = _attend(
        packed, kv, slots, position, highest, weight, values, whole, seen, seen, head, kv_heads, scale,
        HEAD_DIM, BLOCK_N, True, STAGES, PRECISION,
    )  # fmt: skip
    target = out + place[:, None] * (kv_heads * GROUP * HEAD_DIM) + columns
    tl.store(target, (values / weight[:, None]).to(out.dtype.element_ty), mask=mine[:, None])


@triton.jit
def _attend(
    packed, kv, slots, position, highest, weight, values, start, stop, seen, head, kv_heads, scale,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take the context tokens start … stop into the running softmax; CAUSAL where not every token sees all of them."""
    for begin in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        n = begin + tl.arange(0, BLOCK_N)
        k, v = load_tile(kv, tl.load(slots + tl.minimum(n, seen - 1)), head, kv_heads, HEAD_DIM)
        scores = tl.dot(packed, k, input_precision=PRECISION) * scale
        if CAUSAL:
            scores = tl.where(n[None, :] <= position[:, None], scores, float("-inf"))
        highest, weight, values = take_in(scores, v, highest, weight, values, PRECISION)
    return highest, weight, values


def prefill_attention(q: Tensor, kv: Tensor, index: Tensor, chunks: ChunkTable, tokens: int, out: Tensor) -> None:
    """softmax(q · Kᵀ / √head_dim) · V of every token of every chunk over its sequence up to itself.

    q [tokens, heads, head_dim], rows any distance apart; kv [slots + 1, kv_heads, 2, head_dim], written for all tokens
    of the contexts; index [rows, positions] int32 → slot; out [tokens, heads, head_dim], contiguous, written for the
    tokens of the chunks alone. `tokens`: at most that many in all chunks together.
    """
    heads, head_dim, kv_heads = q.shape[1], q.shape[2], kv.shape[1]
    group, wide = heads // kv_heads, q.itemsize == 4
    members = triton.next_power_of_2(group)
    block_m, block_n, warps, stages = (64, 32, 4, 2) if wide or head_dim > 128 else (128, 64, 8, 3)
    tiles = triton.cdiv(tokens * members, block_m) + min(tokens, chunks.rows.shape[0])
    _prefill_kernel[(tiles, kv_heads)](
        q, kv, out, chunks.rows, chunks.starts, chunks.counts, chunks.ends, index,
        q.stride(0), index.stride(0), kv_heads, head_dim**-0.5 * LOG2_E,
        GROUP=group, MEMBERS=members, HEAD_DIM=head_dim, BLOCK_M=block_m, BLOCK_N=block_n,
        CHUNKS=chunks.rows.shape[0], STAGES=stages, PRECISION="ieee" if wide else None, num_warps=warps,
    )  # fmt: skip
