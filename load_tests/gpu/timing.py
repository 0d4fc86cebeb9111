"""Trustworthy times of work on a GPU: captured in a graph so that no launch gap is measured, inputs rotated so that the
cache does not help, medians of many replays; and the limits of the very card, measured in the same run.

Without a GPU the same calls are timed by the clock, so that a script can be tried where there is none.
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def graph_of(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """One graph of all calls, after each has run once (so that everything is compiled)."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def replay_ms(replay: Callable[[], object], replays: int = 5) -> float:
    """Median time of a replay, in milliseconds."""
    replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


def call_us(calls: Sequence[Callable[[], object]], replays: int = 5) -> float:
    """Median time of one of `calls`, which follow each other in a graph, in microseconds."""
    if not torch.cuda.is_available():
        return _clocked_us(calls)
    return replay_ms(graph_of(calls).replay, replays) * 1000 / len(calls)


def _clocked_us(calls: Sequence[Callable[[], object]]) -> float:
    calls[0]()
    began = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - began) * 1e6 / len(calls)


@dataclass(frozen=True)
class Limits:
    """What this card does at best: copy counts bytes read and written."""

    device: str
    copy_tb_s: float
    read_tb_s: float
    gemm_tflop_s: float

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def limits() -> Limits:
    """Half a second of work and 4 GB of memory, which is given back."""
    if torch.cuda.is_available():
        found = Limits(torch.cuda.get_device_name(), *_memory_tb_s("cuda", 1 << 30), _gemm_tflop_s("cuda", 8192))
    else:
        found = Limits("no GPU", *_memory_tb_s("cpu", 1 << 20), _gemm_tflop_s("cpu", 256))
    give_back_memory()
    return found


def _memory_tb_s(device: str, elements: int) -> tuple[float, float]:
    """Copy and read."""
    source = torch.randn(elements, device=device, dtype=torch.bfloat16)
    read_us = call_us([lambda: source.view(torch.int32).amax()] * 4)
    return 2 * source.nbytes / _copy_us(source) / 1e6, source.nbytes / read_us / 1e6


def _gemm_tflop_s(device: str, side: int) -> float:
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / call_us([lambda: a @ b] * 10) / 1e6


def give_back_memory() -> None:
    """To the driver, since an engine measures what is free."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _copy_us(source: Tensor) -> float:
    """The best of several ways: in a graph, `copy_` becomes a node that is no kernel, and slower than any."""
    target = torch.empty_like(source)
    ways = [call_us([lambda: torch.add(source, 0, out=target)] * 4)]
    if source.is_cuda:
        ways += [call_us([lambda block=block: _copy_with(source, target, block)] * 4) for block in (2048, 8192)]
        ways.append(replay_ms(lambda: target.copy_(source)) * 1000)
    return min(ways)


def _copy_with(source: Tensor, target: Tensor, block: Any) -> None:
    _copy_kernel[(triton.cdiv(source.numel(), block),)](source, target, block)


@triton.jit
def _copy_kernel(source, target, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at))


def error(ours: Tensor, truth: Tensor) -> float:
    """‖ours - truth‖ / ‖truth‖."""
    return float((ours.double() - truth.double()).norm() / truth.double().norm())
