"""`tokenllm simulate`: one workload, one policy or all; a table on the screen, rows in a file and a picture beside."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from tokenllm.routing.router import Router
from tokenllm.simulate import figures, mixes, policies, workload
from tokenllm.simulate.flags import FIRST_COME_ORACLE, ORACLE, POLICIES, SYNTHETIC
from tokenllm.simulate.machine import FORMULA, Machine, StepClock
from tokenllm.simulate.results import Row, row
from tokenllm.simulate.server import Books, Server
from tokenllm.simulate.workload import TraceError, Workload

MOST_RUNNING = 512
TARGET_S = 0.2  # of a step with prefill in it, in overload
OVERLOAD = 1.5


def simulate(flags: dict[str, Any]) -> int:
    try:
        work = load(flags["trace"], flags["seed"], flags["requests"])
    except (TraceError, OSError) as error:
        print(f"tokenllm: --trace {error}", file=sys.stderr)
        return 2
    machine = Machine()
    capacity = flags["capacity"] or default_capacity(flags["trace"], machine)
    rate = flags["rate"] if flags["rate"] else overloading_rate(work, machine, capacity)
    work = work.at_rate(rate)
    print(
        f"{work.name}: {len(work)} requests at {rate:.3g} times their rate, {capacity} tokens of KV memory\n{FORMULA}"
    )
    runs = [run(name, work, machine, capacity, flags["seed"], flags["clock"]) for name in _names(flags["policy"])]
    rows = [result for result, _ in runs]
    Console().print(table(rows))
    if flags["json"]:
        _write(flags["json"], rows, {result.policy: books for result, books in runs}, capacity, work.name)
    return 0


def _names(policy: str) -> Sequence[str]:
    if policy == "all":
        return (*POLICIES, ORACLE)
    return (policy,) if policy == ORACLE else (policy, ORACLE)


def load(trace: str, seed: int, requests: int | None = None) -> Workload:
    if trace.startswith(SYNTHETIC):
        return mixes.draw(trace.removeprefix(SYNTHETIC), seed, requests)
    work = workload.read(Path(trace))
    return work.first(requests) if requests else work


def default_capacity(trace: str, machine: Machine) -> int:
    return mixes.MIXES[trace.removeprefix(SYNTHETIC)][2] if trace.startswith(SYNTHETIC) else machine.capacity


def overloading_rate(work: Workload, machine: Machine, capacity: int) -> float:
    """Half more than the machine serves when everybody is there at once and all lengths are known."""
    span = float(work.arrival[-1])
    if not span:
        return 1.0
    result, _ = run(FIRST_COME_ORACLE, work.at_rate(float("inf")), machine, capacity, 0)
    return OVERLOAD * span / result.simulated_s if result.simulated_s else 1.0


def run(name: str, work: Workload, machine: Machine, capacity: int, seed: int, clock: str = "gpu") -> tuple[Row, Books]:
    """One policy on one workload."""
    pace = machine.pace(TARGET_S)
    policy, kind_of = policies.make(name, work, pace, capacity, seed)
    router = Router(policy, pace, MOST_RUNNING) if clock == "gpu" else Router(policy, None, len(work))
    began = time.monotonic()
    books = Server(work, router, machine if clock == "gpu" else StepClock(), capacity, kind_of).run()
    return row(name, work, books, capacity, time.monotonic() - began), books


def table(rows: Sequence[Row]) -> Table:
    shown = Table(
        "policy", "out tok/s", "memory", "paused", "recomputed", "TTFT p50", "p99", "in SLA", "steps", "x life"
    )
    for line in rows:
        shares = (f"{100 * share:.1f} %" for share in (line.memory_use, line.paused_share, line.recomputed_share))
        shown.add_row(
            line.policy,
            f"{line.output_tokens_per_s:,.0f}",
            *shares,
            f"{line.ttft_p50_s:.1f} s",
            f"{line.ttft_p99_s:.1f} s",
            f"{100 * line.in_sla_share:.1f} %",
            f"{line.steps:,}",
            f"{line.simulated_s / max(line.wall_s, 1e-9):,.0f}",
        )
    return shown


def _write(path: Path, rows: Sequence[Row], runs: dict[str, Books], capacity: int, title: str) -> None:
    path.write_text(json.dumps(msgspec.to_builtins(rows), indent=1) + "\n")
    try:
        served = {name: books for name, books in runs.items() if books.steps}
        if served:
            figures.draw(served, capacity, title, path.with_suffix(".png"))
    except ModuleNotFoundError:
        print("tokenllm: no picture, matplotlib is not installed (the load extra brings it)", file=sys.stderr)
