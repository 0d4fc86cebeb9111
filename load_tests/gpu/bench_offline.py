"""Throughput without HTTP: all requests of a workload at once, through the scheduler's own loop in this process,
greedy, end tokens ignored. Tells output tokens per second, and where the host's time goes in each kind of step.

    make bench-gpu BENCH=offline ARGS="tests/data/llama-3.1-8b-config.json load_tests/workloads/w1.json"
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import numpy as np

from driving import (
    PHASES,
    Drive,
    HostTime,
    Pair,
    Started,
    Turn,
    add_engine_flags,
    greedy,
    host_times,
    kind_of,
    percentiles,
    start,
)
from loadgen.workload import IdRange, Lengths, read_workload
from results import add_out_flag, keep, one_plot, open_console, table_of

IDS = IdRange(1000, 100_000)


@dataclass(frozen=True)
class Outcome:
    requests: int
    wall_s: float
    output_tokens: int
    output_tok_s: float
    steps: int
    steps_with_prompts: int
    mean_batch: float
    wait_share: float  # of the wall: the host waited for the device
    step_ms: dict[str, Pair]  # by kind of the collected step: p50, p99


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_flags(parser, running=1024, chunk_tokens=2048)
    parser.add_argument("workload", type=Path, help="JSON with lengths of prompt and answer")
    parser.add_argument("--requests", type=int, help="default: one for each of its lengths")
    add_out_flag(parser)
    return parser.parse_args()


def read_lengths(path: Path) -> Lengths:
    match read_workload(path, IDS, 1):
        case Lengths() as workload:
            return workload
        case _:
            raise SystemExit(f"{path}: wants lengths, not conversations")


def run(started: Started, workload: Lengths, requests: int) -> tuple[Outcome, list[Turn]]:
    drive = Drive(started)
    prompts = [workload.prompt(number) for number in range(requests)]
    drive.submit(greedy(uid, prompt.ids, prompt.output_tokens) for uid, prompt in enumerate(prompts))
    wall_s = drive.run()
    turns = drive.meter.turns
    assert drive.ends.ended == len(prompts), f"{drive.ends.ended} of {len(prompts)} requests came to an end"
    return outcome(turns, len(prompts), drive.ends.output_tokens, wall_s), turns


def outcome(turns: Sequence[Turn], requests: int, output_tokens: int, wall_s: float) -> Outcome:
    plans = [turn.launched for turn in turns if turn.launched]
    kinds = {kind_of(plan) for plan in plans}
    return Outcome(
        requests=requests,
        wall_s=wall_s,
        output_tokens=output_tokens,
        output_tok_s=output_tokens / wall_s,
        steps=len(plans),
        steps_with_prompts=sum(bool(plan.chunks) for plan in plans),
        mean_batch=float(np.mean([len(plan.sampling_rows) for plan in plans])),
        wait_share=sum(turn.seconds["wait"] for turn in turns) / wall_s,
        step_ms={
            kind: percentiles((t.total_s for t in turns if t.collected and kind_of(t.collected) == kind), 1e3)
            for kind in sorted(kinds)
        },
    )


def show(found: Outcome, hosts: list[HostTime], turns: Sequence[Turn], started: Started, out: Path, name: str) -> None:
    console = open_console()
    title = f"{name}: {found.output_tok_s:,.0f} output tok/s"
    headings = ("requests", "wall s", "output tok", "steps", "with prompts", "mean batch", "waits for GPU", "KV tokens")
    row = (found.requests, found.wall_s, found.output_tokens, found.steps, found.steps_with_prompts, found.mean_batch)
    console.print(table_of(title, headings, [(*row, f"{found.wait_share:.1%}", started.engine.kv_tokens)]))
    console.print(table_of("step, ms", ("kind", "p50", "p99"), [(k, *ms) for k, ms in found.step_ms.items()]))
    cells = [(h.kind, h.steps, *(_both(h.phases[phase]) for phase in (*PHASES, "host"))) for h in hosts]
    console.print(table_of("host time of a step, p50 / p99 µs", ("kind", "steps", *PHASES, "all"), cells))
    measured = asdict(found) | {"host": msgspec.to_builtins(hosts), "start_s": started.start_s}
    measured |= {"kv_tokens": started.engine.kv_tokens, "turns": [_trace(turn) for turn in turns]}
    figure, axes = one_plot(title, width=12)
    at = np.cumsum([turn.total_s for turn in turns])
    axes.plot(at, [turn.total_s * 1e3 for turn in turns], ".", markersize=3, label="step, ms")
    axes.plot(at, [turn.host_s * 1e3 for turn in turns], ".", markersize=3, label="of it the host's, ms")
    axes.set(xlabel="s", ylabel="ms", yscale="log")
    batch = axes.twinx()
    batch.plot(at, [len(turn.launched.sampling_rows) if turn.launched else 0 for turn in turns], "k-", alpha=0.4)
    batch.set_ylabel("rows that sample (line)")
    axes.legend(fontsize="small")
    keep(out, f"gpu-offline-{name}", measured, figure)


def _both(pair: Pair) -> str:
    return "-" if pair[0] is None or pair[1] is None else f"{pair[0]:.0f} / {pair[1]:.0f}"


def _trace(turn: Turn) -> dict[str, int]:
    """For whoever wants to look closer: microseconds, rows and prompt tokens."""
    plan = turn.launched
    sizes = {"decodes": len(plan.decodes.rows), "prompt_tokens": plan.tokens - len(plan.decodes.rows)} if plan else {}
    return sizes | {"total": round(turn.total_s * 1e6)} | {k: round(s * 1e6) for k, s in turn.seconds.items()}


def main() -> None:
    arguments = parse_arguments()
    workload = read_lengths(arguments.workload)
    started = start(arguments, max(prompt + output for prompt, output in workload.lengths))
    found, turns = run(started, workload, arguments.requests or len(workload.lengths))
    name = f"{arguments.config.stem}-{workload.name}"
    show(found, host_times(turns), turns, started, arguments.out, name)


if __name__ == "__main__":
    main()
