"""Matrix products with few tokens for Hopper in Gluon: every multiprocessor streams an equal piece of the weight.

    tiles    │ 0  1  2  3 │ 4  5  6  7 │ 8  9 10 11 │      all k tiles of row block 0, then of row block 1, …
    CTAs     └──── 0 ────┘└──── 1 ────┘└──── 2 ────┘       cut without regard to blocks (stream-K, Osama et al., 2023)

A CTA fills a ring of shared memory with its first tiles by TMA before it waits for the kernels before it, since nobody
writes weights; so memory is busy while attention and norms run. The inputs follow, and from then on each tile that the
tensor cores are done with makes room for the next. Where CTAs share a row block, partial sums go through memory and the
last to arrive adds them in the order of their tiles.

The weight is the left operand, so its rows fill the large side of the instruction and the tokens the small one. Gluon
is used here and in `prefill_hopper.py` alone; `is_available` tells whether the installed Triton and the device can run
it.

`linear.py` says for which products this is the quickest way. Nothing of the kernels before it is touched before
`gdc_wait`, the workspace included, and every CTA says it, so products of all kinds may follow each other (`launch.py`).
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeAlias

import torch
import triton
from torch import Tensor

from tokenllm_kernels.gpu.device import is_hopper, multiprocessors

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
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name until Triton 3.6
    HAS_GLUON = True
except ImportError:
    HAS_GLUON = False

MOST_TOKENS = 64
MOST_BLOCK_N = 128
ALIGNED = 8  # numbers of two bytes: TMA wants rows that are a multiple of 16 bytes

Cut: TypeAlias = Literal["anywhere", "between blocks", "evenly"]


@dataclass(frozen=True)
class StreamTiling:
    """How a product is cut; part of its compilation, not of its meaning.

    Cut anywhere, all multiprocessors have equal pieces. Cut between blocks, as many as can have equal numbers of whole
    row blocks: some have none, but few or no sums are shared. Evenly is the same, but where there are several times as
    many multiprocessors as blocks, as many as there can be share each.
    """

    block_n: int = 64  # rows of the weight in a tile: 64 or 128; a gated tile has as many of gate and of up
    block_k: int = 128  # its columns: 64, 128 or 256
    ring_kb: int = 160  # at most, of 227 that a multiprocessor has
    cut: Cut = "anywhere"
    early: bool = True  # successors may begin at once, or else when the last weights are on their way

    def ctas(self, blocks: int, k_tiles: int, processors: int) -> int:
        """At most one per multiprocessor, each with a tile at least."""
        match self.cut:
            case "anywhere":
                return min(processors, blocks * k_tiles)
            case "evenly" if blocks < processors:
                return blocks * min(processors // blocks, k_tiles)
            case _:
                return triton.cdiv(blocks, triton.cdiv(blocks, processors))


@dataclass(frozen=True)
class StreamWorkspace:
    """Where CTAs that share rows leave their sums. One per stream of work: products follow each other."""

    sums: Tensor  # float32: each CTA shares at most the row block it begins in and the one it ends in
    arrived: Tensor  # [CTAs] int32, zero between launches: a shared row block's counter is that of its first CTA

    @staticmethod
    @cache
    def of(device: torch.device) -> "StreamWorkspace":
        ctas = multiprocessors(device)
        return StreamWorkspace(
            torch.empty(ctas * 2 * 2 * MOST_BLOCK_N * MOST_TOKENS, dtype=torch.float32, device=device),
            torch.zeros(ctas, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True)
class StreamPlan:
    """A product's tiles, and how they lie in shared memory and over the CTAs."""

    block_m: int
    stages: int
    k_tiles: int
    tiles: int
    ctas: int

    @staticmethod
    def of(
        tokens: int, features: int, depth: int, *, gated: bool, tiling: StreamTiling, processors: int
    ) -> "StreamPlan":
        block_m = max(8, triton.next_power_of_2(tokens))
        k_tiles = triton.cdiv(depth, tiling.block_k)
        blocks = triton.cdiv(features, tiling.block_n)
        tiles, ctas = blocks * k_tiles, tiling.ctas(blocks, k_tiles, processors)
        stage_bytes = ((1 + gated) * tiling.block_n + block_m) * tiling.block_k * 2
        # a stage is filled again while the next one is in use: there are two at least
        stages = max(2, min(tiling.ring_kb * 1024 // stage_bytes, triton.cdiv(tiles, ctas)))
        return StreamPlan(block_m, stages, k_tiles, tiles, ctas)


def is_available(device: torch.device) -> bool:
    return HAS_GLUON and is_hopper(device)


def fits(tokens: int, features: int, depth: int, gated: bool) -> bool:
    """Whether a weight of `features` rows (gate and up together) and `depth` columns can be streamed."""
    return 1 <= tokens <= MOST_TOKENS and depth % ALIGNED == 0 and not (gated and features % 2)


def stream_linear(
    x: Tensor,
    weight: Tensor,
    tiling: StreamTiling,
    *,
    bias: Tensor | None = None,
    gated: bool = False,
    out: Tensor | None = None,
    add_to: Tensor | None = None,
) -> Tensor:
    """x [tokens, in] · weight [out, in]ᵀ (+ bias) → [tokens, out], for at most `MOST_TOKENS` tokens.

    `gated`: the weight is gate over up, and the result silu(gate) · up [tokens, out / 2]. `out`: where it goes;
    `add_to`: what it is added to, in place. All contiguous, of one 16-bit type; `in` is a multiple of 8.
    """
    (tokens, depth), rows = x.shape, weight.shape[0]
    _check(x, weight, bias, add_to, gated)
    features = rows // 2 if gated else rows
    target = next((t for t in (add_to, out) if t is not None), None)
    result = x.new_empty(tokens, features) if target is None else target
    processors = multiprocessors(x.device)
    plan = StreamPlan.of(tokens, features, depth, gated=gated, tiling=tiling, processors=processors)
    workspace = StreamWorkspace.of(x.device)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    _stream_kernel[(plan.ctas,)](
        TensorDescriptor(weight, [rows, depth], [depth, 1], [tiling.block_n, tiling.block_k], layout),
        TensorDescriptor(x, [tokens, depth], [depth, 1], [plan.block_m, tiling.block_k], layout),
        result if bias is None else bias, result, workspace.sums, workspace.arrived,
        tokens, features, plan.k_tiles, plan.tiles,
        STAGES=plan.stages, GATED=gated, BIAS=bias is not None, ADD=add_to is not None, EARLY=tiling.early,
        num_warps=4, launch_pdl=True,
    )  # fmt: skip
    return result


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, add_to: Tensor | None, gated: bool) -> None:
    (tokens, depth), rows = x.shape, weight.shape[0]
    if not fits(tokens, rows, depth, gated) or weight.shape[1] != depth:
        raise ValueError(
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, gated={gated}: 1 to {MOST_TOKENS} tokens, a depth that "
            f"is a multiple of {ALIGNED}, and an even number of rows where gated, can be streamed"
        )
    if x.itemsize != 2 or x.dtype != weight.dtype or not (x.is_contiguous() and weight.is_contiguous()):
        raise ValueError(f"x {x.dtype} and weight {weight.dtype}: must be contiguous and of one 16-bit type")
    assert not gated or (bias is None and add_to is None), "no model adds to a gated product"


if HAS_GLUON:

    @gluon.jit
    def _first_tile(program, programs, tiles):
        """Of this CTA's piece, which ends where the next one's begins."""
        return program * tiles // programs

    @gluon.jit
    def _holder(tile, programs, tiles):
        """The CTA whose piece holds this tile."""
        return ((tile + 1) * programs - 1) // tiles

    @gluon.jit
    def _slot(program, first_program):
        """Where a CTA leaves its sums of a row block: it is the first one of a shared block at most once, where its
        piece ends, and a later one at most once, where its piece begins.
        """
        return 2 * program + (program == first_program)

    @gluon.jit
    def _expect(ready, step, wanted, parts: gl.constexpr, w_desc, x_desc):
        mbarrier.expect(
            ready.index(step % ready.shape[0]), parts * w_desc.block_type.nbytes + x_desc.block_type.nbytes, wanted
        )

    @gluon.jit
    def _fetch_weights(w_desc, gate_ring, up_ring, ready, first, step, k_tiles, features, wanted, gated: gl.constexpr):
        """Those of this CTA's tile number `step`, if wanted."""
        stage = step % ready.shape[0]
        row = (first + step) // k_tiles * w_desc.block_type.shape[0]
        column = (first + step) % k_tiles * w_desc.block_type.shape[1]
        tma.async_copy_global_to_shared(w_desc, [row, column], ready.index(stage), gate_ring.index(stage), wanted)
        if gated:
            up = features + row
            tma.async_copy_global_to_shared(w_desc, [up, column], ready.index(stage), up_ring.index(stage), wanted)

    @gluon.jit
    def _fetch_inputs(x_desc, x_ring, ready, first, step, k_tiles, wanted):
        stage = step % ready.shape[0]
        column = (first + step) % k_tiles * x_desc.block_type.shape[1]
        tma.async_copy_global_to_shared(x_desc, [0, column], ready.index(stage), x_ring.index(stage), wanted)

    @gluon.jit
    def _begin_sums(bias, target, n, inside, features, first_here, BIAS: gl.constexpr, ADD: gl.constexpr):
        """What the first tile of a row block is added to, and nothing for the CTAs that begin later in it."""
        acc = gl.zeros_like(inside, dtype=gl.float32)
        if BIAS:
            acc += gl.load(bias + n, mask=(n < features) & first_here, other=0.0).to(gl.float32)[:, None]
        if ADD:
            acc += gl.load(target, mask=inside & first_here, other=0.0).to(gl.float32)
        return acc

    @gluon.jit
    def _multiply(gate_ring, up_ring, x_ring, ready, step, acc, up, GATED: gl.constexpr):
        """Begin to add the products of this tile, once it is there; those of the one before have ended."""
        stages: gl.constexpr = ready.shape[0]
        stage = step % stages
        mbarrier.wait(ready.index(stage), (step // stages) & 1)
        inputs = x_ring.index(stage).permute((1, 0))
        acc = warpgroup_mma(gate_ring.index(stage), inputs, acc, is_async=True)
        if GATED:
            up = warpgroup_mma(up_ring.index(stage), inputs, up, is_async=True)
        return warpgroup_mma_wait(num_outstanding=2 if GATED else 1, deps=(acc, up))

    @gluon.jit
    def _add_up(sums, arrived, acc, up, place, program, first_program, last_program, GATED: gl.constexpr):
        """Leave this CTA's sums; whoever comes last returns the sums of all, in the order of their tiles."""
        parts: gl.constexpr = 2 if GATED else 1
        size: gl.constexpr = acc.shape[0] * acc.shape[1]
        at_once: gl.constexpr = min(4, max(1, 8192 // (size * parts)))  # sums in registers
        here = sums + _slot(program, first_program) * (parts * size) + place
        gl.store(here, acc)
        if GATED:
            gl.store(here + size, up)
        barrier()  # all threads' sums are written before one of them says so
        last = gl.atomic_add(arrived + first_program, 1, sem="acq_rel") == last_program - first_program
        if last:
            barrier()
            acc, up = gl.zeros_like(acc), gl.zeros_like(up)
            for group in range(first_program, last_program + 1, at_once):
                for i in gl.static_range(at_once):  # on their way together
                    each = group + i
                    there = sums + _slot(each, first_program) * (parts * size) + place
                    wanted = (place >= 0) & (each <= last_program)
                    acc += gl.load(there, mask=wanted, other=0.0, cache_modifier=".cg")
                    if GATED:
                        up += gl.load(there + size, mask=wanted, other=0.0, cache_modifier=".cg")
            gl.store(arrived + first_program, 0)
        return acc, up, last

    @gluon.jit(do_not_specialize=["tokens", "features", "k_tiles", "tiles"])
    def _stream_kernel(
        w_desc, x_desc, bias, out, sums, arrived, tokens, features, k_tiles, tiles,
        STAGES: gl.constexpr, GATED: gl.constexpr, BIAS: gl.constexpr, ADD: gl.constexpr, EARLY: gl.constexpr,
    ):  # fmt: skip
        dtype: gl.constexpr = w_desc.dtype
        block_n: gl.constexpr = w_desc.block_type.shape[0]
        block_k: gl.constexpr = w_desc.block_type.shape[1]
        block_m: gl.constexpr = x_desc.block_type.shape[0]
        parts: gl.constexpr = 2 if GATED else 1
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, block_m, 16])
        if EARLY:
            gdc_launch_dependents()
        program, programs = gl.program_id(0), gl.num_programs(0)
        first = _first_tile(program, programs, tiles)
        mine = _first_tile(program + 1, programs, tiles) - first  # at least one: there are no more CTAs than tiles

        gate_ring = gl.allocate_shared_memory(dtype, [STAGES, block_n, block_k], w_desc.layout)
        up_ring = gl.allocate_shared_memory(dtype, [STAGES, block_n, block_k], w_desc.layout) if GATED else gate_ring
        x_ring = gl.allocate_shared_memory(dtype, [STAGES, block_m, block_k], x_desc.layout)
        ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for each in gl.static_range(STAGES):
            mbarrier.init(ready.index(each), count=1)
        fence_async_shared()
        barrier()
        for step in range(gl.minimum(STAGES, mine)):
            _expect(ready, step, True, parts, w_desc, x_desc)
            _fetch_weights(w_desc, gate_ring, up_ring, ready, first, step, k_tiles, features, True, GATED)
        gdc_wait()  # here and not before: from now on what others write may be touched
        for step in range(gl.minimum(STAGES, mine)):
            _fetch_inputs(x_desc, x_ring, ready, first, step, k_tiles, True)

        for block in range(first // k_tiles, gl.cdiv(first + mine, k_tiles)):
            n = block * block_n + gl.arange(0, block_n, gl.SliceLayout(1, layout))
            m = gl.arange(0, block_m, gl.SliceLayout(0, layout))
            inside = (n < features)[:, None] & (m < tokens)[None, :]
            target = out + m[None, :].to(gl.int64) * features + n[:, None]
            begin = gl.maximum(block * k_tiles, first) - first
            end = gl.minimum((block + 1) * k_tiles - first, mine)
            acc = _begin_sums(bias, target, n, inside, features, first <= block * k_tiles, BIAS, ADD)
            up = gl.zeros([block_n, block_m], gl.float32, layout)
            refilling = gl.maximum(begin, gl.minimum(end, mine - STAGES + 1))
            for step in range(begin, refilling):
                acc, up = _multiply(gate_ring, up_ring, x_ring, ready, step, acc, up, GATED)
                barrier()  # the step before is done with in all warps: its stage takes the next tile
                following = step - 1 + STAGES
                wanted = step > 0
                _expect(ready, following, wanted, parts, w_desc, x_desc)
                _fetch_weights(w_desc, gate_ring, up_ring, ready, first, following, k_tiles, features, wanted, GATED)
                _fetch_inputs(x_desc, x_ring, ready, first, following, k_tiles, wanted)
            if not EARLY and refilling < end:  # the last weights are on their way
                gdc_launch_dependents()
            for step in range(refilling, end):
                acc, up = _multiply(gate_ring, up_ring, x_ring, ready, step, acc, up, GATED)
            acc, up = warpgroup_mma_wait(num_outstanding=0, deps=(acc, up))

            first_program = _holder(block * k_tiles, programs, tiles)
            last_program = _holder((block + 1) * k_tiles - 1, programs, tiles)
            last = first_program == last_program
            if first_program < last_program:
                place = gl.arange(0, block_n, gl.SliceLayout(1, layout))[:, None] * block_m + m[None, :]
                acc, up, last = _add_up(sums, arrived, acc, up, place, program, first_program, last_program, GATED)
            if last:
                if GATED:  # rounded as if gate and up had been stored
                    gate = acc.to(dtype).to(gl.float32)
                    acc = gate / (1.0 + gl.exp(-gate)) * up.to(dtype).to(gl.float32)
                gl.store(target, acc.to(dtype), mask=inside)
