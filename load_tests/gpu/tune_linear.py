"""Find the quickest tiles of every product of the given models at 16, 32, 64 and 128 tokens, cuBLAS among them, and
write `linear_h100.json`. Weights of many layers are cycled, so each is read from memory as in a real step.

    PYTHONPATH=src:kernels:api_schemas:load_tests/gpu python load_tests/gpu/tune_linear.py CONFIG.json … --out FILE
"""

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from rich.progress import track
from torch import Tensor
from torch.nn import functional

from timing import call_us, error
from tokenllm_kernels.gpu.layers import silu_mul
from tokenllm_kernels.gpu.linear import SPLIT_WORKSPACE, Tiles, few_tokens

TOKENS = (16, 32, 64, 128)
SHARED_MEMORY = 220_000
CYCLED_BYTES = 400_000_000


@dataclass(frozen=True)
class Shape:
    features: int  # rows of the weight
    depth: int
    gated: bool

    def key(self, tokens: int) -> str:
        return f"{'gated ' if self.gated else ''}{self.features}x{self.depth} m{tokens}"


def shapes_of(config: dict) -> list[Shape]:
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    return [
        Shape((heads + 2 * kv_heads) * head_dim, hidden, False),
        Shape(hidden, heads * head_dim, False),
        Shape(2 * wide, hidden, True),
        Shape(hidden, wide, False),
        Shape(config["vocab_size"], hidden, False),
    ]


def candidates(shape: Shape, tokens: int) -> Iterator[Tiles]:
    """Tiles that fit in shared memory and give the card something to do."""
    parts = 2 if shape.gated else 1
    for block_n, block_k in [(32, 128), (32, 256), (64, 64), (64, 128), (64, 256), (128, 64), (128, 128)]:
        if shape.depth % block_k:
            continue
        stage = (block_n * parts + tokens) * block_k * 2
        blocks = triton.cdiv(shape.features // parts, block_n)
        for stages in sorted({min(3, SHARED_MEMORY // stage), min(6, SHARED_MEMORY // stage)} - {0, 1}):
            for splits in (1, 2, 4):
                fits = blocks * splits * block_n * tokens * parts <= SPLIT_WORKSPACE or splits == 1
                if fits and (splits == 1 or 100 < blocks * splits <= 600) and shape.depth // splits >= block_k:
                    yield Tiles(block_n, block_k, splits, 8 if block_n == 128 else 4, stages)


def random_case(shape: Shape, tokens: int, copies: int) -> tuple[Tensor, list[Tensor]]:
    x = torch.randn(tokens, shape.depth, device="cuda", dtype=torch.bfloat16)
    weights = [
        torch.randn(shape.features, shape.depth, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(copies)
    ]
    return x, weights


def compile_one(job: tuple[int, bool, Tiles]) -> None:
    """Fill Triton's cache, in a process of a pool."""
    tokens, gated, tiles = job
    x, (weight,) = random_case(Shape(2 * tiles.block_n, tiles.block_k * 16, gated), tokens, 1)
    few_tokens(x, weight, tiles, gated=gated)


def compile_all(shapes: list[Shape]) -> None:
    jobs = {
        (tokens, shape.gated, Tiles(t.block_n, t.block_k, min(t.splits, 2), t.warps, t.stages))
        for shape in shapes
        for tokens in TOKENS
        for t in candidates(shape, tokens)
    }
    with ProcessPoolExecutor(14, mp_context=get_context("spawn")) as pool:
        done = pool.map(compile_one, sorted(jobs, key=str), chunksize=4)
        list(track(done, "compiling", total=len(jobs)))


def tune(shape: Shape, tokens: int, weights: list[Tensor]) -> dict[str, object]:
    x = torch.randn(tokens, shape.depth, device="cuda", dtype=torch.bfloat16)

    def cublas(weight: Tensor) -> Tensor:
        out = functional.linear(x, weight)
        return silu_mul(out) if shape.gated else out

    best: tuple[float, Tiles | None] = call_us([lambda w=w: cublas(w) for w in weights]), None
    peer = best[0]
    truth = cublas(weights[0])
    for tiles in candidates(shape, tokens):
        us = call_us([lambda w=w, t=tiles: few_tokens(x, w, t, gated=shape.gated) for w in weights], 3)
        if us < best[0] and error(few_tokens(x, weights[0], tiles, gated=shape.gated), truth) < 1e-2:
            best = us, tiles
    size = weights[0].nbytes
    return {
        "cublas_us": peer,
        "us": best[0],
        "tb_s": size / best[0] / 1e6,
        "tiles": astuple(best[1]) if best[1] and best[0] < 0.98 * peer else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    shapes = list(dict.fromkeys(s for path in arguments.configs for s in shapes_of(json.loads(path.read_text()))))
    compile_all(shapes)
    found = {}
    for shape in shapes:
        _, weights = random_case(shape, 1, max(2, CYCLED_BYTES // (shape.features * shape.depth * 2)))
        for tokens in TOKENS:
            key = shape.key(tokens)
            found[key] = tune(shape, tokens, weights)
            print(f"{key:32}", *(f"{v:8.2f}" if isinstance(v, float) else v for v in found[key].values()), flush=True)
        del weights
    tiles = {key: row["tiles"] for key, row in found.items() if row["tiles"]}
    arguments.out.write_text(json.dumps({"triton": triton.__version__, "tiles": tiles, "measured": found}, indent=1))


if __name__ == "__main__":
    main()
