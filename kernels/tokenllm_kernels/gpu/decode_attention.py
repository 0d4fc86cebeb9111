"""TokenAttention for decoding: one query token per sequence over token-granular KV memory (page size 1).

The whole batch is one line of work: for each sequence, for each kv head, its tiles of BLOCK_N tokens. A fixed grid of
persistent programs cuts that line into pieces of equal length, so ragged batches balance and the grid, and with it a
CUDA graph, serves every length:

    sequence 0, head 0       sequence 0, head 1       sequence 1, head 0
    ├──┬──┬──┬──┬──┼──┬──┬──┬──┬──┼──┬──┬──┬──┬──┬──┬──┤
    └── program 0 ──┴── program 1 ──┴── program 2 ──┘ …

A program that does all tiles of a head writes the result. Where several share one, each leaves a partial softmax
(maximum, sum, weighted values) and the last to arrive merges them in a fixed order (split-KV as in Flash-Decoding, Dao
et al., 2023; even pieces as in Stream-K, Osama et al., 2023). The query heads of a kv head are packed into one tile, so
K and V are read once. Where each piece begins is computed once a step, by `plan_decode`; all layers share it.

Sequences that share a prefix may have it done before, for all of them at once (`shared_prefix.py`): their line begins
with the first token that is their own, and their softmax with what was left for them.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenllm_kernels.gpu.device import multiprocessors
from tokenllm_kernels.gpu.launch import after_predecessors, dependent, let_successors_begin
from tokenllm_kernels.gpu.running_softmax import LOG2_E, load_tile, take_in
from tokenllm_kernels.gpu.shared_prefix import PrefixPartials, begin_after_prefix

# So many programs share a head at most, while pieces are no longer than that: more have more to merge than they save.
# On an H100 one sequence of 4096 tokens takes 32 µs in pieces of one tile, 19 in pieces of four; one of 1024 10 and 13.
_MERGED = tl.constexpr(16)
_SHORT = tl.constexpr(4)


@dataclass(frozen=True)
class DecodeTiling:
    """How the decode kernel is cut; part of its compilation, not of its meaning."""

    block_n: int
    warps: int
    stages: int
    programs: int

    @classmethod
    def of(cls, dtype: torch.dtype, head_dim: int, device: torch.device) -> "DecodeTiling":
        """Measured on an H100 at bfloat16 and head_dim 128; elsewhere a tile of as many bytes, 32 kB of K and V."""
        block_n = max(16, min(128, 64 * 256 // (head_dim * dtype.itemsize)))
        return cls(block_n=block_n, warps=2, stages=3, programs=4 * multiprocessors(device))


@dataclass(frozen=True)
class DecodePlan:
    """Where each program's piece of the line begins. Buffers are allocated once; `plan_decode` fills them each step."""

    tiling: DecodeTiling
    lengths: Tensor  # [sequences] int32: tokens of each, 0 for padding at the end
    rows: Tensor  # [sequences] int32: their rows of the index
    before: Tensor  # [sequences + 1] int32: tiles of one head of all sequences before
    pieces: Tensor  # [programs, 4] int32: sequence, head, tile, number of tiles
    partial: Tensor  # [programs · 2, group, head_dim] float32: weighted values
    extremes: Tensor  # [programs · 2, group, 2] float32: their maximum and sum of weights
    arrived: Tensor  # [sequences · kv_heads] int32, zero between launches

    @classmethod
    def empty(
        cls, sequences: int, heads: int, kv_heads: int, head_dim: int, tiling: DecodeTiling, device: torch.device
    ) -> "DecodePlan":
        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        group = triton.next_power_of_2(heads // kv_heads)
        partial = torch.empty(tiling.programs * 2, group, head_dim, dtype=torch.float32, device=device)
        extremes = torch.empty(tiling.programs * 2, group, 2, dtype=torch.float32, device=device)
        return cls(
            tiling, ints(sequences), ints(sequences), ints(sequences + 1), ints(tiling.programs, 4), partial, extremes,
            ints(sequences * kv_heads),
        )  # fmt: skip


@triton.jit
def _plan_kernel(
    lengths, shared, before, pieces, sequences, kv_heads, programs,
    BLOCK_N: tl.constexpr, SEQUENCES: tl.constexpr, AT_ONCE: tl.constexpr, PREFIX: tl.constexpr,
):  # fmt: skip
    sequence = tl.arange(0, SEQUENCES)
    there = sequence < sequences
    own = tl.load(lengths + sequence, mask=there, other=0)
    if PREFIX:
        own -= tl.load(shared + sequence, mask=there, other=0)
    tiles = tl.cdiv(own, BLOCK_N)
    upto = tl.cumsum(tiles, 0)
    total = tl.sum(tiles, 0) * kv_heads
    merged = tl.minimum(tl.cdiv(tl.max(tiles, 0), _MERGED), _SHORT)
    each = tl.maximum(tl.maximum(tl.cdiv(total, programs), merged), 1)
    if tl.program_id(0) == 0:
        tl.store(before, 0)
        tl.store(before + 1 + sequence, upto, mask=there)
    for i in range(AT_ONCE):
        program = tl.program_id(0) * AT_ONCE + i
        start = program * each
        # the sequence whose share of the line holds `start`: as many as end before it
        found = tl.sum((upto * kv_heads <= start).to(tl.int32), 0)
        mine = tl.sum(tl.where(sequence == found, tiles, 0), 0)
        past = start - tl.sum(tl.where(sequence < found, tiles, 0), 0) * kv_heads
        if program < programs:
            count = tl.minimum(tl.maximum(total - start, 0), each)
            tl.store(pieces + program * 4, tl.minimum(found, sequences - 1))
            tl.store(pieces + program * 4 + 1, past // tl.maximum(mine, 1))
            tl.store(pieces + program * 4 + 2, past % tl.maximum(mine, 1))
            tl.store(pieces + program * 4 + 3, count)


def plan_decode(plan: DecodePlan, sequences: int, kv_heads: int, prefixes: PrefixPartials | None = None) -> None:
    """Fill `before` and `pieces` from `lengths[:sequences]`, on the device; what is shared is left out."""
    tiling, at_once = plan.tiling, 16
    shared = plan.lengths if prefixes is None else prefixes.words[prefixes.layout.shared :]
    _plan_kernel[(triton.cdiv(tiling.programs, at_once),)](
        plan.lengths, shared, plan.before, plan.pieces, sequences, kv_heads, tiling.programs,
        BLOCK_N=tiling.block_n, SEQUENCES=triton.next_power_of_2(sequences), AT_ONCE=at_once,
        PREFIX=prefixes is not None, num_warps=8 if sequences > 256 else 4,
    )  # fmt: skip


@triton.jit
def _decode_kernel(
    q, kv, out, lengths, rows, index, before, pieces, partial, extremes, arrived,
    prefix_words, prefix_values, prefix_extremes, shared_at, member_at,
    q_stride, index_stride, kv_heads, scale, programs,
    GROUP: tl.constexpr, GROUP_TILE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, PREFIX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """q [sequences, kv_heads, GROUP, HEAD_DIM] with rows `q_stride` apart; out the same, contiguous."""
    program = tl.program_id(0)
    sequence = tl.load(pieces + program * 4)
    head = tl.load(pieces + program * 4 + 1)
    tile = tl.load(pieces + program * 4 + 2)
    left = tl.load(pieces + program * 4 + 3)
    each = tl.load(pieces + 3)  # the first program's share is the largest
    member = tl.arange(0, GROUP_TILE)
    d = tl.arange(0, HEAD_DIM)
    token = tl.arange(0, BLOCK_N)
    # of the whole step, not of this layer: none of this has to wait, and all of it is on its way at once
    length, row, tiles_before = tl.load(lengths + sequence), tl.load(rows + sequence), tl.load(before + sequence)
    shared = tl.load(prefix_words + shared_at + sequence) if PREFIX else 0
    after_predecessors(PDL)
    while left > 0:
        slots = index + row.to(tl.int64) * index_stride
        tiles = tl.cdiv(length - shared, BLOCK_N)
        count = tl.minimum(left, tiles - tile)
        mine = (head * GROUP + member)[:, None] * HEAD_DIM + d[None, :]
        packed = tl.load(q + sequence.to(tl.int64) * q_stride + mine, mask=member[:, None] < GROUP, other=0.0)
        highest = tl.full([GROUP_TILE], float("-inf"), tl.float32)
        weight = tl.zeros([GROUP_TILE], tl.float32)
        values = tl.zeros([GROUP_TILE, HEAD_DIM], tl.float32)
        if PREFIX:  # noqa: SIM102, known when it is compiled
            if (tile == 0) & (shared > 0):
                highest, weight, values = begin_after_prefix(
                    prefix_words, prefix_values, prefix_extremes, member_at, sequence, head, kv_heads, member, d,
                    GROUP, GROUP_TILE, HEAD_DIM,
                )  # fmt: skip
        for i in tl.range(tile, tile + count, num_stages=STAGES):
            n = shared + i * BLOCK_N + token
            # past the end the last token is read once more: nothing that nobody wrote, and no mask on K and V
            k, v = load_tile(kv, tl.load(slots + tl.minimum(n, length - 1)), head, kv_heads, HEAD_DIM)
            scores = tl.dot(packed, k, input_precision=PRECISION) * scale
            scores = tl.where((n < length)[None, :], scores, float("-inf"))
            highest, weight, values = take_in(scores, v, highest, weight, values, PRECISION)
        if count == tiles:
            result = (values / weight[:, None]).to(out.dtype.element_ty)
            tl.store(out + sequence.to(tl.int64) * kv_heads * GROUP * HEAD_DIM + mine, result,
                     mask=member[:, None] < GROUP)  # fmt: skip
        else:
            start = tiles_before * kv_heads + head * tiles
            first, last = start // each, (start + tiles - 1) // each
            _leave_partial(
                partial, extremes, program * 2 + (program == first).to(tl.int32), highest, weight, values, member, d,
                GROUP, HEAD_DIM,
            )  # fmt: skip
            tl.debug_barrier()  # all threads' partials are written before one of them says so
            before_me = tl.atomic_add(arrived + sequence * kv_heads + head, 1, sem="acq_rel")
            if before_me == last - first:
                tl.debug_barrier()
                _merge_partials(
                    partial, extremes, out + (sequence.to(tl.int64) * kv_heads + head) * GROUP * HEAD_DIM,
                    first, last, GROUP, HEAD_DIM,
                )  # fmt: skip
                tl.store(arrived + sequence * kv_heads + head, 0)
        left -= count
        tile = 0
        head += 1
        if (head == kv_heads) & (left > 0):
            head = 0
            sequence += 1
            length, row, tiles_before = (
                tl.load(lengths + sequence),
                tl.load(rows + sequence),
                tl.load(before + sequence),
            )
            if PREFIX:
                shared = tl.load(prefix_words + shared_at + sequence)
    let_successors_begin(PDL)


@triton.jit
def _leave_partial(
    partial, extremes, place, highest, weight, values, member, d, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    here = place * _power_of_2(GROUP) + member
    tl.store(partial + here[:, None] * HEAD_DIM + d[None, :], values, mask=member[:, None] < GROUP)
    tl.store(extremes + here * 2, highest, mask=member < GROUP)
    tl.store(extremes + here * 2 + 1, weight, mask=member < GROUP)


@triton.constexpr_function
def _power_of_2(n):
    return triton.next_power_of_2(n)


@triton.jit
def _merge_partials(partial, extremes, out, first, last, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Programs first … last did one head: `first` at the end of its piece, the others at the beginning of theirs."""
    MEMBERS: tl.constexpr = _power_of_2(GROUP)
    AT_ONCE: tl.constexpr = max(1, 16 // MEMBERS)
    member = tl.arange(0, MEMBERS)
    d = tl.arange(0, HEAD_DIM)
    highest = tl.full([MEMBERS], float("-inf"), tl.float32)
    weight = tl.zeros([MEMBERS], tl.float32)
    values = tl.zeros([MEMBERS, HEAD_DIM], tl.float32)
    for start in tl.range(first, last + 1, AT_ONCE):
        program = start + tl.arange(0, AT_ONCE)
        place = program * 2 + (program == first).to(tl.int32)
        here = place[:, None] * MEMBERS + member[None, :]  # [AT_ONCE, MEMBERS]
        there = (program <= last)[:, None] & (member < GROUP)[None, :]
        their_highest = tl.load(extremes + here * 2, mask=there, other=float("-inf"), cache_modifier=".cg")
        their_weight = tl.load(extremes + here * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
        values_there = partial + here[:, :, None] * HEAD_DIM + d[None, None, :]
        theirs = tl.load(values_there, mask=there[:, :, None], other=0.0, cache_modifier=".cg")
        higher = tl.maximum(highest, tl.max(their_highest, 0))
        safe = tl.where(member < GROUP, higher, 0.0)
        kept, gain = tl.exp2(highest - safe), tl.exp2(their_highest - safe[None, :])
        weight = weight * kept + tl.sum(their_weight * gain, 0)
        values = values * kept[:, None] + tl.sum(theirs * gain[:, :, None], 0)
        highest = higher
    result = values / tl.where(member < GROUP, weight, 1.0)[:, None]
    mine = member[:, None] * HEAD_DIM + d[None, :]
    tl.store(out + mine, result.to(out.dtype.element_ty), mask=member[:, None] < GROUP)


def decode_attention(
    q: Tensor, kv: Tensor, index: Tensor, plan: DecodePlan, out: Tensor, prefixes: PrefixPartials | None = None
) -> None:
    """softmax(q · Kᵀ / √head_dim) · V of the newest token of each sequence over all its tokens.

    q [sequences, heads, head_dim], rows any distance apart; kv [slots + 1, kv_heads, 2, head_dim]; index
    [rows, positions] int32 → slot; out [sequences, heads, head_dim], contiguous, written for sequences of length > 0.
    `plan` has been filled by `plan_decode` on this stream, with the same `prefixes`, and these by `prefix_attention`.
    """
    heads, head_dim, kv_heads = q.shape[1], q.shape[2], kv.shape[1]
    tiling, group = plan.tiling, heads // kv_heads
    pdl = dependent(q.device)
    words, layout = (plan.lengths, None) if prefixes is None else (prefixes.words, prefixes.layout)
    values, extremes = (plan.partial, plan.extremes) if prefixes is None else (prefixes.values, prefixes.extremes)
    _decode_kernel[(tiling.programs,)](
        q, kv, out, plan.lengths, plan.rows, index, plan.before, plan.pieces, plan.partial, plan.extremes, plan.arrived,
        words, values, extremes, layout.shared if layout else 0, layout.member if layout else 0,
        q.stride(0), index.stride(0), kv_heads, head_dim**-0.5 * LOG2_E, tiling.programs,
        GROUP=group, GROUP_TILE=max(16, triton.next_power_of_2(group)), HEAD_DIM=head_dim, BLOCK_N=tiling.block_n,
        STAGES=tiling.stages, PRECISION="ieee" if q.dtype == torch.float32 else None,
        PREFIX=prefixes is not None, PDL=pdl, num_warps=tiling.warps, launch_pdl=pdl,
        # threads that hold the same sum must agree on its last bit: w·g + (their w·g) is one number, fused two
        enable_fp_fusion=False,
    )  # fmt: skip
