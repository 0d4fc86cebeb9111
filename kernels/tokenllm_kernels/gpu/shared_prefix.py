"""Decode attention over a prefix that many sequences share: its K and V are read once for all of them.

Sequences that begin with the same slots form a group. A group's members, GQA heads and all, are packed into tiles of
the tensor core's size, so that one tile of K and V serves up to 64 query heads; the prefix is cut into splits where
there are too few tiles to fill the GPU. What each split leaves, a partial softmax per member and head, is where the
decode kernel begins when it does the sequence's own tokens (`decode_attention.py`): the rest of a sequence is work as
any other. The method is that of cascade inference (Ye et al., 2024), at token granularity.

The words, written by the host when the batch changes (`write_prefixes`), stand in a `PrefixLayout`:

    blocks, members, splits │ by decode: shared tokens, which member │ by member: which decode │ blocks: row, tokens, …
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from tokenllm_kernels.gpu.device import multiprocessors
from tokenllm_kernels.gpu.launch import after_predecessors, dependent, let_successors_begin
from tokenllm_kernels.gpu.running_softmax import LOG2_E, load_tile, take_in

Words = NDArray[np.int32]

TILE_HEADS = 64  # query heads in one tile
COUNTS = 4  # words: blocks, members, splits, one to spare
MOST_SPLITS = 16
PROGRAMS_PER_PROCESSOR = 2


@dataclass(frozen=True)
class PrefixLayout:
    """Offsets into the words of the shared prefixes of at most `rows` decodes."""

    rows: int
    members_each: int  # of a block

    @staticmethod
    def of(rows: int, heads: int, kv_heads: int) -> "PrefixLayout":
        return PrefixLayout(rows, max(1, TILE_HEADS // triton.next_power_of_2(heads // kv_heads)))

    @property
    def shared(self) -> int:
        """Tokens of the prefix of each decode, 0 for one without."""
        return COUNTS

    @property
    def member(self) -> int:
        """Its number among all members."""
        return COUNTS + self.rows

    @property
    def decode(self) -> int:
        """Of each member, the decode that it is."""
        return COUNTS + 2 * self.rows

    @property
    def blocks(self) -> int:
        """Of each block: a row whose index tells the slots, tokens of the prefix, its first member, its members."""
        return COUNTS + 3 * self.rows

    @property
    def most_blocks(self) -> int:
        """Groups have two members at least."""
        return self.rows // 2 + self.rows // self.members_each + 1

    @property
    def words(self) -> int:
        return self.blocks + 4 * self.most_blocks


def write_prefixes(words: Words, layout: PrefixLayout, groups: Sequence[tuple[int, int, Words]], splits: int) -> None:
    """Enter groups of (row of one member, tokens shared, the decodes that are members, at least two)."""
    words[:] = 0
    blocks = words[layout.blocks :].reshape(-1, 4)
    block = first = 0
    for row, tokens, decodes in groups:
        numbers = np.arange(first, first + len(decodes))
        words[layout.shared + decodes] = tokens
        words[layout.member + decodes] = numbers
        words[layout.decode + numbers] = decodes
        for start in range(0, len(decodes), layout.members_each):
            blocks[block] = row, tokens, first + start, min(layout.members_each, len(decodes) - start)
            block += 1
        first += len(decodes)
    words[:3] = block, first, splits


@dataclass(frozen=True)
class PrefixPartials:
    """What the splits leave: slot = split · members + member."""

    words: Tensor  # [layout.words] int32
    layout: PrefixLayout
    values: Tensor  # [slots, heads, head_dim] float32: weighted values
    extremes: Tensor  # [slots, heads, 2] float32: their maximum and sum of weights

    @classmethod
    def empty(cls, words: Tensor, layout: PrefixLayout, heads: int, head_dim: int) -> "PrefixPartials":
        slots = 2 * max(layout.rows, MOST_SPLITS)
        values = torch.empty(slots, heads, head_dim, dtype=torch.float32, device=words.device)
        return cls(words, layout, values, torch.empty(slots, heads, 2, dtype=torch.float32, device=words.device))

    def splits(self, groups: Sequence[tuple[int, int, Words]], kv_heads: int) -> int:
        """So many that the GPU is busy and the partials have room."""
        if not groups:
            return 1
        members = sum(len(decodes) for _, _, decodes in groups)
        blocks = sum(triton.cdiv(len(decodes), self.layout.members_each) for _, _, decodes in groups)
        wanted = PROGRAMS_PER_PROCESSOR * multiprocessors(self.words.device) // (blocks * kv_heads)
        return max(1, min(wanted, MOST_SPLITS, len(self.values) // members))


@triton.jit
def _prefix_kernel(
    q, kv, index, words, values_out, extremes, decode_at, blocks_at, q_stride, index_stride, kv_heads, scale,
    GROUP: tl.constexpr, GROUP_TILE: tl.constexpr, MEMBERS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """q [decodes, kv_heads, GROUP, HEAD_DIM] with rows `q_stride` apart."""
    blocks, members, splits = tl.load(words), tl.load(words + 1), tl.load(words + 2)
    packed = tl.arange(0, MEMBERS * GROUP_TILE)
    mine, query_head = packed // GROUP_TILE, packed % GROUP_TILE
    d = tl.arange(0, HEAD_DIM)
    token = tl.arange(0, BLOCK_N)
    after_predecessors(PDL)
    for item in tl.range(tl.program_id(0), blocks * kv_heads * splits, tl.num_programs(0)):
        block, head, split = item % blocks, item // blocks % kv_heads, item // blocks // kv_heads
        at = words + blocks_at + block * 4
        row, tokens, first, count = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
        inside = (mine < count) & (query_head < GROUP)
        decode = tl.load(words + decode_at + first + mine, mask=mine < count, other=0)
        heads_here = (head * GROUP + query_head) * HEAD_DIM
        query = tl.load(
            q + (decode.to(tl.int64) * q_stride + heads_here)[:, None] + d[None, :], mask=inside[:, None], other=0.0
        )
        slots = index + row.to(tl.int64) * index_stride
        share = tl.cdiv(tl.cdiv(tokens, BLOCK_N), splits) * BLOCK_N
        highest = tl.full([MEMBERS * GROUP_TILE], float("-inf"), tl.float32)
        weight = tl.zeros([MEMBERS * GROUP_TILE], tl.float32)
        values = tl.zeros([MEMBERS * GROUP_TILE, HEAD_DIM], tl.float32)
        end = tl.minimum(tokens, (split + 1) * share)
        for start in tl.range(split * share, end, BLOCK_N, num_stages=STAGES):
            n = start + token
            k, v = load_tile(kv, tl.load(slots + tl.minimum(n, tokens - 1)), head, kv_heads, HEAD_DIM)
            scores = tl.dot(query, k, input_precision=PRECISION) * scale
            scores = tl.where((n < tokens)[None, :], scores, float("-inf"))
            highest, weight, values = take_in(scores, v, highest, weight, values, PRECISION)
        slot = (split * members + first + mine).to(tl.int64) * (kv_heads * GROUP) + head * GROUP + query_head
        tl.store(values_out + slot[:, None] * HEAD_DIM + d[None, :], values, mask=inside[:, None])
        tl.store(extremes + slot * 2, highest, mask=inside)
        tl.store(extremes + slot * 2 + 1, weight, mask=inside)
    let_successors_begin(PDL)


@triton.jit
def begin_after_prefix(
    words, values_in, extremes, member_at, sequence, head, kv_heads, query_head, d,
    GROUP: tl.constexpr, GROUP_TILE: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """(maximum, sum of weights, weighted values) of one sequence and kv head over its shared prefix."""
    members, splits = tl.load(words + 1), tl.load(words + 2)
    member = tl.load(words + member_at + sequence)
    inside = query_head < GROUP
    highest = tl.full([GROUP_TILE], float("-inf"), tl.float32)
    weight = tl.zeros([GROUP_TILE], tl.float32)
    values = tl.zeros([GROUP_TILE, HEAD_DIM], tl.float32)
    for split in tl.range(0, splits):
        slot = (split * members + member).to(tl.int64) * (kv_heads * GROUP) + head * GROUP + query_head
        their_highest = tl.load(extremes + slot * 2, mask=inside, other=0.0)
        their_weight = tl.load(extremes + slot * 2 + 1, mask=inside, other=0.0)
        theirs = tl.load(values_in + slot[:, None] * HEAD_DIM + d[None, :], mask=inside[:, None], other=0.0)
        higher = tl.maximum(highest, their_highest)  # the first split has work, so it is a number
        kept, gain = tl.exp2(highest - higher), tl.exp2(their_highest - higher)
        weight = weight * kept + their_weight * gain
        values = values * kept[:, None] + theirs * gain[:, None]
        highest = higher
    return highest, weight, values


def prefix_attention(q: Tensor, kv: Tensor, index: Tensor, partials: PrefixPartials) -> None:
    """Leave in `partials` what the newest token of each member sees of its group's prefix.

    q [decodes, heads, head_dim], rows any distance apart; kv [slots + 1, kv_heads, 2, head_dim]; index
    [rows, positions] int32 → slot. Nothing is done where `partials.words` name no block.
    """
    heads, head_dim, kv_heads = q.shape[1], q.shape[2], kv.shape[1]
    layout, group_tile, pdl = partials.layout, triton.next_power_of_2(heads // kv_heads), dependent(q.device)
    block_n = max(16, min(128, 64 * 256 // (head_dim * q.itemsize)))
    _prefix_kernel[(PROGRAMS_PER_PROCESSOR * multiprocessors(q.device),)](
        q, kv, index, partials.words, partials.values, partials.extremes, layout.decode, layout.blocks,
        q.stride(0), index.stride(0), kv_heads, head_dim**-0.5 * LOG2_E,
        GROUP=heads // kv_heads, GROUP_TILE=group_tile, MEMBERS=layout.members_each,
        HEAD_DIM=head_dim, BLOCK_N=block_n, STAGES=3, PRECISION="ieee" if q.dtype == torch.float32 else None,
        PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
