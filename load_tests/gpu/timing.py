"""Trustworthy times of work on a GPU: captured in a graph so that no launch gap is measured, inputs rotated so that the
cache does not help, medians of many replays; and the limits of the very card, measured in the same run.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median

import torch
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


def replay_ms(graph: torch.cuda.CUDAGraph, replays: int = 5) -> float:
    """Median time of a replay, in milliseconds."""
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


def call_us(calls: Sequence[Callable[[], object]], replays: int = 5) -> float:
    """Median time of one of `calls`, which follow each other in a graph, in microseconds."""
    return replay_ms(graph_of(calls), replays) * 1000 / len(calls)


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
    source = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy = call_us([lambda: target.copy_(source)] * 4)
    read = call_us([lambda: source.view(torch.int32).amax()] * 4)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    gemm = call_us([lambda: a @ b] * 10)
    bytes_ = source.nbytes
    return Limits(
        torch.cuda.get_device_name(), 2 * bytes_ / copy / 1e6, bytes_ / read / 1e6, 2 * 8192**3 / gemm / 1e6
    )


def error(ours: Tensor, truth: Tensor) -> float:
    """‖ours - truth‖ / ‖truth‖."""
    return float((ours.double() - truth.double()).norm() / truth.double().norm())
