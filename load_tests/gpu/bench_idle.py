"""How much of the time the GPU does nothing while there is work for it: kernels of many steps in the middle of a
workload as torch.profiler sees them, the gaps in the union of their intervals, and the time each kernel takes a step.

    make bench-gpu BENCH=idle ARGS="tests/data/llama-3.1-8b-config.json load_tests/workloads/w1.json"
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench_offline import read_lengths
from driving import Drive, add_engine_flags, greedy, kind_of, start
from results import add_out_flag, keep, one_plot, open_console, table_of

LONG_GAP_US = 10.0  # longer than the pause between two kernels of a graph: the device waits for the host


@dataclass(frozen=True)
class Work:
    """One thing the device did."""

    name: str
    start_us: float
    end_us: float


@dataclass(frozen=True)
class KernelTime:
    name: str
    us_per_step: float
    calls_per_step: float
    share: float  # of the time of all


@dataclass(frozen=True)
class Idle:
    steps: int
    steps_with_prompts: int
    span_ms: float
    gaps_share: float
    long_gaps_share: float  # of the span, in gaps longer than LONG_GAP_US
    long_gaps: int
    longest_gap_us: float


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_flags(parser, running=1024, chunk_tokens=2048)
    parser.add_argument("workload", type=Path, help="JSON with lengths of prompt and answer")
    parser.add_argument("--before", type=int, default=60, help="steps before the profile; default: %(default)s")
    parser.add_argument("--steps", type=int, default=200, help="in the profile; default: %(default)s")
    add_out_flag(parser)
    return parser.parse_args()


def profiled(drive: Drive, steps: int, activity: ProfilerActivity, device: DeviceType) -> list[Work]:
    with profile(activities=[activity]) as found:
        drive.run(steps)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    assert found.profiler and found.profiler.kineto_results, "the profiler was on"
    events = found.profiler.kineto_results.events()  # ten times quicker than `events()` of the profile itself
    work = [
        Work(event.name(), event.start_ns() / 1e3, (event.start_ns() + event.duration_ns()) / 1e3)
        for event in events
        if event.device_type() == device and not event.is_user_annotation()
    ]
    return sorted(work, key=lambda done: done.start_us)


def gaps_us(work: Sequence[Work]) -> list[float]:
    """Between the intervals in which anything runs."""
    gaps, until = [], work[0].end_us
    for done in work:
        if done.start_us > until:
            gaps.append(done.start_us - until)
        until = max(until, done.end_us)
    return gaps


def idle(work: Sequence[Work], steps: int, with_prompts: int) -> Idle:
    gaps = gaps_us(work)
    span = max(done.end_us for done in work) - work[0].start_us
    long = [gap for gap in gaps if gap > LONG_GAP_US]
    return Idle(steps, with_prompts, span / 1e3, sum(gaps) / span, sum(long) / span, len(long), max(gaps, default=0.0))


def kernel_times(work: Sequence[Work], steps: int) -> list[KernelTime]:
    """The longest first."""
    us: defaultdict[str, list[float]] = defaultdict(list)
    for done in work:
        us[done.name].append(done.end_us - done.start_us)
    everything = sum(map(sum, us.values()))
    times = [
        KernelTime(name, sum(took) / steps, len(took) / steps, sum(took) / everything) for name, took in us.items()
    ]
    return sorted(times, key=lambda time: -time.us_per_step)


def show(found: Idle, times: Sequence[KernelTime], drive: Drive, arguments: argparse.Namespace) -> None:
    console = open_console()
    title = f"{arguments.config.stem}, {found.steps} steps ({found.steps_with_prompts} with prompts) at saturation"
    row = (f"{found.gaps_share:.2%}", f"{found.long_gaps_share:.2%}", found.long_gaps, found.longest_gap_us)
    headings = ("span ms", "ms a step", "idle", f"in gaps over {LONG_GAP_US:.0f} µs", "such gaps", "longest µs")
    console.print(table_of(title, headings, [(f"{found.span_ms:.1f}", found.span_ms / found.steps, *row)]))
    cells = [(t.name[:90], t.us_per_step, t.calls_per_step, f"{t.share:.1%}") for t in times[:25]]
    console.print(table_of("kernels", ("name", "µs a step", "calls a step", "share"), cells))
    figure, axes = one_plot(title, width=12)
    axes.barh([t.name[:60] for t in times[:15]], [t.us_per_step for t in times[:15]])
    axes.invert_yaxis()
    axes.set_xlabel("µs a step")
    batches = [len(turn.launched.sampling_rows) for turn in drive.meter.turns[-found.steps :] if turn.launched]
    measured = asdict(found) | {"mean_batch": float(np.mean(batches)), "kernels": [asdict(t) for t in times]}
    keep(arguments.out, f"gpu-idle-{arguments.config.stem}", measured, figure)


def main() -> None:
    arguments = parse_arguments()
    workload = read_lengths(arguments.workload)
    started = start(arguments, max(prompt + output for prompt, output in workload.lengths))
    drive = Drive(started)
    prompts = [workload.prompt(number) for number in range(len(workload.lengths))]
    drive.submit(greedy(uid, prompt.ids, prompt.output_tokens) for uid, prompt in enumerate(prompts))
    drive.run(arguments.before)
    there = arguments.device == "cuda"
    activity = ProfilerActivity.CUDA if there else ProfilerActivity.CPU
    work = profiled(drive, arguments.steps, activity, DeviceType.CUDA if there else DeviceType.CPU)
    plans = [turn.launched for turn in drive.meter.turns[arguments.before :] if turn.launched]
    found = idle(work, len(plans), sum(kind_of(plan) != "decode" for plan in plans))
    show(found, kernel_times(work, len(plans)), drive, arguments)


if __name__ == "__main__":
    main()
