"""Check and time the Gluon prefill attention on a Hopper GPU, each way of cutting it in a process of its own.

    PYTHONPATH=kernels python3 load_tests/gpu/check_prefill_hopper.py                     # all of VARIANTS
    PYTHONPATH=kernels python3 load_tests/gpu/check_prefill_hopper.py --variant 128,2,240,1

A variant is block_n,stages,consumer_registers,ping_pong. A process gets 60 seconds: a deadlock costs no more.
"""

import argparse
import math
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from tokenllm_kernels.gpu.prefill_hopper import (
    BLOCK_M,
    HopperTiling,
    PrefillChunks,
    is_available,
    most_tiles,
    prefill_attention_hopper,
)

VARIANTS = ["128,2,240,1", "128,2,240,0", "64,4,240,1", "64,3,240,0", "64,2,240,1"]
LENGTHS = [1024, 2048, 4096, 8192, 16384]
SECONDS = 60
BOUND = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
# (counts, cached prefixes): one token, less than a tile, a tile to the token, ragged with and without prefix, padding
SHAPES = [
    ([1], [0]),
    ([64, 65, 1], [0, 0, 0]),
    ([128], [0]),
    ([128, 129], [128, 127]),
    ([300, 0, 17, 1000, 0], [0, 0, 513, 77, 0]),
    ([1, 1, 2], [3000, 127, 128]),
    ([2048, 700], [0, 1500]),
]


def device_chunks(counts: list[int], prefixes: list[int], gap: int) -> tuple[PrefillChunks, int, int]:
    """The chunks with `gap` tokens and positions that are nobody's after each; tokens, positions."""
    tile_starts, q_starts, ctx_starts = [0], [0], [0]
    for count, prefix in zip(counts, prefixes, strict=True):
        tile_starts.append(tile_starts[-1] + -(-count // BLOCK_M))
        q_starts.append(q_starts[-1] + count + gap)
        ctx_starts.append(ctx_starts[-1] + count + prefix + gap)
    ends = [count + prefix for count, prefix in zip(counts, prefixes, strict=True)]
    columns = (tile_starts, q_starts[:-1], counts, ends, ctx_starts[:-1])
    chunks = PrefillChunks(*(torch.tensor(column, dtype=torch.int32, device="cuda") for column in columns))
    return chunks, q_starts[-1], ctx_starts[-1]


def truth(q: Tensor, kv: Tensor) -> Tensor:
    """In float32: q [count, heads, dim] at the end of the context kv [end, kv_heads, 2, dim]."""
    (count, heads, dim), (end, kv_heads, _, _) = q.shape, kv.shape
    k, v = kv.float().repeat_interleave(heads // kv_heads, dim=1).unbind(2)
    scores = torch.einsum("chd,ehd->hce", q.float(), k) / math.sqrt(dim)
    hidden = torch.ones(count, end, dtype=torch.bool, device="cuda").tril(end - count).logical_not()
    return torch.einsum("hce,ehd->chd", scores.masked_fill(hidden, -math.inf).softmax(-1), v)


def check(counts: list[int], prefixes: list[int], dim: int, dtype: torch.dtype, tiling: HopperTiling) -> float:
    """‖out - truth‖ / ‖truth‖; raises where a row is missing, or written that is nobody's."""
    heads, kv_heads = 8, 2
    chunks, tokens, positions = device_chunks(counts, prefixes, gap=3)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, dim, device="cuda").to(dtype)
    q = qkv[:, :heads]
    workspace = (torch.randn(positions + 5, kv_heads, 2, dim, device="cuda") * 100).to(dtype)  # stale, but finite
    out = torch.full((tokens, heads, dim), math.nan, dtype=dtype, device="cuda")
    expected = torch.full((tokens, heads, dim), math.nan, device="cuda")
    for count, end, q_start, ctx_start in zip(
        *(column.tolist() for column in (chunks.counts, chunks.ends, chunks.q_starts, chunks.ctx_starts)), strict=True
    ):
        context = workspace[ctx_start : ctx_start + end]
        context.copy_(torch.randn_like(context, dtype=torch.float32))
        expected[q_start : q_start + count] = truth(q[q_start : q_start + count], context)
    prefill_attention_hopper(q, workspace, chunks, most_tiles(tokens, len(counts)), out, tiling)
    torch.cuda.synchronize()
    assert torch.equal(out.isnan(), expected.isnan()), f"rows missing or too many: {counts} after {prefixes}"
    written = ~expected.isnan()
    return ((out.float() - expected)[written].norm() / expected[written].norm()).item()


def check_all(tiling: HopperTiling) -> None:
    for dim, dtype in ((128, torch.bfloat16), (64, torch.float16), (128, torch.float16), (64, torch.bfloat16)):
        errors = [check(counts, prefixes, dim, dtype, tiling) for counts, prefixes in SHAPES]
        verdict = "ok" if max(errors) <= BOUND[dtype] else "WRONG"
        print(f"  head_dim {dim:3} {dtype!s:14} largest error {max(errors):.1e}  {verdict}", flush=True)
        if verdict != "ok":
            print("  errors by shape:", " ".join(f"{error:.1e}" for error in errors), flush=True)


def seconds_of(launch: Callable[[], None]) -> float:
    """Of one launch, ten of them in a graph, the median of seven replays."""
    launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            launch()
    graph.replay()
    times = []
    for _ in range(7):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 10_000)
    return sorted(times)[3]


def tflops(tokens: int, dim: int, tiling: HopperTiling) -> float:
    heads, kv_heads = 32, 8
    chunks, _, _ = device_chunks([tokens], [0], gap=0)
    q = torch.randn(tokens, heads, dim, device="cuda").bfloat16()
    workspace = torch.randn(tokens, kv_heads, 2, dim, device="cuda").bfloat16()
    out = torch.empty_like(q)
    seconds = seconds_of(lambda: prefill_attention_hopper(q, workspace, chunks, most_tiles(tokens, 1), out, tiling))
    return 4 * tokens * tokens / 2 * dim * heads / seconds / 1e12


def run(variant: str) -> None:
    block_n, stages, registers, ping_pong = map(int, variant.split(","))
    tiling = HopperTiling(block_n, stages, registers, bool(ping_pong))
    torch.manual_seed(0)
    check_all(tiling)
    for dim in (128, 64):
        row = "  ".join(f"{tflops(tokens, dim, tiling):4.0f}" for tokens in LENGTHS)
        print(f"  head_dim {dim:3} causal bf16 32/8 heads, TFLOP/s at {LENGTHS}:  {row}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", action="append", help="block_n,stages,consumer_registers,ping_pong")
    parser.add_argument("--here", action="store_true", help="in this process, without a time limit")
    arguments = parser.parse_args()
    assert is_available(torch.device("cuda")), "no Hopper GPU, or a Triton without Gluon"
    for variant in arguments.variant or VARIANTS:
        if arguments.here:
            run(variant)
            continue
        print(f"block_n,stages,consumer_registers,ping_pong = {variant}", flush=True)
        try:
            subprocess.run([sys.executable, __file__, "--here", "--variant", variant], timeout=SECONDS, check=True)
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as failure:
            print(f"  FAILED: {failure}", flush=True)


if __name__ == "__main__":
    main()
