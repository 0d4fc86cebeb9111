"""One load by several processes, for servers that are quicker than one client can read."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

from loadgen.client import Arrivals, Outcome, Pace, Server, Streams, run_load
from loadgen.workload import Prompt


def run_in_processes(
    processes: int, server: Server, prompts: Sequence[Prompt], pace: Pace, report: Callable[[Outcome], None]
) -> list[Outcome]:
    """As `run_load`, but outcomes are reported when a process has ended. None begins before all have started."""
    spawn, shares = get_context("spawn"), shares_of(pace, min(processes, len(prompts)))
    outcomes: list[Outcome | None] = [None] * len(prompts)
    began = time.monotonic()
    with ProcessPoolExecutor(len(shares), spawn, spawn.Barrier(len(shares)).wait) as pool:
        every = len(shares)
        parts = [prompts[first::every] for first in range(every)]
        running = {
            pool.submit(_run, server, part, share, began): first
            for first, (part, share) in enumerate(zip(parts, shares, strict=True))
        }
        for done in as_completed(running):
            outcomes[running[done] :: every] = done.result()
            for outcome in done.result():
                report(outcome)
    return [outcome for outcome in outcomes if outcome is not None]


def shares_of(pace: Pace, processes: int) -> list[Pace]:
    """What each process does, so that together they keep the pace."""
    match pace:
        case Streams(streams=streams):
            count = min(processes, streams)
            return [Streams(streams // count + (first < streams % count)) for first in range(count)]
        case Arrivals(per_s=per_s, seed=seed):
            return [Arrivals(per_s / processes, seed + first) for first in range(processes)]


def _run(server: Server, prompts: Sequence[Prompt], pace: Pace, began: float) -> list[Outcome]:
    return asyncio.run(run_load(server, prompts, pace, began=began))
