"""The Gluon product for few tokens: without a GPU it compiles for Hopper as it is meant to and is cut without a gap; on
a GPU it equals its definition.

What `test_linear_hopper_played.py` does not play is what ptxas says: `python test_linear_hopper.py add 8` prints it.
"""

import math
import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from tokenllm_kernels.gpu import linear_hopper
from tokenllm_kernels.gpu.linear_hopper import StreamPlan, StreamTiling, stream_linear

WAIT, FETCH = "griddepcontrol.wait", "cp.async.bulk.tensor"


@pytest.mark.parametrize(("kind", "block_m"), [("add", 8), ("gated", 64), ("add late", 64)])
def test_compiles_for_hopper_without_spills_and_fetches_weights_before_it_waits(kind: str, block_m: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = [sys.executable, __file__, kind, str(block_m)]
    told = subprocess.run(child, capture_output=True, text=True, env=environment, check=True).stdout
    assert f"m64n{block_m}k16" in told
    assert "0 bytes spill stores, 0 bytes spill loads" in told
    assert "serialized" not in told, "ptxas waits for each product before it issues the next"
    before, after = told[: told.index(WAIT)], told[told.index(WAIT) :]
    assert before.count(FETCH) == (2 if "gated" in kind else 1), "the weights alone are fetched before the wait"
    assert after.count(FETCH) == 1 + before.count(FETCH) + 1
    assert told.count("launch_dependents") == 1
    assert (told.index("launch_dependents") < told.index(FETCH)) == ("late" not in kind)


def what_ptxas_says(kind: str, block_m: int) -> str:
    """About the kernel with the default tiling in bfloat16, after the PTX lines that matter."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.experimental.gluon.language import NVMMASharedLayout

    tiling, gated, kernel = StreamTiling(), "gated" in kind, linear_hopper._stream_kernel
    layout = NVMMASharedLayout(128, 16, 2)
    types = {
        "w_desc": f"tensordesc<bf16[{tiling.block_n}, {tiling.block_k}],{layout!r}>",
        "x_desc": f"tensordesc<bf16[{block_m}, {tiling.block_k}],{layout!r}>",
        "bias": "*bf16",
        "out": "*bf16",
        "sums": "*fp32",
        "arrived": "*i32",
    }
    plan = StreamPlan.of(block_m, 8192, 4096, gated=gated, tiling=tiling, processors=132)
    constants = {
        "STAGES": plan.stages,
        "GATED": gated,
        "BIAS": not gated,
        "ADD": "add" in kind,
        "EARLY": "late" not in kind,
    }
    signature = {name: types.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in types if "desc" not in name}
    source = GluonASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": 4, "launch_pdl": True}
    ptx: str = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    command = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", "-", "-o", os.devnull]
    said = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True).stderr
    matters = ("wgmma.mma", "griddepcontrol", FETCH)
    return "\n".join([line for line in ptx.splitlines() if any(word in line for word in matters)] + [said])


@given(blocks=st.integers(1, 300), k_tiles=st.integers(1, 120), processors=st.integers(1, 140))
def test_pieces_cover_all_tiles_and_sums_have_places_of_their_own(blocks: int, k_tiles: int, processors: int) -> None:
    tiling = StreamTiling()
    plan = StreamPlan.of(
        1, blocks * tiling.block_n, k_tiles * tiling.block_k, gated=False, tiling=tiling, processors=processors
    )
    first_tile, holder, slot = (getattr(linear_hopper, name).fn for name in ("_first_tile", "_holder", "_slot"))
    starts = [first_tile(program, plan.ctas, plan.tiles) for program in range(plan.ctas + 1)]
    pieces = [end - start for start, end in pairwise(starts)]
    assert starts[0] == 0 and starts[-1] == plan.tiles == blocks * k_tiles
    assert min(pieces) >= 1 and max(pieces) - min(pieces) <= 1
    places, counters = [], []
    for block in range(blocks):
        tiles = range(block * k_tiles, (block + 1) * k_tiles)
        first, last = holder(tiles[0], plan.ctas, plan.tiles), holder(tiles[-1], plan.ctas, plan.tiles)
        assert starts[first] <= tiles[0] < starts[first + 1] and starts[last] <= tiles[-1] < starts[last + 1]
        if first < last:
            places += [slot(program, first) for program in range(first, last + 1)]
            counters.append(first)
    assert len(set(places)) == len(places) and all(0 <= place < 2 * plan.ctas for place in places)
    assert len(set(counters)) == len(counters)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.zeros(65, 64), torch.zeros(8, 64)),
        (torch.zeros(1, 60), torch.zeros(8, 60)),
        (torch.zeros(1, 64), torch.zeros(7, 64)),
        (torch.zeros(1, 64), torch.zeros(8, 128)),
        (torch.zeros(1, 64).half(), torch.zeros(8, 64)),
        (torch.zeros(64, 2).t(), torch.zeros(8, 64)),
    ],
)
def test_refuses_what_it_cannot_stream(x: Tensor, weight: Tensor) -> None:
    x = x if x.dtype == torch.half else x.bfloat16()
    with pytest.raises(ValueError, match=r"streamed|contiguous"):
        stream_linear(x, weight.bfloat16(), gated=True)


def truth(x: Tensor, weight: Tensor, bias: Tensor | None, add_to: Tensor | None, gated: bool) -> Tensor:
    """In float64, gate and up rounded as if they had been stored."""
    out = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    if gated:
        gate, up = out.to(x.dtype).double().chunk(2, dim=1)
        return functional.silu(gate) * up
    return out if add_to is None else out + add_to.double()


TILINGS = [  # a ring of one byte still has two stages
    StreamTiling(),
    StreamTiling(ring_bytes=1, early=False),
    StreamTiling(block_k=64, ctas=3),
    StreamTiling(block_n=128, ctas=50),
    StreamTiling(block_k=256, ring_bytes=96 * 1024, ctas=1, early=False),
]


@pytest.mark.hopper
@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 64),
    features=st.integers(1, 1000) | st.sampled_from([64, 1024]),
    depth=st.integers(1, 300).map(lambda eighth: 8 * eighth) | st.sampled_from([1024, 4096]),
    kind=st.sampled_from(["", "bias", "gated", "add", "bias add"]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    tiling=st.sampled_from(TILINGS),
    seed=st.integers(0, 2**31),
)
def test_equals_its_definition_however_it_is_cut_and_again_right_after(
    tokens: int, features: int, depth: int, kind: str, dtype: torch.dtype, tiling: StreamTiling, seed: int
) -> None:
    torch.manual_seed(seed)
    gated, rows = kind == "gated", features * 2 if kind == "gated" else features
    x = (torch.randn(tokens, depth, device="cuda") / math.sqrt(depth)).to(dtype)
    weight = torch.randn(rows, depth, device="cuda").to(dtype)
    bias = torch.randn(rows, device="cuda").to(dtype) if "bias" in kind else None
    for _ in range(3):  # each finds the counters as the one before left them
        held = torch.randn(tokens, features, device="cuda").to(dtype)
        expected = truth(x, weight, bias, held if "add" in kind else None, gated)
        target = held if "add" in kind else torch.full_like(held, math.nan)
        place = {"add_to" if "add" in kind else "out": target}
        assert stream_linear(x, weight, bias=bias, gated=gated, tiling=tiling, **place) is target
        error = (target.double() - expected).norm() / expected.norm()
        assert error <= {torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]


if __name__ == "__main__":
    print(what_ptxas_says(sys.argv[1], int(sys.argv[2])))
