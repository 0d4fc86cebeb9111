"""Every kernel against the limit of this very card, measured in the same run: what moves memory against a copy, what
multiplies against cuBLAS on a large square. Inputs are rotated, so that the cache holds none of them.

    make bench-gpu BENCH=kernels                                                     # the shapes of Llama 3.1 8B
    make bench-gpu BENCH=kernels ARGS="--only products tests/data/*-config.json"     # more models
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from results import add_out_flag, keep, limits_line, one_plot, open_console, table_of
from timing import Limits, call_us, limits
from tokenllm_kernels import LogitsRule, prepare_linear
from tokenllm_kernels.gpu import layers
from tokenllm_kernels.gpu.decode_attention import DecodePlan, DecodeTiling, decode_attention, plan_decode
from tokenllm_kernels.gpu.inputs import gather_contexts
from tokenllm_kernels.gpu.linear import bucket_of, choice_for, linear, linear_silu_mul
from tokenllm_kernels.gpu.prefill_attention import ChunkTable, prefill_attention
from tokenllm_kernels.gpu.prefill_hopper import (
    BLOCK_M,
    HopperTiling,
    PrefillChunks,
    is_available,
    most_tiles,
    prefill_attention_hopper,
)
from tokenllm_kernels.gpu.sampling import SamplingTable, SamplingWorkspace, sample_rows, set_rules
from tune_linear import Job, Shape, compile_all, random_case, shapes_of

EIGHT_B = Path(__file__).parents[2] / "tests" / "data" / "llama-3.1-8b-config.json"
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
CYCLED_BYTES = 300_000_000  # six times the cache
MOST_CALLS = 64


@dataclass(frozen=True)
class Measurement:
    kernel: str
    case: str
    us: float
    rate: float | None = None  # TB/s or TFLOP/s
    of: str = "copy"  # the limit it is measured against
    limit: float | None = None
    peer_us: float | None = None  # cuBLAS, where it is the alternative

    @property
    def share(self) -> float | None:
        return self.rate / self.limit if self.rate and self.limit else None


@dataclass(frozen=True)
class Bench:
    """Where to measure, and what the card can do."""

    device: torch.device
    dtype: torch.dtype
    limits: Limits
    quick: bool

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def ints(self, values: Sequence[int] | Tensor) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int32, device=self.device)

    def memory(self, kernel: str, case: str, calls: Sequence[Callable[[], object]], bytes_: float) -> Measurement:
        us = call_us(calls)
        return Measurement(kernel, case, us, bytes_ / us / 1e6, "copy", self.limits.copy_tb_s)

    def flops(self, kernel: str, case: str, calls: Sequence[Callable[[], object]], flops: float) -> Measurement:
        us = call_us(calls)
        return Measurement(kernel, case, us, flops / us / 1e6, "GEMM", self.limits.gemm_tflop_s)


def copies_of(bytes_: float) -> int:
    return max(1, min(MOST_CALLS, math.ceil(CYCLED_BYTES / bytes_)))


# ---- decode attention ----


def decode_cases(quick: bool) -> dict[str, list[int]]:
    ragged = [131_072] + [4096] * 31
    cases = {
        "64 x 4096": [4096] * 64,
        "256 x 1024": [1024] * 256,
        "1 x 1024": [1024],
        "8 x 1024": [1024] * 8,
        "32 x 1024": [1024] * 32,
        "1 x 131072 + 31 x 4096": ragged,
        "as many, 32 x 8064": [sum(ragged) // 32] * 32,
    }
    few = ("64 x 4096", "1 x 131072 + 31 x 4096", "as many, 32 x 8064")
    return {name: cases[name] for name in few} if quick else cases


def decode(bench: Bench) -> Iterator[Measurement]:
    for case, lengths in decode_cases(bench.quick).items():
        yield decode_case(bench, case, lengths)
    yield decode_case(bench, "64 x 4096, slots in order", [4096] * 64, scattered=False)
    for batch in (256, 1024):
        yield plan_case(bench, batch)


def plan_case(bench: Bench, batch: int) -> Measurement:
    """Once a step: where each program's piece of the work begins."""
    tiling = DecodeTiling.of(bench.dtype, HEAD_DIM, bench.device)
    plan = DecodePlan.empty(batch, HEADS, KV_HEADS, HEAD_DIM, tiling, bench.device)
    plan.lengths.fill_(1024)
    return Measurement("plan_decode", f"{batch} sequences", call_us([lambda: plan_decode(plan, batch, KV_HEADS)] * 16))


def decode_case(bench: Bench, case: str, lengths: list[int], *, scattered: bool = True) -> Measurement:
    """Scattered slots are as they are after some hours of serving."""
    tokens, batch = sum(lengths), len(lengths)
    bytes_ = tokens * KV_HEADS * 2 * HEAD_DIM * bench.dtype.itemsize
    pools = [bench.randn(tokens + 1, KV_HEADS, 2, HEAD_DIM) for _ in range(copies_of(bytes_))]
    index = torch.full((batch, max(lengths)), tokens, dtype=torch.int32, device=bench.device)
    slots, begin = bench.ints(torch.randperm(tokens) if scattered else range(tokens)), 0
    for row, length in enumerate(lengths):
        index[row, :length] = slots[begin : begin + length]
        begin += length
    tiling = DecodeTiling.of(bench.dtype, HEAD_DIM, bench.device)
    plan = DecodePlan.empty(batch, HEADS, KV_HEADS, HEAD_DIM, tiling, bench.device)
    plan.lengths.copy_(bench.ints(lengths))
    plan.rows.copy_(torch.arange(batch))
    plan_decode(plan, batch, KV_HEADS)
    q, out = bench.randn(batch, HEADS, HEAD_DIM), bench.randn(batch, HEADS, HEAD_DIM)
    calls = [lambda kv=kv: decode_attention(q, kv, index, plan, out) for kv in pools]
    return bench.memory("decode attention", case, calls * max(1, 4 // len(calls)), bytes_)


# ---- prefill attention ----


def prefill_cases(quick: bool) -> dict[str, list[int]]:
    lengths = (8192,) if quick else (1024, 2048, 4096, 8192, 16384)
    return {f"{tokens} causal": [tokens] for tokens in lengths} | {"32 x 1024 causal": [1024] * 32}


def prefill(bench: Bench) -> Iterator[Measurement]:
    for case, counts in prefill_cases(bench.quick).items():
        yield from prefill_case(bench, case, counts)
    yield gather_case(bench, 8192)


def gather_case(bench: Bench, tokens: int) -> Measurement:
    """Scattered contexts copied together for the Hopper kernel, once a layer."""
    bytes_ = 2 * tokens * KV_HEADS * 2 * HEAD_DIM * bench.dtype.itemsize
    pools = [bench.randn(tokens + 1, KV_HEADS, 2, HEAD_DIM) for _ in range(copies_of(bytes_))]
    slots, words = bench.ints(torch.randperm(tokens)), bench.ints([0, 0, tokens, 0])
    workspace = torch.zeros_like(pools[0])
    calls = [lambda kv=kv: gather_contexts(words, slots, kv, workspace) for kv in pools]
    return bench.memory("gather_contexts", f"{tokens} tokens", calls, bytes_)


def prefill_case(bench: Bench, case: str, counts: list[int]) -> Iterator[Measurement]:
    tokens = sum(counts)
    starts = [sum(counts[:i]) for i in range(len(counts))]
    flops = sum(4 * n * n / 2 * HEAD_DIM * HEADS for n in counts)
    q, out = bench.randn(tokens, HEADS, HEAD_DIM), bench.randn(tokens, HEADS, HEAD_DIM)
    kv = bench.randn(tokens + 1, KV_HEADS, 2, HEAD_DIM)
    if is_available(bench.device):
        tiles = [0]
        for count in counts:
            tiles.append(tiles[-1] + -(-count // BLOCK_M))
        chunks = PrefillChunks(*map(bench.ints, (tiles, starts, counts, counts, starts)))
        most, tiling = most_tiles(tokens, len(counts)), HopperTiling()
        calls = [lambda: prefill_attention_hopper(q, kv, chunks, most, out, tiling)] * 4
        yield bench.flops("prefill, Hopper", case, calls, flops)
    index = torch.zeros(len(counts), max(counts), dtype=torch.int32, device=bench.device)
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        index[row, :count] = torch.arange(start, start + count)
    table = ChunkTable(*map(bench.ints, (range(len(counts)), starts, counts, counts)))
    calls = [lambda: prefill_attention(q, kv, index, table, tokens, out)] * 4
    yield bench.flops("prefill, any GPU", case, calls, flops)


# ---- norms, rope, activation, embedding ----


def small(bench: Bench, config: dict) -> Iterator[Measurement]:
    for tokens in (1, 256) if bench.quick else (1, 256, 2048):
        yield from small_kernels(bench, config, tokens)


def small_kernels(bench: Bench, config: dict, tokens: int) -> Iterator[Measurement]:
    hidden, wide, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    size, gain = bench.dtype.itemsize, bench.randn(hidden)
    case = f"{tokens} tokens"

    def inputs(width: int) -> list[Tensor]:
        return [bench.randn(tokens, width) for _ in range(copies_of(tokens * width * size))]

    table = bench.randn(vocab, hidden)
    ids = [torch.randint(vocab, (tokens,), device=bench.device) for _ in range(copies_of(tokens * hidden * size))]
    calls = [lambda i=i: layers.embed(i, table, bench.dtype) for i in ids]
    yield bench.memory("embed", case, calls, 2 * tokens * hidden * size)
    calls = [lambda x=x: layers.rms_norm(x, gain, 1e-5) for x in inputs(hidden)]
    yield bench.memory("rms_norm", case, calls, 2 * tokens * hidden * size)
    calls = [lambda x=x: layers.silu_mul(x) for x in inputs(2 * wide)]
    yield bench.memory("silu_mul", case, calls, 3 * tokens * wide * size)
    width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    kv, slots = bench.randn(tokens + 1, KV_HEADS, 2, HEAD_DIM), bench.ints(torch.randperm(tokens))
    angles = torch.randn(tokens, HEAD_DIM, device=bench.device)
    rope = torch.stack((angles.cos(), angles.sin()), 1)
    calls = [lambda x=x: layers.rope_and_store(x, rope, kv, slots, HEADS) for x in inputs(width)]
    yield bench.memory("rope_and_store", case, calls, 2 * tokens * width * size + rope.nbytes)


# ---- products ----


def products(bench: Bench, configs: Sequence[dict]) -> Iterator[Measurement]:
    """Our choice of tiles or cuBLAS against cuBLAS alone."""
    shapes = list(dict.fromkeys(shape for config in configs for shape in shapes_of(config)))
    tokens = (1, 64) if bench.quick else (1, 8, 32, 64, 128, 256)
    compile_products(bench, shapes, tokens)
    for shape in shapes:
        _, weights = random_case(shape, 1, max(2, CYCLED_BYTES // (shape.features * shape.depth * 2)))
        for count in tokens:
            yield product(bench, shape, count, weights)


def compile_products(bench: Bench, shapes: Sequence[Shape], tokens: Sequence[int]) -> None:
    compile_all(
        Job(shape, False, bucket_of(count), choice)
        for shape in shapes
        for count in tokens
        if (choice := choice_for(count, shape.features, shape.depth, gated=shape.gated, device=bench.device))
    )


def product(bench: Bench, shape: Shape, tokens: int, weights: Sequence[Tensor]) -> Measurement:
    x = bench.randn(tokens, shape.depth)
    linears = [prepare_linear(weight) for weight in weights]

    def cublas(weight: Tensor) -> Tensor:
        out = functional.linear(x, weight)
        return layers.silu_mul(out) if shape.gated else out

    ours = [lambda w=w: linear_silu_mul(x, w) if shape.gated else linear(x, w) for w in linears]
    case = f"{'gated ' if shape.gated else ''}{shape.features}x{shape.depth}, {tokens} tokens"
    outputs = shape.features * tokens * 2 // (2 if shape.gated else 1)
    peer_us = call_us([lambda w=w: cublas(w) for w in weights])
    us = call_us(ours)
    rate = (weights[0].nbytes + x.nbytes + outputs) / us / 1e6
    return Measurement("product", case, us, rate, "read", bench.limits.read_tb_s, peer_us)


# ---- sampling ----


def sampling(bench: Bench) -> Iterator[Measurement]:
    rules = {"greedy": LogitsRule(0, 0.0), "top-p 0.9": LogitsRule(0, 0.8, 0.9), "plain": LogitsRule(0, 1.0)}
    for vocab in (128_256, 151_936):
        for name, rule in rules.items():
            yield sampling_case(bench, f"{name}, 256 rows of {vocab}", rule, 256, vocab)


def sampling_case(bench: Bench, case: str, rule: LogitsRule, rows: int, vocab: int) -> Measurement:
    table = SamplingTable.empty(rows, vocab, bench.device)
    set_rules(table, list(range(rows)), [rule] * rows)
    workspace = SamplingWorkspace.empty(rows, vocab, bench.device)
    order, positions = bench.ints(range(rows)), bench.ints([100] * rows)
    out = torch.empty(rows, dtype=torch.int32, device=bench.device)
    batches = [bench.randn(rows, vocab) * 3 for _ in range(4)]
    calls = [lambda x=x: sample_rows(x, order, positions, table, out, workspace) for x in batches]
    us = call_us(calls)
    rate = batches[0].nbytes / us / 1e6
    return Measurement("sampling", case, us, rate, "read", bench.limits.read_tb_s)


# ---- all of it ----

GROUPS = ("decode", "prefill", "small", "products", "sampling")


def measure(bench: Bench, group: str, configs: Sequence[dict]) -> Iterator[Measurement]:
    match group:
        case "decode":
            return decode(bench)
        case "prefill":
            return prefill(bench)
        case "small":
            return small(bench, configs[0])
        case "products":
            return products(bench, configs)
        case _:
            return sampling(bench)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", type=Path, default=[EIGHT_B], help="of models; default: Llama 3.1 8B")
    parser.add_argument("--only", default=",".join(GROUPS), help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    add_out_flag(parser)
    arguments = parser.parse_args()
    if strange := set(arguments.only.split(",")) - set(GROUPS):
        parser.error(f"--only: {', '.join(strange)} is none of {', '.join(GROUPS)}")
    return arguments


def show(found: Sequence[Measurement], bench: Bench, out: Path) -> None:
    console = open_console()
    headings = ("kernel", "case", "µs", "TB/s | TFLOP/s", "of the limit", "cuBLAS µs", "faster")
    rows = [
        (
            m.kernel,
            m.case,
            m.us,
            m.rate,
            m.share and f"{m.share:.1%} of {m.of}",
            m.peer_us,
            m.peer_us and m.peer_us / m.us,
        )
        for m in found
    ]
    console.print(table_of("kernels", headings, rows))
    by_case = {m.case: m.us for m in found if m.kernel == "decode attention"}
    if {"1 x 131072 + 31 x 4096", "as many, 32 x 8064"} <= set(by_case):
        ratio = by_case["1 x 131072 + 31 x 4096"] / by_case["as many, 32 x 8064"]
        console.print(f"decode attention: the ragged batch takes {ratio:.3f} of the uniform one", highlight=False)
    console.print(limits_line(bench.limits), highlight=False)
    figure, axes = one_plot("share of the card's limit", height=2 + 0.22 * len(found))
    drawn = axes.barh([f"{m.kernel} {m.case} ({m.of})" for m in found], [m.share or 0 for m in found])
    axes.bar_label(drawn, [f"{m.share or 0:.0%}" for m in found], fontsize="small")
    axes.invert_yaxis()
    axes.axvline(1, color="black")
    measurements = [asdict(m) | {"share": m.share} for m in found]
    keep(out, "gpu-kernels", {"limits": bench.limits.as_dict(), "measurements": measurements}, figure)


def main() -> None:
    arguments = parse_arguments()
    bench = Bench(torch.device("cuda"), torch.bfloat16, limits(), arguments.quick)
    configs = [json.loads(path.read_text()) for path in arguments.configs]
    console, found = open_console(), []
    for group in arguments.only.split(","):
        for measurement in measure(bench, group, configs):
            found.append(measurement)
            share = f"{measurement.share:.1%} of {measurement.of}" if measurement.share else ""
            console.print(f"{measurement.kernel}: {measurement.case}: {measurement.us:.1f} µs {share}", highlight=False)
        torch.cuda.empty_cache()
    show(found, bench, arguments.out)


if __name__ == "__main__":
    main()
