"""Prefill attention for Hopper in Gluon: 128 query rows of one head per program, K and V streamed in by TMA.

A producer partition copies K and V tiles from the workspace into rings of shared memory; two consumer warpgroups of
64 rows each multiply on the tensor cores and overlap the softmax of one tile with the products of the next. Every
use of Gluon stands in this file; `is_available` tells whether the installed Triton and the device can run it.
"""

import math
from dataclasses import dataclass

import torch

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

    IMPORTED = True
except ImportError:
    IMPORTED = False

BLOCK_M = 128  # query rows of a program: two warpgroups of 64


@dataclass(frozen=True)
class Tiling:
    block_n: int = 128  # context positions of a K or V tile
    stages: int = 2  # tiles of K, and as many of V, in shared memory
    consumer_registers: int = 240  # per thread; the producer gets what the consumers leave of 504
    ping_pong: bool = True  # the warpgroups issue their products in turns


def is_available() -> bool:
    return IMPORTED and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


if IMPORTED:

    @gluon.jit
    def _produce(
        q_desc, kv_desc, q_tiles, k_tiles, v_tiles, q_ready, k_ready, k_empty, v_ready, v_empty,
        q_row, q_column, context_row, k_column, tiles,
    ):  # fmt: skip
        stages: gl.constexpr = k_tiles.shape[0]
        block_n: gl.constexpr = k_tiles.shape[1]
        head_dim: gl.constexpr = k_tiles.shape[2]
        mbarrier.expect(q_ready, 2 * q_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(q_desc, [q_row, q_column], q_ready, q_tiles.index(0))
        tma.async_copy_global_to_shared(q_desc, [q_row + 64, q_column], q_ready, q_tiles.index(1))
        for tile in range(tiles):
            stage = tile % stages
            # a fresh barrier counts as having completed the odd phase: the first round finds every stage empty
            empty_phase = ((tile // stages) & 1) ^ 1
            row = context_row + tile * block_n
            mbarrier.wait(k_empty.index(stage), empty_phase)
            mbarrier.expect(k_ready.index(stage), kv_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(kv_desc, [row, k_column], k_ready.index(stage), k_tiles.index(stage))
            mbarrier.wait(v_empty.index(stage), empty_phase)
            mbarrier.expect(v_ready.index(stage), kv_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                kv_desc, [row, k_column + head_dim], v_ready.index(stage), v_tiles.index(stage)
            )

    @gluon.jit
    def _hide_future(scores, first_position, tile, block_n: gl.constexpr, layout: gl.constexpr):
        positions = first_position + gl.arange(0, 64, gl.SliceLayout(1, layout))
        columns = tile * block_n + gl.arange(0, block_n, gl.SliceLayout(0, layout))
        return gl.where(columns[None, :] <= positions[:, None], scores, float("-inf"))

    @gluon.jit
    def _advance(
        tile, acc, row_max, row_sum, weights, q_tile, k_tiles, v_tiles, k_ready, k_empty, v_ready, v_empty,
        my_turn, other_turn, first_position, scale,
        masked: gl.constexpr, warpgroup: gl.constexpr, ping_pong: gl.constexpr, scores_layout: gl.constexpr,
        weights_layout: gl.constexpr,
    ):  # fmt: skip
        """Scores of this tile and values of the one before, both on the tensor cores at once."""
        stages: gl.constexpr = k_tiles.shape[0]
        block_n: gl.constexpr = k_tiles.shape[1]
        stage = tile % stages
        before = (tile - 1) % stages
        mbarrier.wait(k_ready.index(stage), (tile // stages) & 1)
        if ping_pong:
            # warpgroup 0 begins; its turn n comes after turn n - 1 of warpgroup 1
            mbarrier.wait(my_turn, ((tile - 1) & 1) ^ (1 - warpgroup))
        scores = gl.zeros([64, block_n], gl.float32, scores_layout)
        scores = warpgroup_mma(
            q_tile, k_tiles.index(stage).permute((1, 0)), scores, use_acc=False, is_async=True
        )
        mbarrier.wait(v_ready.index(before), ((tile - 1) // stages) & 1)
        acc = warpgroup_mma(weights, v_tiles.index(before), acc, is_async=True)
        if ping_pong:
            mbarrier.arrive(other_turn, count=1)
        scores = warpgroup_mma_wait(num_outstanding=1, deps=(scores,))
        mbarrier.arrive(k_empty.index(stage), count=1)
        if masked:
            scores = _hide_future(scores, first_position, tile, block_n, scores_layout)
        new_max = gl.maximum(row_max, gl.max(scores, 1))
        decay = gl.exp2((row_max - new_max) * scale)
        probabilities = gl.exp2(scores * scale - (new_max * scale)[:, None])
        row_sum = row_sum * decay + gl.sum(probabilities, 1)
        acc, weights = warpgroup_mma_wait(num_outstanding=0, deps=(acc, weights))
        mbarrier.arrive(v_empty.index(before), count=1)
        acc_layout: gl.constexpr = weights_layout.parent
        acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, acc_layout))[:, None]
        weights = gl.convert_layout(probabilities.to(weights.dtype), weights_layout)
        return acc, new_max, row_sum, weights

    @gluon.jit
    def _consume(
        q_tiles, k_tiles, v_tiles, q_ready, k_ready, k_empty, v_ready, v_empty, turns,
        out, out_stride, q_row, q_column, rows, first_position, tiles, scale,
        warpgroup: gl.constexpr, ping_pong: gl.constexpr,
    ):  # fmt: skip
        dtype: gl.constexpr = q_tiles.dtype
        block_n: gl.constexpr = k_tiles.shape[1]
        head_dim: gl.constexpr = k_tiles.shape[2]
        stages: gl.constexpr = k_tiles.shape[0]
        scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, block_n, 16])
        acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, head_dim, 16])
        weights_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
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
        # position 0 is seen by every row, so the maxima are finite from the first tile on
        scores = _hide_future(scores, first_position, 0, block_n, scores_layout)
        row_max = gl.max(scores, 1)
        probabilities = gl.exp2(scores * scale - (row_max * scale)[:, None])
        row_sum = gl.sum(probabilities, 1)
        weights = gl.convert_layout(probabilities.to(dtype), weights_layout)
        acc = gl.zeros([64, head_dim], gl.float32, acc_layout)

        unmasked = gl.maximum(1, gl.minimum(tiles, (first_position + 1) // block_n))
        for tile in range(1, unmasked):
            acc, row_max, row_sum, weights = _advance(
                tile, acc, row_max, row_sum, weights, q_tile, k_tiles, v_tiles, k_ready, k_empty, v_ready, v_empty,
                my_turn, other_turn, first_position, scale, False, warpgroup, ping_pong, scores_layout, weights_layout,
            )  # fmt: skip
        for tile in range(unmasked, tiles):
            acc, row_max, row_sum, weights = _advance(
                tile, acc, row_max, row_sum, weights, q_tile, k_tiles, v_tiles, k_ready, k_empty, v_ready, v_empty,
                my_turn, other_turn, first_position, scale, True, warpgroup, ping_pong, scores_layout, weights_layout,
            )  # fmt: skip

        last = (tiles - 1) % stages
        mbarrier.wait(v_ready.index(last), ((tiles - 1) // stages) & 1)
        acc = warpgroup_mma(weights, v_tiles.index(last), acc, is_async=True)
        acc, weights = warpgroup_mma_wait(num_outstanding=0, deps=(acc, weights))
        acc = acc / gl.convert_layout(row_sum, gl.SliceLayout(1, acc_layout))[:, None]

        # through the shared memory of Q, so that a thread writes 16 consecutive bytes
        q_tile.store(acc.to(dtype))
        copy_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // head_dim, head_dim // 8], [4, 1], [1, 0])
        result = q_tile.load(copy_layout)
        row = 64 * warpgroup + gl.arange(0, 64, gl.SliceLayout(1, copy_layout))
        column = q_column + gl.arange(0, head_dim, gl.SliceLayout(0, copy_layout))
        place = (q_row + row).to(gl.int64)[:, None] * out_stride + column[None, :]
        gl.store(out + place, result, mask=(row < rows)[:, None])

    @gluon.jit
    def _prefill_kernel(
        q_desc, kv_desc, out, out_stride, tile_starts, q_starts, counts, ends, ctx_starts, scale, group,
        sequences: gl.constexpr, sequences_padded: gl.constexpr, stages: gl.constexpr,
        consumer_registers: gl.constexpr, ping_pong: gl.constexpr, num_warps: gl.constexpr,
    ):  # fmt: skip
        dtype: gl.constexpr = q_desc.dtype
        head_dim: gl.constexpr = q_desc.block_type.shape[1]
        block_n: gl.constexpr = kv_desc.block_type.shape[0]
        head = gl.program_id(0)
        # the last tiles of a context see most of it: they start first
        tile = gl.load(tile_starts + sequences) - 1 - gl.program_id(1)
        if tile >= 0:
            lookup: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
            each = gl.arange(0, sequences_padded, lookup)
            following = gl.load(tile_starts + 1 + each, mask=each < sequences, other=2147483647)
            sequence = gl.sum((following <= tile).to(gl.int32), 0)
            q_offset = (tile - gl.load(tile_starts + sequence)) * 128
            rows = gl.load(counts + sequence) - q_offset
            end = gl.load(ends + sequence)
            first_position = end - rows
            q_row = gl.load(q_starts + sequence) + q_offset
            tiles = gl.cdiv(gl.minimum(first_position + 128, end), block_n)
            context_row = gl.load(ctx_starts + sequence)
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
