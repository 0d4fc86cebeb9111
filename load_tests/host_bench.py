"""What a step costs the scheduler's process beside the model: its own loop, scheduler and rings, and no model.

The runner makes up its tokens and waits two milliseconds for each step, awake, as one does that waits for a GPU; that
wait is not counted. Ring B is read by another process. It prints a table and leaves the numbers in
`load_tests/results/`.
"""

import argparse
import gc
import multiprocessing
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tokenllm.counters import Page, create_page
from tokenllm.engine.batch import Plan, Sampled
from tokenllm.memory.token_memory import TokenMemory
from tokenllm.messages import Inbound, Midway, Ready, Sampling, Submit
from tokenllm.ring import Receiver, RingFds, Sender, close_ring, create_ring
from tokenllm.routing.learned_pace import LearnedPace
from tokenllm.routing.lengths import Lengths
from tokenllm.routing.policy import make_policy
from tokenllm.routing.router import Router
from tokenllm.scheduler.loop import Loop
from tokenllm.scheduler.scheduler import Scheduler

RESULTS = Path(__file__).parent / "results"
RUNNING = (1, 64, 256, 1024)
PHASES = ("accept", "plan", "launch (fake)", "settle", "send", "rest")
PROMPT_TOKENS, CHUNK_TOKENS, CONTEXT, VOCAB, EOS = 32, 512, 8192, 128_256, 128_009
STEP_S, WARM_UP_STEPS = 0.002, 20


class Measurement(msgspec.Struct, frozen=True):
    """Microseconds per step."""

    running: int
    chunk_tokens: int  # of somebody's prompt, in every step
    phase: str
    p50_us: float
    p99_us: float


class FakeRunner:
    """Tokens are a hash of row and step, and never an EOS. `paced` steps take their time."""

    ahead = 1
    most_chunks = CHUNK_TOKENS
    most_context_tokens = 1 << 20
    compilations = 0

    def __init__(self) -> None:
        self.paced = False
        self._steps = 0

    def launch(self, plan: Plan) -> Sampled:
        self._steps += 1
        return Sampled((plan.sampling_rows * 7919 + self._steps * 104729) % EOS)

    def collect(self, flight: Sampled) -> Sampled:
        until = time.perf_counter() + self.paced * STEP_S
        while time.perf_counter() < until:
            pass
        return flight


class Stopwatch:
    """Where the time of each step goes."""

    def __init__(self) -> None:
        self.steps: list[Counter[str]] = []

    def watch(self, owner: Any, method: str, phase: str) -> None:
        """Count what calls of this method take, from now on, as time of that phase."""
        deed = getattr(owner, method)

        def timed(*arguments: Any) -> Any:
            began = time.perf_counter_ns()
            outcome = deed(*arguments)
            self.steps[-1][phase] += time.perf_counter_ns() - began
            return outcome

        setattr(owner, method, timed)

    def step(self, turn: Callable[[], bool]) -> None:
        """One turn of the loop; its rest is what no phase counted."""
        self.steps.append(Counter())
        began = time.perf_counter_ns()
        turn()
        everything = time.perf_counter_ns() - began
        self.steps[-1]["rest"] = everything - self.steps[-1].total()

    def us(self, phase: str) -> np.ndarray:
        return np.array([step[phase] for step in self.steps]) / 1e3


@contextmanager
def read_ring() -> Iterator[RingFds]:
    """A ring that another process reads as the detokenizer would."""
    ring = create_ring(1 << 24)
    fds = DupFd(ring.memory), DupFd(ring.bell)
    reader = multiprocessing.get_context("spawn").Process(target=read_all, args=fds, daemon=True)
    reader.start()
    try:
        yield ring
    finally:
        reader.kill()
        reader.join()
        close_ring(ring)


def read_all(memory: Any, bell: Any) -> None:
    receiver = Receiver[Midway](RingFds(memory.detach(), bell.detach()), Midway)
    while True:
        receiver.sleep(None)
        for _ in receiver.receive():
            pass


def submit(uid: int, prompt_tokens: int, max_tokens: int) -> Submit:
    return Submit(uid, np.zeros(prompt_tokens, "<i4").tobytes(), max_tokens, Sampling(seed=uid))


def make_scheduler(running: int) -> Scheduler:
    capacity, pace = (running + 4) * CONTEXT, LearnedPace(CHUNK_TOKENS)
    return Scheduler(
        TokenMemory(capacity),
        Router(make_policy("tokenllm", pace, capacity, Lengths()), pace, running + 4),
        rows=running + 4,
        max_positions=CONTEXT,
        prefill_chunk_tokens=CHUNK_TOKENS,
        most_chunks=CHUNK_TOKENS,
        most_context_tokens=1 << 20,
        max_queued_requests=running + 4,
        max_queued_tokens=capacity,
        eos_ids=frozenset({EOS}),
        pace=pace,
    )


def measure(running: int, chunk_tokens: int, steps: int, outbox: RingFds) -> list[Measurement]:
    """Fill the batch, then time steps in which everybody decodes, beside a prompt that is read in one step."""
    ring = create_ring(1 << 22)
    inbox, gateway = Receiver[Inbound](ring, Inbound), Sender[Inbound](ring)
    scheduler, runner, sender, stopwatch = make_scheduler(running), FakeRunner(), Sender[Midway](outbox), Stopwatch()
    loop = Loop(scheduler, runner, [inbox], sender, Page(create_page()), Ready(1, 1, 1))
    for uid in range(running):
        gateway.send(submit(uid, PROMPT_TOKENS, CONTEXT - PROMPT_TOKENS))
        loop.turn()
    runner.paced = True
    watched = (scheduler, "accept"), (scheduler, "plan"), (runner, "launch"), (scheduler, "settle"), (sender, "send")
    for (owner, method), phase in zip((*watched, (runner, "collect")), (*PHASES[:-1], "wait"), strict=True):
        stopwatch.watch(owner, method, phase)
    for number in range(WARM_UP_STEPS + steps):
        if chunk_tokens:
            gateway.send(submit(running + number, chunk_tokens, 1))
        stopwatch.step(loop.turn)
    assert scheduler.rows.running >= running, "somebody ended before the measurement did"
    close_ring(ring)
    del stopwatch.steps[:WARM_UP_STEPS]
    parts = {phase: stopwatch.us(phase) for phase in PHASES}
    return [summary(running, chunk_tokens, *part) for part in (*parts.items(), ("total", sum(parts.values())))]


def summary(running: int, chunk_tokens: int, phase: str, us: Any) -> Measurement:
    p50, p99 = np.percentile(us, (50, 99))
    return Measurement(running, chunk_tokens, phase, round(float(p50), 1), round(float(p99), 1))


def print_table(measurements: list[Measurement], steps: int) -> None:
    table = Table(title=f"host time of one step, p50 / p99 of {steps} steps, µs")
    for column in ("running", "chunk", *PHASES, "total"):
        table.add_column(column, justify="right")
    cases: dict[tuple[int, int], dict[str, str]] = {}
    for found in measurements:
        case = cases.setdefault((found.running, found.chunk_tokens), {})
        case[found.phase] = f"{found.p50_us:.0f} / {found.p99_us:.0f}"
    for (running, chunk_tokens), cells in cases.items():
        table.add_row(str(running), str(chunk_tokens or "-"), *(cells[phase] for phase in (*PHASES, "total")))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500, help="measured for each case")
    steps = parser.parse_args().steps
    cases = [(running, chunk_tokens) for chunk_tokens in (0, CHUNK_TOKENS) for running in RUNNING]
    gc.collect()
    gc.freeze()  # as the scheduler process does
    with read_ring() as outbox:
        rounds = [measure(*case, steps, outbox) for case in track(cases, description="measuring", transient=True)]
    measurements = [found for round_ in rounds for found in round_]
    print_table(measurements, steps)
    RESULTS.mkdir(exist_ok=True)
    machine = {"machine": platform.platform(), "python": platform.python_version(), "numpy": np.__version__}
    (RESULTS / "host_bench.json").write_bytes(msgspec.json.encode({**machine, "measurements": measurements}))
    Console().print(f"numbers: {RESULTS}/host_bench.json")


if __name__ == "__main__":
    main()
