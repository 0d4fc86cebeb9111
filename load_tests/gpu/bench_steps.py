"""Time of a full decode step by batch and context, against the floor: weights and KV memory read once, at the rate this
card reads in the same run. Prompts are really computed, so that KV memory holds what it would; slots are scattered.

    make bench-gpu BENCH=steps ARGS="tests/data/llama-3.1-8b-config.json"
    make bench-gpu BENCH=steps ARGS="tests/data/llama-3.2-1b-config.json --batches 1,32,128 --contexts 1024,4096"
"""

import argparse
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from driving import Meter, MeteredRunner, Started, add_engine_flags, percentiles, start
from results import add_out_flag, keep, limits_line, one_plot, open_console, table_of
from timing import Limits, limits
from tokenllm.engine.batch import Chunk, Column, Decodes, Plan
from tokenllm.engine.start import BatchSize
from tokenllm_kernels import LogitsRule

WARM_UP_STEPS = 10


@dataclass(frozen=True)
class StepTime:
    batch: int
    context: int  # mean over the steps
    ms: float | None  # median; none where KV memory is too small
    p99_ms: float | None
    floor_ms: float
    launch_us: float | None = None  # host time, waiting not counted
    collect_us: float | None = None
    wait_us: float | None = None

    @property
    def ratio(self) -> float | None:
        return self.ms / self.floor_ms if self.ms else None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_flags(parser, running=1024, chunk_tokens=2048)
    parser.add_argument("--batches", default="1,8,32,64,128,256,512,1024", help="default: %(default)s")
    parser.add_argument("--contexts", default="1024", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=100, help="measured for each; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="batches 1, 32 and 256, 50 steps")
    add_out_flag(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.batches, arguments.steps = "1,32,256", 50
    return arguments


class Rows:
    """Rows whose prompts are computed, with slots for all positions up to `positions`."""

    def __init__(self, count: int, positions: int, started: Started) -> None:
        draw = np.random.default_rng(0)
        order = draw.permutation(started.engine.kv_tokens)[: count * positions].astype(np.int32)
        self.slots = order.reshape(count, positions)
        self._ids = draw.integers(0, started.description.vocab_size, (count, positions), np.int32)

    def prompts(self, tokens: int, size: BatchSize, most_chunks: int) -> Iterator[Plan]:
        """So many tokens of every row, in full steps."""
        chunks, room = [], size.prompt_tokens
        for row in range(len(self.slots)):
            first = 0
            while first < tokens:
                end = min(first + room, tokens)
                chunks.append(self._chunk(row, first, end, tokens))
                room -= end - first
                first = end
                if not room or len(chunks) == most_chunks:
                    yield Plan(Decodes.none(), tuple(chunks))
                    chunks, room = [], size.prompt_tokens
        if chunks:
            yield Plan(Decodes.none(), tuple(chunks))

    def _chunk(self, row: int, first: int, end: int, tokens: int) -> Chunk:
        rule = LogitsRule(seed=row, temperature=0.0)
        slots, ids = self.slots[row, first:end], self._ids[row, first:end]
        return Chunk(row, first, slots, ids, end == tokens, rule, None)

    def decode(self, batch: int, position: int) -> Plan:
        rows: Column = np.arange(batch, dtype=np.int32)
        return Plan(Decodes(rows, np.full(batch, position, np.int32), self.slots[:batch, position].copy()))


def drive(runner: MeteredRunner, plans: Iterator[Plan], meter: Meter) -> None:
    """As the scheduler's loop does: the next step is launched before the last is collected."""
    flights: deque[Any] = deque()
    with meter.waiting_counted():
        for plan in plans:
            with meter.turn():
                flights.append(runner.launch(plan))
                if len(flights) > runner.ahead:
                    runner.collect(flights.popleft())
        while flights:
            runner.collect(flights.popleft())


def measure(started: Started, rows: Rows, batch: int, context: int, steps: int, floor_ms: float) -> StepTime:
    meter = Meter()
    first = max(1, context - steps // 2 - WARM_UP_STEPS)
    plans = (rows.decode(batch, first + step) for step in range(WARM_UP_STEPS + steps))
    drive(meter.runner(started.engine.runner), plans, meter)
    turns = meter.turns[WARM_UP_STEPS:]
    ms, p99_ms = percentiles((turn.total_s for turn in turns), 1e3)
    launch, collect, wait = (median(turn.seconds[p] for turn in turns) * 1e6 for p in ("launch", "collect", "wait"))
    return StepTime(batch, context, ms, p99_ms, floor_ms, launch, collect, wait)


def positions_for(context: int, steps: int) -> int:
    return max(1, context - steps // 2 - WARM_UP_STEPS) + WARM_UP_STEPS + steps


def measure_context(started: Started, batches: list[int], context: int, steps: int, read: float) -> Iterator[StepTime]:
    """All batches of one context, the largest that fit first computing the prompts of all."""
    positions = positions_for(context, steps)
    most = started.engine.kv_tokens // positions
    fitting = [batch for batch in batches if batch <= most]
    rows = Rows(max(fitting, default=0), positions, started)
    prompt_tokens = max(1, context - steps // 2 - WARM_UP_STEPS)
    meter = Meter()
    plans = rows.prompts(prompt_tokens, started.engine.batch, started.engine.runner.most_chunks)
    drive(meter.runner(started.engine.runner), plans, meter)
    for batch in batches:
        floor_ms = (started.weight_bytes + batch * context * started.kv_bytes_per_token) / read / 1e9
        if batch in fitting:
            yield measure(started, rows, batch, context, steps, floor_ms)
        else:
            yield StepTime(batch, context, None, None, floor_ms)


def show(times: list[StepTime], started: Started, found: Limits, arguments: argparse.Namespace) -> None:
    console = open_console()
    title = f"decode steps of {arguments.config.stem}, {arguments.steps} each; KV for {started.engine.kv_tokens} tokens"
    headings = ("batch", "context", "ms p50", "p99", "floor ms", "ratio", "launch µs", "collect µs", "wait µs")
    rows = [
        (t.batch, t.context, t.ms, t.p99_ms, t.floor_ms, t.ratio, t.launch_us, t.collect_us, t.wait_us) for t in times
    ]
    console.print(table_of(title, headings, rows))
    console.print(limits_line(found), highlight=False)
    figure, axes = one_plot(title)
    for context in dict.fromkeys(t.context for t in times):
        those = [t for t in times if t.context == context and t.ms]
        (line,) = axes.plot([t.batch for t in those], [t.ms or 0 for t in those], "o-", label=f"context {context}")
        floors = [t.floor_ms for t in those]
        axes.plot([t.batch for t in those], floors, "--", color=line.get_color(), label="floor")
    axes.set(xlabel="batch", ylabel="ms per step", xscale="log", yscale="log")
    axes.legend(fontsize="small")
    measured = {"limits": found.as_dict(), "kv_tokens": started.engine.kv_tokens, "start_s": started.start_s}
    steps = [asdict(t) | {"ratio": t.ratio} for t in times]
    keep(arguments.out, f"gpu-steps-{arguments.config.stem}", measured | {"steps": steps}, figure)


def main() -> None:
    arguments = parse_arguments()
    batches, contexts = ([int(n) for n in text.split(",")] for text in (arguments.batches, arguments.contexts))
    arguments.max_running_requests = max(batches)
    found = limits()
    started = start(arguments, max(positions_for(context, arguments.steps) for context in contexts))
    times = [
        time
        for context in contexts
        for time in measure_context(started, batches, context, arguments.steps, found.read_tb_s)
    ]
    if arguments.device == "cuda":
        torch.cuda.synchronize()
    show(times, started, found, arguments)


if __name__ == "__main__":
    main()
