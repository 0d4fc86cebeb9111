"""Prefill attention for Hopper in Gluon: 128 query rows of one head per program, K and V streamed in by TMA.

    producer       Q   K0 V0 K1 V1 …   one thread copies tiles into rings of shared memory; mbarriers count the bytes
    warpgroup 0        S0 │ S1, O0 │ S2, O1 │ …      rows 0 … 63:   S = Q·Kᵀ of a tile, O += P·V of the tile before,
    warpgroup 1           │ S1, O0 │ S2, O1 │ …      rows 64 … 127: both on the tensor cores while softmax makes P of S

The two warpgroups issue their products in turns, so that one computes its softmax while the other multiplies (the
design of FlashAttention-3, Shah et al., 2024). Gluon is used here and in `linear_hopper.py` alone; `is_available` tells
whether the installed Triton and the device can run it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenllm_kernels.gpu.device import is_hopper
from tokenllm_kernels.gpu.running_softmax import LOG2_E

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    HAS_GLUON = True
except ImportError:
    HAS_GLUON = False

BLOCK_M = 128  # query rows of a program: two warpgroups of 64
LAUNCH_REGISTERS = 168  # of 65536, for each of 384 threads; the warpgroups then share them out anew


@dataclass(frozen=True)
class HopperTiling:
    """How the kernel is cut; part of its compilation, not of its meaning."""

    block_n: int = 128  # context positions of a tile of K or V
    stages: int = 2  # tiles of K, and as many of V, in shared memory
    consumer_registers: int = 240  # per thread; the producer gets what the two consumers leave of 3 · 168
    ping_pong: bool = True  # the warpgroups issue their products in turns


@dataclass(frozen=True)
class PrefillChunks:
    """The chunks of one step, on the device; a chunk of no tokens is padding."""

    tile_starts: Tensor  # [chunks + 1] int32: tiles of BLOCK_M tokens in all chunks before; the last is their number
    q_starts: Tensor  # [chunks] int32: where the chunk's tokens begin in the batch
    counts: Tensor  # [chunks] int32: its tokens, the last ones of …
    ends: Tensor  # [chunks] int32: … a context of that many
    ctx_starts: Tensor  # [chunks] int32: where the context begins in the workspace


def is_available(device: torch.device) -> bool:
    return HAS_GLUON and is_hopper(device)


def most_tiles(tokens: int, chunks: int) -> int:
    """What the tiles of so many chunks with so many tokens in all can't exceed."""
    return tokens // BLOCK_M + min(tokens, chunks)


def prefill_attention_hopper(
    q: Tensor, workspace: Tensor, chunks: PrefillChunks, max_tiles: int, out: Tensor, tiling: HopperTiling
) -> None:
    """softmax(q · Kᵀ / √head_dim) · V of every token of every chunk over its context up to itself.

    q [tokens, heads, head_dim], bfloat16 or float16, rows any distance apart that is a multiple of 16 bytes.
    workspace [positions, kv_heads, 2, head_dim], contiguous: the contexts of the chunks, copied together; all of it
    finite, also where no context lies (a weight of 0 times NaN is NaN), so allocate it zeroed.
    out [tokens, heads, head_dim], contiguous, written for the tokens of the chunks alone.
    Takes no look at what is on the device: `max_tiles` bounds `chunks.tile_starts[-1]`, and the launch may be captured.
    """
    tokens, heads, head_dim = q.shape
    positions, kv_heads, _, _ = workspace.shape
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_rows = TensorDescriptor(q, [tokens, heads * head_dim], [q.stride(0), 1], [64, head_dim], layout)
    kv_row = kv_heads * 2 * head_dim
    kv_rows = TensorDescriptor(workspace, [positions, kv_row], [kv_row, 1], [tiling.block_n, head_dim], layout)
    _prefill_kernel[(heads, max_tiles)](
        q_rows, kv_rows, out, out.stride(0),
        chunks.tile_starts, chunks.q_starts, chunks.counts, chunks.ends, chunks.ctx_starts,
        LOG2_E / math.sqrt(head_dim), heads // kv_heads,
        len(chunks.counts), 1 << (len(chunks.counts) - 1).bit_length(),
        tiling.stages, tiling.consumer_registers, tiling.ping_pong,
        num_warps=4, maxnreg=LAUNCH_REGISTERS,
    )  # fmt: skip


if HAS_GLUON:

    @gluon.jit
    def _fill(kv_desc, row, column, ring, ready, empty, tile):
        stages: gl.constexpr = ring.shape[0]
        stage = tile % stages
        # a fresh barrier counts as having completed the odd phase: the first round finds every stage empty
        mbarrier.wait(empty.index(stage), ((tile // stages) & 1) ^ 1)
        mbarrier.expect(ready.index(stage), kv_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(kv_desc, [row, column], ready.index(stage), ring.index(stage))

    @gluon.jit
    def _produce(
        q_desc, kv_desc, q_tiles, k_tiles, v_tiles, q_ready, k_ready, k_empty, v_ready, v_empty,
        q_row, q_column, context_row, k_column, tiles,
    ):  # fmt: skip
        block_n: gl.constexpr = k_tiles.shape[1]
        v_column = k_column + k_tiles.shape[2]
        mbarrier.expect(q_ready, 2 * q_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(q_desc, [q_row, q_column], q_ready, q_tiles.index(0))
        tma.async_copy_global_to_shared(q_desc, [q_row + 64, q_column], q_ready, q_tiles.index(1))
        # in the order of their use, which also keeps the consumers from waiting for each other in a circle
        _fill(kv_desc, context_row, k_column, k_tiles, k_ready, k_empty, 0)
        for tile in range(tiles):
            if tile + 1 < tiles:
                _fill(kv_desc, context_row + (tile + 1) * block_n, k_column, k_tiles, k_ready, k_empty, tile + 1)
            _fill(kv_desc, context_row + tile * block_n, v_column, v_tiles, v_ready, v_empty, tile)

    @gluon.jit
    def _hide_future(scores, first_position, tile, block_n: gl.constexpr, layout: gl.constexpr):
        positions = first_position + gl.arange(0, 64, gl.SliceLayout(1, layout))
        columns = tile * block_n + gl.arange(0, block_n, gl.SliceLayout(0, layout))
        return gl.where(columns[None, :] <= positions[:, None], scores, float("-inf"))

    @gluon.jit
    def _softmax(scores, row_max, row_sum, scale):
        """Probabilities against the new row maxima, and the factor that older sums decay by."""
        new_max = gl.maximum(row_max, gl.max(scores, 1))
        decay = gl.exp2((row_max - new_max) * scale)
        probabilities = gl.exp2(scores * scale - (new_max * scale)[:, None])
        return probabilities, decay, new_max, row_sum * decay + gl.sum(probabilities, 1)

    @gluon.jit
    def _rescale(acc, decay):
        acc_layout: gl.constexpr = acc.type.layout
        return acc * gl.convert_layout(decay, gl.SliceLayout(1, acc_layout))[:, None]

    @gluon.jit
    def _as_weights(probabilities, dtype: gl.constexpr, acc_layout: gl.constexpr):
        return gl.convert_layout(probabilities.to(dtype), gl.DotOperandLayout(0, acc_layout, 2))

    @gluon.jit
    def _advance(
        tile, tiles, acc, probabilities, decay, row_max, row_sum, q_tile, k_tiles, v_tiles,
        k_ready, k_empty, v_ready, v_empty, my_turn, other_turn, first_position, scale,
        masked: gl.constexpr, warpgroup: gl.constexpr, ping_pong: gl.constexpr,
    ):  # fmt: skip
        """Scores of this tile and values of the one before, on the tensor cores at once; K of this tile has come."""
        stages: gl.constexpr = k_tiles.shape[0]
        block_n: gl.constexpr = k_tiles.shape[1]
        scores_layout: gl.constexpr = probabilities.type.layout
        acc_layout: gl.constexpr = acc.type.layout
        stage = tile % stages
        before = (tile - 1) % stages
        if ping_pong:
            # warpgroup 0 begins; its turn n comes after turn n - 1 of warpgroup 1
            mbarrier.wait(my_turn, ((tile - 1) & 1) ^ (1 - warpgroup))
        scores = gl.zeros([64, block_n], gl.float32, scores_layout)
        scores = warpgroup_mma(q_tile, k_tiles.index(stage).permute((1, 0)), scores, use_acc=False, is_async=True)
        mbarrier.wait(v_ready.index(before), ((tile - 1) // stages) & 1)
        acc = _rescale(acc, decay)
        weights = _as_weights(probabilities, q_tile.dtype, acc_layout)
        acc = warpgroup_mma(weights, v_tiles.index(before), acc, is_async=True)
        if ping_pong:
            mbarrier.arrive(other_turn, count=1)
        scores = warpgroup_mma_wait(num_outstanding=1, deps=(scores,))
        mbarrier.arrive(k_empty.index(stage), count=1)
        if masked:
            scores = _hide_future(scores, first_position, tile, block_n, scores_layout)
        probabilities, decay, row_max, row_sum = _softmax(scores, row_max, row_sum, scale)
        # awaited here and not where K is used: ptxas moves no arithmetic over this wait's branch, so that
        # the softmax stays before the wait for the values and overlaps with their product
        following = tile + 1
        mbarrier.wait(k_ready.index(following % stages), (following // stages) & 1, pred=following < tiles)
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        mbarrier.arrive(v_empty.index(before), count=1)
        return acc, probabilities, decay, row_max, row_sum

    @gluon.jit
    def _consume(
        q_tiles, k_tiles, v_tiles, q_ready, k_ready, k_empty, v_ready, v_empty, turns,
        out, out_stride, q_row, q_column, rows, first_position, tiles, scale,
        warpgroup: gl.constexpr, ping_pong: gl.constexpr,
    ):  # fmt: skip
        stages: gl.constexpr = k_tiles.shape[0]
        block_n: gl.constexpr = k_tiles.shape[1]
        head_dim: gl.constexpr = k_tiles.shape[2]
        scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, block_n, 16])
        acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, head_dim, 16])
        first_position = first_position + 64 * warpgroup
        q_tile = q_tiles.index(warpgroup)
        my_turn = turns.index(warpgroup)
        other_turn = turns.index(1 - warpgroup)

        mbarrier.wait(q_ready, 0)
        mbarrier.wait(k_ready.index(0), 0)
        scores = gl.zeros([64, block_n], gl.float32, scores_layout)
        scores = warpgroup_mma(q_tile, k_tiles.index(0).permute((1, 0)), scores, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(num_outstanding=0, deps=(scores,))
        mbarrier.arrive(k_empty.index(0), count=1)
        scores = _hide_future(scores, first_position, 0, block_n, scores_layout)
        # every row sees position 0: its maximum is finite from the first tile on
        row_max = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, scores_layout))
        row_sum = gl.zeros([64], gl.float32, gl.SliceLayout(1, scores_layout))
        probabilities, decay, row_max, row_sum = _softmax(scores, row_max, row_sum, scale)
        acc = gl.zeros([64, head_dim], gl.float32, acc_layout)
        mbarrier.wait(k_ready.index(1 % stages), 1 // stages, pred=tiles > 1)

        unmasked = gl.maximum(1, gl.minimum(tiles, (first_position + 1) // block_n))
        for tile in range(1, unmasked):
            acc, probabilities, decay, row_max, row_sum = _advance(
                tile, tiles, acc, probabilities, decay, row_max, row_sum, q_tile, k_tiles, v_tiles,
                k_ready, k_empty, v_ready, v_empty, my_turn, other_turn, first_position, scale,
                False, warpgroup, ping_pong,
            )  # fmt: skip
        for tile in range(unmasked, tiles):
            acc, probabilities, decay, row_max, row_sum = _advance(
                tile, tiles, acc, probabilities, decay, row_max, row_sum, q_tile, k_tiles, v_tiles,
                k_ready, k_empty, v_ready, v_empty, my_turn, other_turn, first_position, scale,
                True, warpgroup, ping_pong,
            )  # fmt: skip

        last = tiles - 1
        acc = _rescale(acc, decay)
        weights = _as_weights(probabilities, q_tile.dtype, acc_layout)
        mbarrier.wait(v_ready.index(last % stages), (last // stages) & 1)
        acc = warpgroup_mma(weights, v_tiles.index(last % stages), acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        acc = _rescale(acc, 1.0 / row_sum)

        # through the shared memory of Q, so that a thread writes 16 consecutive bytes
        q_tile.store(acc.to(q_tile.dtype))
        copy_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // head_dim, head_dim // 8], [4, 1], [1, 0])
        result = q_tile.load(copy_layout)
        row = 64 * warpgroup + gl.arange(0, 64, gl.SliceLayout(1, copy_layout))
        column = q_column + gl.arange(0, head_dim, gl.SliceLayout(0, copy_layout))
        place = (q_row + row).to(gl.int64)[:, None] * out_stride + column[None, :]
        gl.store(out + place, result, mask=(row < rows)[:, None])

    @gluon.jit
    def _prefill_kernel(
        q_desc, kv_desc, out, out_stride, tile_starts, q_starts, counts, ends, ctx_starts, scale, group,
        chunks: gl.constexpr, padded_chunks: gl.constexpr, stages: gl.constexpr,
        consumer_registers: gl.constexpr, ping_pong: gl.constexpr,
    ):  # fmt: skip
        dtype: gl.constexpr = q_desc.dtype
        head_dim: gl.constexpr = q_desc.block_type.shape[1]
        block_n: gl.constexpr = kv_desc.block_type.shape[0]
        head = gl.program_id(0)
        # the last tiles of a context see most of it: they start first
        tile = gl.load(tile_starts + chunks) - 1 - gl.program_id(1)
        if tile >= 0:
            lookup: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
            each = gl.arange(0, padded_chunks, lookup)
            following = gl.load(tile_starts + 1 + each, mask=each < chunks, other=2147483647)
            chunk = gl.sum((following <= tile).to(gl.int32), 0)
            q_offset = (tile - gl.load(tile_starts + chunk)) * 128
            rows = gl.load(counts + chunk) - q_offset
            end = gl.load(ends + chunk)
            first_position = end - rows
            q_row = gl.load(q_starts + chunk) + q_offset
            tiles = gl.cdiv(gl.minimum(first_position + 128, end), block_n)
            context_row = gl.load(ctx_starts + chunk)
            q_column = head * head_dim
            k_column = (head // group) * (2 * head_dim)

            q_tiles = gl.allocate_shared_memory(dtype, [2, 64, head_dim], q_desc.layout)
            k_tiles = gl.allocate_shared_memory(dtype, [stages, block_n, head_dim], kv_desc.layout)
            v_tiles = gl.allocate_shared_memory(dtype, [stages, block_n, head_dim], kv_desc.layout)
            q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
            k_ready = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
            k_empty = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
            v_ready = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
            v_empty = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
            turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
            mbarrier.init(q_ready, count=1)
            for stage in gl.static_range(stages):
                mbarrier.init(k_ready.index(stage), count=1)
                mbarrier.init(k_empty.index(stage), count=2)
                mbarrier.init(v_ready.index(stage), count=1)
                mbarrier.init(v_empty.index(stage), count=2)
            mbarrier.init(turns.index(0), count=1)
            mbarrier.init(turns.index(1), count=1)
            fence_async_shared()

            gl.warp_specialize(
                [
                    (_produce, (q_desc, kv_desc, q_tiles, k_tiles, v_tiles, q_ready, k_ready, k_empty, v_ready,
                                v_empty, q_row, q_column, context_row, k_column, tiles)),
                    (_consume, (q_tiles, k_tiles, v_tiles, q_ready, k_ready, k_empty, v_ready, v_empty, turns, out,
                                out_stride, q_row, q_column, rows, first_position, tiles, scale, 0, ping_pong)),
                    (_consume, (q_tiles, k_tiles, v_tiles, q_ready, k_ready, k_empty, v_ready, v_empty, turns, out,
                                out_stride, q_row, q_column, rows, first_position, tiles, scale, 1, ping_pong)),
                ],
                [4, 4],
                [consumer_registers, consumer_registers],
            )  # fmt: skip
