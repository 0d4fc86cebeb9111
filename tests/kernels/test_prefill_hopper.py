"""The Gluon prefill attention: without a GPU it compiles for Hopper as it is meant to; on one it equals its definition.

Gluon has no interpreter, so what a CPU can tell is what ptxas says; `python test_prefill_hopper.py 128 bf16` prints it.
"""

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenllm_kernels.gpu import prefill_hopper
from tokenllm_kernels.gpu.prefill_hopper import BLOCK_M, HopperTiling, PrefillChunks, most_tiles


@pytest.mark.parametrize(("head_dim", "dtype"), [(128, "bf16"), (64, "fp16")])
def test_compiles_for_hopper_without_spills_and_with_products_in_flight(head_dim: int, dtype: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = [sys.executable, __file__, str(head_dim), dtype]
    told = subprocess.run(child, capture_output=True, text=True, env=environment, check=True).stdout
    assert "wgmma.mma_async" in told and "setmaxnreg.inc.sync.aligned.u32 \t240" in told
    assert "0 bytes spill stores, 0 bytes spill loads" in told
    assert "serialized" not in told, "ptxas waits for each product before it issues the next"


def what_ptxas_says(head_dim: int, dtype: str) -> str:
    """About the kernel with the default tiling, after the PTX lines that matter."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.experimental.gluon.language import NVMMASharedLayout

    tiling = HopperTiling()
    kernel = prefill_hopper._prefill_kernel
    layout = NVMMASharedLayout(128, 16, 2)
    types = {
        "q_desc": f"tensordesc<{dtype}[64, {head_dim}],{layout!r}>",
        "kv_desc": f"tensordesc<{dtype}[{tiling.block_n}, {head_dim}],{layout!r}>",
        "out": f"*{dtype}",
        "out_stride": "i32",
        "scale": "fp32",
        "group": "i32",
    }
    constants = {
        "chunks": 64,
        "padded_chunks": 64,
        "stages": tiling.stages,
        "consumer_registers": tiling.consumer_registers,
        "ping_pong": tiling.ping_pong,
    }
    signature = {name: types.get(name, "constexpr" if name in constants else "*i32") for name in kernel.arg_names}
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in ("out", "out_stride")}
    source = GluonASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": 4, "maxnreg": prefill_hopper.LAUNCH_REGISTERS}
    ptx: str = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    command = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", "-", "-o", os.devnull]
    said = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True).stderr
    return "\n".join([line for line in ptx.splitlines() if "wgmma.mma" in line or "setmaxnreg" in line] + [said])


def truth(q: Tensor, kv: Tensor) -> Tensor:
    """In float64: q [count, heads, dim] at the end of the context kv [end, kv_heads, 2, dim]."""
    (count, heads, dim), (end, kv_heads, _, _) = q.shape, kv.shape
    k, v = kv.double().repeat_interleave(heads // kv_heads, dim=1).unbind(2)
    scores = torch.einsum("chd,ehd->hce", q.double(), k) / math.sqrt(dim)
    hidden = torch.ones(count, end, dtype=torch.bool, device=q.device).tril(end - count).logical_not()
    return torch.einsum("hce,ehd->chd", scores.masked_fill(hidden, -math.inf).softmax(-1), v)


SMALL = os.environ.get("KERNEL_SIZES") == "small"
lengths = st.integers(0, 300 if SMALL else 700) | st.sampled_from([1, 63, 64, 65, 127, 128, 129, 256, 1024])


@pytest.mark.hopper
@settings(max_examples=5 if SMALL else 40, deadline=None)
@given(
    chunks=st.lists(st.tuples(lengths, lengths), min_size=1, max_size=5),
    head_dim=st.sampled_from([64, 128]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    group=st.sampled_from([1, 4]),
    seed=st.integers(0, 2**31),
)
def test_equals_its_definition_and_writes_no_other_row(
    chunks: list[tuple[int, int]], head_dim: int, dtype: torch.dtype, group: int, seed: int
) -> None:
    torch.manual_seed(seed)
    device, gap, kv_heads = torch.device("cuda"), 3, 2
    counts = torch.tensor([count for count, _ in chunks])
    ends = torch.tensor([count + prefix for count, prefix in chunks])
    q_upto, context_upto = (counts + gap).cumsum(0), (ends + gap).cumsum(0)
    tile_starts = torch.nn.functional.pad((-(-counts // BLOCK_M)).cumsum(0), (1, 0))
    columns = (tile_starts, q_upto - counts - gap, counts, ends, context_upto - ends - gap)
    table = PrefillChunks(*(column.int().to(device) for column in columns))
    tokens, heads = int(q_upto[-1]), kv_heads * group
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim, device=device).to(dtype)
    q = qkv[:, :heads]
    workspace = (100 * torch.randn(int(context_upto[-1]), kv_heads, 2, head_dim, device=device)).to(dtype)
    expected = torch.full((tokens, heads, head_dim), math.nan, dtype=torch.float64, device=device)
    for q_start, count, end, start in zip(*(column.tolist() for column in columns[1:]), strict=True):
        workspace[start : start + end] /= 100
        expected[q_start : q_start + count] = truth(q[q_start : q_start + count], workspace[start : start + end])
    out = torch.full((tokens, heads, head_dim), math.nan, dtype=dtype, device=device)
    prefill_hopper.prefill_attention_hopper(
        q, workspace, table, most_tiles(int(counts.sum()), len(chunks)), out, HopperTiling()
    )
    written = ~expected.isnan()
    assert torch.equal(~out.isnan(), written)
    error = (out.double() - expected)[written].norm() / expected[written].norm().clamp_min(1e-9)
    assert error <= {torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]


if __name__ == "__main__":
    print(what_ptxas_says(int(sys.argv[1]), sys.argv[2]))
