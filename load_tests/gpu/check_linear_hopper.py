"""Check and time the Gluon product for few tokens on a Hopper GPU, beside the products of today.

    PYTHONPATH=kernels:load_tests/gpu python3 load_tests/gpu/check_linear_hopper.py                 # all of VARIANTS
    PYTHONPATH=kernels:load_tests/gpu python3 load_tests/gpu/check_linear_hopper.py 64,128,160,0,1

A variant is block_n,block_k,ring_kb,ctas,early; of ctas, 0 is one on each multiprocessor, and -1 as many as can take
equal numbers of whole row blocks, so that few or none are shared. First all are checked, in processes beside each other
that also fill Triton's cache; then one process times those that were right. A process gets 60 seconds: a deadlock costs
no more.
"""

import argparse
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch
import triton
from torch import Tensor
from torch.nn import functional

from timing import call_us, error, graph_of, limits, replay_ms
from tokenllm_kernels.gpu.device import multiprocessors
from tokenllm_kernels.gpu.layers import rms_norm
from tokenllm_kernels.gpu.linear import linear, linear_add, linear_silu_mul
from tokenllm_kernels.gpu.linear_hopper import StreamTiling, is_available, stream_linear
from tokenllm_kernels.reference import Linear

VARIANTS = [
    "64,128,160,0,1",
    "64,128,160,0,0",
    "64,128,96,0,1",
    "64,128,208,0,1",
    "64,128,208,-1,1",
    "64,128,96,-1,1",
    "64,256,160,0,1",
    "128,128,208,0,1",
]
CHECKED = (1, 7, 16, 33, 64)  # tokens, for the first variant
TIMED = (1, 16, 64)  # tokens
SECONDS = 60
AT_ONCE = 14
BOUND = 1e-2
CYCLED_BYTES = 400_000_000
EPS = 1e-5


@dataclass(frozen=True)
class Product:
    rows: int
    depth: int
    kind: str  # of "bias", "gated" and "add", those that it does


@dataclass(frozen=True)
class Model:
    name: str
    hidden: int
    qkv: int
    heads: int  # columns of o
    wide: int
    layers: int  # of a timed chain

    def products(self) -> list[Product]:
        return [
            Product(self.qkv, self.hidden, ""),
            Product(self.hidden, self.heads, "add"),
            Product(2 * self.wide, self.hidden, "gated"),
            Product(self.hidden, self.wide, "add"),
        ]


MODELS = [
    Model("8B", 4096, 6144, 4096, 14336, 8),
    Model("1B", 2048, 3072, 2048, 8192, 16),
    Model("0.6B", 1024, 4096, 2048, 3072, 28),
]
ODD = [Product(1000, 1032, "bias"), Product(2000, 1032, "gated"), Product(72, 8, "add"), Product(200, 4096, "bias add")]


def tiling_of(variant: str) -> StreamTiling:
    block_n, block_k, ring_kb, ctas, early = map(int, variant.split(","))
    return StreamTiling(block_n, block_k, ring_kb * 1024, ctas, bool(early))


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * scale).bfloat16()


def errors_of(product: Product, tokens: int, tilings: list[StreamTiling]) -> Iterator[float]:
    """‖out - truth‖ / ‖truth‖ of two launches after each other, each way of cutting it; NaN if one is missing."""
    gated = "gated" in product.kind
    features = product.rows // (1 + gated)
    x, weight = random(tokens, product.depth), random(product.rows, product.depth, scale=1 / math.sqrt(product.depth))
    bias = random(product.rows) if "bias" in product.kind else None
    exact = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    if gated:
        gate, up = exact.bfloat16().double().chunk(2, dim=1)
        exact = functional.silu(gate) * up
    for tiling in tilings:
        held = [random(tokens, features) for _ in range(2)]
        outs = [each.clone() if "add" in product.kind else torch.full_like(each, math.nan) for each in held]
        for out in outs:
            where = {"add_to" if "add" in product.kind else "out": out}
            streamed(x, weight, tiling=tiling, gated=gated, bias=bias, **where)
        for each, out in zip(held, outs, strict=True):
            yield error(out, exact + each.double() if "add" in product.kind else exact)


def check(variant: str, tokens: int) -> None:
    tiling, wrong, largest = tiling_of(variant), [], 0.0
    fully = variant == VARIANTS[0]
    cases = [(product, [tiling] + [replace(tiling, ctas=50)] * fully) for m in MODELS for product in m.products()]
    cases += [(product, [tiling, replace(tiling, ctas=7)]) for product in ODD if fully]
    for product, tilings in cases:
        errors = list(errors_of(product, tokens, tilings))
        largest = max(largest, *errors)
        if not all(each <= BOUND for each in errors):
            wrong.append(f"    {product}: {' '.join(f'{each:.1e}' for each in errors)}")
    print(
        f"  {variant:16} {tokens:2} tokens: largest error {largest:.1e}  {'WRONG' if wrong else 'ok'}", *wrong, sep="\n"
    )
    sys.exit(bool(wrong))


def today_linear(x: Tensor, weight: Tensor, *, gated: bool = False, add_to: Tensor | None = None) -> Tensor:
    """Today's products under the signature of `stream_linear`."""
    w = Linear("plain", weight, None, weight.shape[0])
    if gated:
        return linear_silu_mul(x, w)
    return linear(x, w) if add_to is None else linear_add(x, w, add_to)


def streamed(x: Tensor, weight: Tensor, *, tiling: StreamTiling, gated: bool = False, **where: Tensor | None) -> Tensor:
    if tiling.ctas < 0:
        blocks = triton.cdiv(weight.shape[0] // (1 + gated), tiling.block_n)
        tiling = replace(tiling, ctas=triton.cdiv(blocks, triton.cdiv(blocks, multiprocessors(x.device))))
    return stream_linear(x, weight, tiling=tiling, gated=gated, **where)


def call_product(
    product: Product, x: Tensor, weight: Tensor, residual: Tensor, multiply: Callable[..., Tensor]
) -> Tensor:
    add_to = residual if "add" in product.kind else None
    return multiply(x, weight, gated="gated" in product.kind, add_to=add_to)


def alone_us(product: Product, tokens: int, multiply: Callable[..., Tensor], weights: list[Tensor]) -> float:
    x, residual = random(tokens, product.depth), random(tokens, product.rows)
    return call_us([partial(call_product, product, x, weight, residual, multiply) for weight in weights])


def layer(residual: Tensor, gains: list[Tensor], weights: list[Tensor], multiply: Callable[..., Tensor]) -> None:
    """Of a decoder, with a norm in the place of rope and attention."""
    qkv, o, gate_up, down = weights
    tokens, depth = residual.shape[0], o.shape[1]
    projected = multiply(rms_norm(residual, gains[0], EPS), qkv)
    attended = rms_norm(projected.view(-1)[: tokens * depth].view(tokens, depth), gains[1], EPS)
    multiply(attended, o, add_to=residual)
    hidden = multiply(rms_norm(residual, gains[0], EPS), gate_up, gated=True)
    multiply(hidden, down, add_to=residual)


def chain_us(
    model: Model, tokens: int, multiply: Callable[..., Tensor], weights: list[list[Tensor]]
) -> tuple[float, Tensor]:
    """Time of a layer among others, and what is left in the residual after the last replay."""
    torch.manual_seed(1)
    initial = random(tokens, model.hidden)
    residual, gains = initial.clone(), [random(model.hidden), random(model.heads)]
    calls = [lambda: residual.copy_(initial)] + [partial(layer, residual, gains, each, multiply) for each in weights]
    us = replay_ms(graph_of(calls).replay, 15) * 1000 / model.layers
    return us, residual


def warm(name: str, tokens: int) -> None:
    """Fill Triton's cache with today's kernels for a model."""
    model = next(model for model in MODELS if model.name == name)
    weights = [random(p.rows, p.depth, scale=0.02) for p in model.products()]
    layer(random(tokens, model.hidden), [random(model.hidden), random(model.heads)], weights, today_linear)
    torch.cuda.synchronize()


def time_all(variants: list[str]) -> None:
    read = limits().read_tb_s
    print(f"{torch.cuda.get_device_name()}, reads at {read:.2f} TB/s; block_n,block_k,ring_kb,ctas,early; µs (TB/s)")
    for model in MODELS:
        layers = [[random(p.rows, p.depth, scale=0.02) for p in model.products()] for _ in range(model.layers)]
        size = sum(weight.nbytes for weight in layers[0])
        print(
            f"{model.name}: qkv, o, gate_up, down alone; a layer in a chain, of which weights {size / read / 1e6:.1f}"
        )
        for tokens in TIMED:
            baseline = None
            for name in ["today", *(variants if tokens != 16 else variants[:1])]:
                multiply = today_linear if name == "today" else partial(streamed, tiling=tiling_of(name))
                line = f"  {tokens:2} tokens {name:16}"
                for i, product in enumerate(model.products()):
                    copies = max(2, min(model.layers, CYCLED_BYTES // layers[0][i].nbytes))
                    us = alone_us(product, tokens, multiply, [each[i] for each in layers[:copies]])
                    line += f" {us:6.1f} ({layers[0][i].nbytes / us / 1e6:.2f})"
                us, residual = chain_us(model, tokens, multiply, layers)
                baseline = residual if baseline is None else baseline
                apart = error(residual, baseline)
                print(f"{line}   layer {us:6.1f} ({size / us / 1e6:.2f})  apart {apart:.0e}", flush=True)
        del layers


def child(*arguments: object) -> bool:
    """Whether this script, so called, came to its end in time and was content."""
    try:
        done = subprocess.run([sys.executable, __file__, *map(str, arguments)], timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        print(f"  {arguments}: no end after {SECONDS} seconds", flush=True)
        return False
    if done.returncode:
        print(f"  {arguments}: ended with {done.returncode}", flush=True)
    return not done.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", help="block_n,block_k,ring_kb,ctas,early", default=VARIANTS)
    for step in ("check", "warm", "time"):
        parser.add_argument(f"--{step}", help=argparse.SUPPRESS, action="store_true")
    arguments = parser.parse_args()
    assert is_available(torch.device("cuda")), "no Hopper GPU, or a Triton without Gluon"
    torch.manual_seed(0)
    if arguments.time:
        return time_all(arguments.variants)
    if arguments.check or arguments.warm:
        what, tokens = arguments.variants
        return (check if arguments.check else warm)(what, int(tokens))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        checks = {
            (variant, tokens): pool.submit(child, "--check", variant, tokens)
            for variant in arguments.variants
            for tokens in (CHECKED if variant == VARIANTS[0] else (1, 64))
        }
        for model in MODELS:
            for tokens in TIMED:
                pool.submit(child, "--warm", model.name, tokens)
    wrong = {variant for (variant, _), done in checks.items() if not done.result()}
    child("--time", *(variant for variant in arguments.variants if variant not in wrong))
    return None


if __name__ == "__main__":
    main()
