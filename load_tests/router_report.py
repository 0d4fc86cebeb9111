"""Every policy on every load, for docs/scheduling.md: its table, and the frontier of memory use against pauses.

Writes the table between the markers in the document and the picture beside the others. Runs two processes; give the
folder of the full traces with --traces, else the samples of the tests stand in.
"""

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import msgspec
import numpy as np

from tokenllm.routing.lengths import Lengths
from tokenllm.routing.past_future import PastFuture
from tokenllm.routing.router import Router
from tokenllm.routing.tokenllm import TokenLLM
from tokenllm.simulate import mixes
from tokenllm.simulate.command import MOST_RUNNING, TARGET_S, default_capacity, load, overloading_rate, run
from tokenllm.simulate.flags import FIRST_COME_ORACLE, ORACLE, POLICIES
from tokenllm.simulate.machine import Machine
from tokenllm.simulate.results import Row, row
from tokenllm.simulate.server import Server

ROOT = Path(__file__).parent.parent
DOCUMENT, FRONTIER = ROOT / "docs/scheduling.md", ROOT / "docs/figures/scheduling-frontier.png"
BEGIN, END = "<!-- table: make router-report -->", "<!-- end of table -->"
NAMES = (*POLICIES, FIRST_COME_ORACLE, ORACLE)
PAUSED = (0.005, 0.01, 0.022, 0.05, 0.1)
RESERVES = (0.0, 0.03, 0.08, 0.15)
SEED = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=Path, help="folder of .csv and .jsonl traces")
    parser.add_argument("--requests", type=int, help="of each trace, the first so many")
    parser.add_argument("--json", type=Path, help="write all rows here")
    flags = parser.parse_args()
    began = time.monotonic()
    folder = flags.traces or ROOT / "tests/data"
    traces = sorted(str(path) for path in (*folder.glob("*.csv"), *folder.glob("*.jsonl")))
    loads = [*traces, *(f"synthetic:{name}" for name in mixes.MIXES)]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        points = [pool.submit(point, name, value) for name, value in frontier_points()]
        tables = list(pool.map(rows_of, loads, [flags.requests] * len(loads)))
        draw([each.result() for each in points])
    write(tables)
    if flags.json:
        flags.json.write_text(
            json.dumps({name: msgspec.to_builtins(rows) for name, _, rows in tables}, indent=1) + "\n"
        )
    print(f"{DOCUMENT} and {FRONTIER} in {time.monotonic() - began:.0f} s")


def rows_of(trace: str, requests: int | None) -> tuple[str, str, list[Row]]:
    """The load's name, what it is, and a row for each policy."""
    machine, work = Machine(), load(trace, SEED)
    if requests and not trace.startswith("synthetic:"):
        work = work.first(requests)
    capacity = default_capacity(trace, machine)
    rate = overloading_rate(work, machine, capacity)
    what = f"{len(work):,} requests, {capacity:,} tokens" + (f", {rate:.2f} times the rate" if rate != 1 else "")
    return work.name, what, [run(name, work.at_rate(rate), machine, capacity, SEED)[0] for name in NAMES]


def frontier_points() -> list[tuple[str, float]]:
    return [("tokenllm", value) for value in PAUSED] + [("past-future", value) for value in RESERVES]


def point(name: str, value: float) -> tuple[str, float, float, float]:
    """Mean memory use and paused share on dist1 to dist3, by how careful the policy is told to be."""
    results = [careful(name, value, mix) for mix in ("dist1", "dist2", "dist3")]
    uses, pauses = ([getattr(each, field) for each in results] for field in ("memory_use", "paused_share"))
    return name, value, float(np.mean(uses)), float(np.mean(pauses))


def careful(name: str, value: float, mix: str) -> Row:
    machine, work, capacity = Machine(), mixes.draw(mix, SEED, 600), mixes.MIXES[mix][2]
    pace, lengths = machine.pace(TARGET_S), Lengths()
    if name == "tokenllm":
        policy, kind_of = TokenLLM(lengths, pace, capacity, value), lengths.kind
    else:
        policy, kind_of = PastFuture(SEED, value), lambda group, most: 0
    books = Server(work, Router(policy, pace, MOST_RUNNING), machine, capacity, kind_of).run()
    return row(name, work, books, capacity, 0.0)


def write(tables: list[tuple[str, str, list[Row]]]) -> None:
    lines = [BEGIN, "| load | policy | out tok/s | of oracle | memory | paused | recomputed | TTFT p50, p99 | in SLA |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, what, rows in tables:
        for place, each in enumerate(rows):
            lines.append(f"| {f'**{name}** {what}' if not place else ''} | {cells(each, rows[-1])} |")
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    DOCUMENT.write_text(before + "\n".join([*lines, END]) + rest.partition(END)[2])


def cells(each: Row, oracle: Row) -> str:
    return " | ".join(
        (
            each.policy,
            f"{each.output_tokens_per_s:,.0f}",
            f"{each.output_tokens_per_s / oracle.output_tokens_per_s:.3f}",
            f"{100 * each.memory_use:.1f} %",
            f"{100 * each.paused_share:.1f} %",
            f"{100 * each.recomputed_share:.1f} %",
            f"{each.ttft_p50_s:.1f} s, {each.ttft_p99_s:.0f} s",
            f"{100 * each.in_sla_share:.1f} %",
        )
    )


def draw(points: list[tuple[str, float, float, float]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for name in ("tokenllm", "past-future"):
        _, values, uses, pauses = zip(*(each for each in points if each[0] == name), strict=True)
        axes.plot([100 * share for share in pauses], [100 * use for use in uses], "o-", label=name)
        for value, use, share in zip(values, uses, pauses, strict=True):
            axes.annotate(f"{value:g}", (100 * share, 100 * use), textcoords="offset points", xytext=(5, -9))
    axes.set(
        xlabel="requests paused, %",
        ylabel="memory use, %",
        title="dist1 to dist3, by share allowed and by reserve",
    )
    axes.legend()
    figure.savefig(FRONTIER, dpi=110)


if __name__ == "__main__":
    main()
