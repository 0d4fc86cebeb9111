"""Matrix products with few tokens: the weight is read once, at the speed of memory.

At decode a product is a stream of weights, and cuBLAS leaves 10 to 40 % of the bandwidth of the smaller shapes unused.
Here a program owns BLOCK_N rows of the weight and, when there are too few rows to fill the GPU, a share of their
columns (split-K): partial sums go through memory and the last program to arrive adds them up in a fixed order. The
weight is the left operand of the tensor core product, so its rows fill the large side of the instruction and the tokens
the small one.

There are three ways to compute a product: this one, `linear_hopper.py` where Triton has Gluon, and cuBLAS. Which is the
quickest, and with which tiles, was measured per shape and number of tokens among the kernels that come before and after
it in a layer (`load_tests/gpu/tune_linear.py` writes `linear_h100.json`). What is not in the table goes to cuBLAS.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from tokenllm_kernels.gpu.device import is_hopper
from tokenllm_kernels.gpu.launch import after_predecessors, dependent, let_successors_begin
from tokenllm_kernels.gpu.layers import silu_mul
from tokenllm_kernels.gpu.linear_hopper import StreamTiling, is_available, stream_linear
from tokenllm_kernels.reference import Linear

MOST_TOKENS = 128  # beyond, the product is no longer bound by the weight alone, and cuBLAS is at home
LEAST_BUCKET = 8
SPLIT_WORKSPACE = 1 << 23  # float32 numbers
TABLE = Path(__file__).parent / "linear_h100.json"


@dataclass(frozen=True)
class Tiles:
    """How a product is cut."""

    block_n: int
    block_k: int
    splits: int
    warps: int
    stages: int


Choice: TypeAlias = Tiles | StreamTiling | None  # None is cuBLAS


@dataclass(frozen=True)
class SplitWorkspace:
    """Where programs that share rows leave their sums. One per stream of work: products follow each other."""

    sums: Tensor  # [SPLIT_WORKSPACE] float32
    arrived: Tensor  # [row blocks] int32, zero between launches

    @staticmethod
    @cache
    def of(device: torch.device) -> "SplitWorkspace":
        return SplitWorkspace(
            torch.empty(SPLIT_WORKSPACE, dtype=torch.float32, device=device),
            torch.zeros(1 << 14, dtype=torch.int32, device=device),
        )


@triton.jit(do_not_specialize=["tokens"])  # all numbers of a bucket are served by what was compiled for one
def _few_tokens_kernel(
    x, weight, bias, out, sums, arrived, tokens, features, depth, share, splits,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out [tokens, features] = x [tokens, depth] · weight [features, depth]ᵀ; GATED: weight
    [2 · features, depth], out = silu(gate) · up; ADD: added to what `out` holds.
    """
    block, split = tl.program_id(0), tl.program_id(1)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    row = tl.minimum(n, features - 1).to(tl.int64) * depth
    column = tl.minimum(m, tokens - 1) * depth
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    target = out + m[None, :].to(tl.int64) * features + n[:, None]
    inside = (m < tokens)[None, :] & (n < features)[:, None]
    after_predecessors(PDL)
    if ADD and not SPLIT and not GATED:  # on its way while the weights are
        acc = tl.load(target, mask=inside, other=0.0).to(tl.float32)
    for start in tl.range(split * share, tl.minimum((split + 1) * share, depth), BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        inputs = tl.load(x + column[None, :] + k[:, None])
        acc = tl.dot(tl.load(weight + row[:, None] + k[None, :]), inputs, acc, input_precision=PRECISION)
        if GATED:
            second = tl.load(weight + features.to(tl.int64) * depth + row[:, None] + k[None, :])
            up = tl.dot(second, inputs, up, input_precision=PRECISION)
    let_successors_begin(PDL)
    if SPLIT:
        acc, up, last = _add_up(sums, arrived, acc, up, block, split, splits, GATED, BLOCK_N, BLOCK_M)
    else:
        last = True
    if last:
        if BIAS:
            acc += tl.load(bias + tl.minimum(n, features - 1)).to(tl.float32)[:, None]
        if GATED:
            narrow = out.dtype.element_ty  # rounded as if gate and up had been stored
            gate = acc.to(narrow).to(tl.float32)
            acc = gate / (1.0 + tl.exp(-gate)) * up.to(narrow).to(tl.float32)
        if ADD and (SPLIT or GATED):
            acc += tl.load(target, mask=inside, other=0.0).to(tl.float32)
        tl.store(target, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_up(
    sums, arrived, acc, up, block, split, splits,
    GATED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Leave this split's sums; whoever comes last returns the sums of all, in the order of the splits."""
    PARTS: tl.constexpr = 2 if GATED else 1
    SIZE: tl.constexpr = BLOCK_N * BLOCK_M
    inner = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    here = sums + block * splits * (PARTS * SIZE) + inner
    tl.store(here + split * PARTS * SIZE, acc)
    if GATED:
        tl.store(here + (split * PARTS + 1) * SIZE, up)
    tl.debug_barrier()  # all threads' sums are written before one of them says so
    last = tl.atomic_add(arrived + block, 1, sem="acq_rel") == splits - 1
    if last:
        tl.debug_barrier()
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for i in tl.range(0, splits):
            acc += tl.load(here + i * PARTS * SIZE, cache_modifier=".cg")
            if GATED:
                up += tl.load(here + (i * PARTS + 1) * SIZE, cache_modifier=".cg")
        tl.store(arrived + block, 0)
    return acc, up, last


def few_tokens(
    x: Tensor,
    weight: Tensor,
    tiles: Tiles,
    *,
    bias: Tensor | None = None,
    gated: bool = False,
    out: Tensor | None = None,
    add_to: Tensor | None = None,
) -> Tensor:
    """x [tokens, in] · weight [out, in]ᵀ (+ bias) → [tokens, out], for at most `MOST_TOKENS` tokens.

    `gated`: the weight is gate over up, and the result silu(gate) · up [tokens, out / 2]. `out`: where it goes;
    `add_to`: what it is added to, in place. `in` is a multiple of `tiles.block_k`.
    """
    (tokens, depth), rows = x.shape, weight.shape[0]
    features = rows // 2 if gated else rows
    target = next((t for t in (add_to, out) if t is not None), None)
    result = x.new_empty(tokens, features) if target is None else target
    share = triton.cdiv(depth, tiles.splits * tiles.block_k) * tiles.block_k
    blocks, block_m = triton.cdiv(features, tiles.block_n), max(16, triton.next_power_of_2(tokens))
    shared = blocks * tiles.splits * tiles.block_n * block_m * (1 + gated)
    assert tiles.splits == 1 or shared <= SPLIT_WORKSPACE, "the sums of all splits have room"
    workspace, pdl = SplitWorkspace.of(x.device), dependent(x.device)
    _few_tokens_kernel[(blocks, tiles.splits)](
        x, weight, x if bias is None else bias, result, workspace.sums, workspace.arrived,
        tokens, features, depth, share, tiles.splits,
        BLOCK_M=block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, SPLIT=tiles.splits > 1,
        GATED=gated, BIAS=bias is not None, ADD=add_to is not None, STAGES=tiles.stages,
        PRECISION="ieee" if x.dtype == torch.float32 else None, PDL=pdl,
        num_warps=tiles.warps, launch_pdl=pdl,
    )  # fmt: skip
    return result


@cache
def _measured() -> dict[str, dict[str, list[Any]]]:
    return read_table(TABLE)


def read_table(path: Path) -> dict[str, dict[str, list[Any]]]:
    """Per shape and bucket the fields of a `StreamTiling` under "stream", or of `Tiles` under "few"; where both are
    there, the latter is for a Triton without Gluon.
    """
    return json.loads(path.read_text(encoding="utf-8"))["choices"]


def key_of(rows: int, depth: int, bucket: int, *, gated: bool) -> str:
    return f"{'gated ' if gated else ''}{rows}x{depth} m{bucket}"


def bucket_of(tokens: int) -> int:
    """The numbers of tokens that make no difference are powers of two and what lies below them."""
    return max(LEAST_BUCKET, triton.next_power_of_2(tokens))


@cache
def choice_for(tokens: int, rows: int, depth: int, *, gated: bool, device: torch.device) -> Choice:
    """The quickest way that was measured for a weight [rows, depth]."""
    if tokens > MOST_TOKENS or not is_hopper(device):
        return None
    found = _measured().get(key_of(rows, depth, bucket_of(tokens), gated=gated), {})
    if "stream" in found and is_available(device):
        return StreamTiling(*found["stream"])
    return Tiles(*found["few"]) if "few" in found else None


def product(
    x: Tensor,
    weight: Tensor,
    choice: Choice,
    *,
    bias: Tensor | None = None,
    gated: bool = False,
    out: Tensor | None = None,
    add_to: Tensor | None = None,
) -> Tensor:
    """As `few_tokens`, in the way that was chosen."""
    match choice:
        case Tiles():
            return few_tokens(x, weight, choice, bias=bias, gated=gated, out=out, add_to=add_to)
        case StreamTiling():
            return stream_linear(x, weight, choice, bias=bias, gated=gated, out=out, add_to=add_to)
    if gated:
        return silu_mul(functional.linear(x, weight))
    if add_to is not None:
        return add_to.addmm_(x, weight.t())
    if out is None:
        return functional.linear(x, weight, bias)
    torch.mm(x, weight.t(), out=out)
    return out if bias is None else out.add_(bias)


def linear(x: Tensor, w: Linear, out: Tensor | None = None) -> Tensor:
    """x [tokens, in] @ weight.T + bias → [tokens, out], into `out` where one is given."""
    return product(x, w.weight, _choice(x, w, gated=False), bias=w.bias, out=out)


def linear_silu_mul(x: Tensor, w: Linear) -> Tensor:
    """silu(gate) · up of (gate ‖ up) = x @ weight.T: [tokens, in] → [tokens, out / 2]."""
    return product(x, w.weight, _choice(x, w, gated=True), gated=True)


def linear_add(x: Tensor, w: Linear, residual: Tensor) -> Tensor:
    """residual + x @ weight.T, written over `residual`."""
    return product(x, w.weight, _choice(x, w, gated=False), add_to=residual)


def _choice(x: Tensor, w: Linear, *, gated: bool) -> Choice:
    rows, depth = w.weight.shape
    return choice_for(x.shape[0], rows, depth, gated=gated, device=x.device) if x.itemsize == 2 else None
