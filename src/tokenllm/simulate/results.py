"""What a run has shown, in the figures that its reader compares."""

import msgspec
import numpy as np

from tokenllm.routing.columns import Floats
from tokenllm.simulate.server import Books
from tokenllm.simulate.workload import Workload

MOST_TTFT_S = 10.0
MOST_GAP_S = 1.5


class Row(msgspec.Struct, frozen=True):
    """One policy's run. Shares are from 0 to 1; of the requests, a refused one is outside the SLA."""

    policy: str
    output_tokens_per_s: float
    memory_use: float  # of the capacity, in the time in which somebody waited; in all the time if nobody did
    paused_share: float  # of the requests, paused at least once
    recomputed_share: float  # tokens computed again after a pause, of all prompt tokens
    ttft_p50_s: float
    ttft_p99_s: float
    in_sla_share: float
    steps: int
    pauses: int
    peak_tokens: int
    refused_share: float
    simulated_s: float
    wall_s: float


def row(policy: str, work: Workload, books: Books, capacity: int, wall_s: float) -> Row:
    served = ~np.isnan(books.first_token_s)
    ttft = books.first_token_s[served]
    in_sla = (books.first_token_s <= MOST_TTFT_S) & ~(books.longest_gap_s > MOST_GAP_S)
    return Row(
        policy=policy,
        output_tokens_per_s=float(work.length[served].sum() / books.seconds) if books.seconds else 0.0,
        memory_use=_memory_use(books, capacity),
        paused_share=float((books.pauses > 0).mean()),
        recomputed_share=float(books.recomputed.sum() / work.prompt.sum()),
        ttft_p50_s=_quantile(ttft, 0.5),
        ttft_p99_s=_quantile(ttft, 0.99),
        in_sla_share=float(in_sla.mean()),
        steps=books.steps,
        pauses=int(books.pauses.sum()),
        peak_tokens=books.most_tokens,
        refused_share=float((~served).mean()),
        simulated_s=books.seconds,
        wall_s=wall_s,
    )


def _quantile(values: Floats, share: float) -> float:
    return float(np.quantile(values, share)) if len(values) else 0.0


def _memory_use(books: Books, capacity: int) -> float:
    if not books.timeline:
        return 0.0
    _, seconds, used, _, waiting = np.array(books.timeline).T
    queued = waiting > 0
    if not queued.any():
        queued[:] = True
    return float((seconds * used)[queued].sum() / seconds[queued].sum() / capacity)
