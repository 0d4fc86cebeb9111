"""What a step costs the scheduler's process beside the model: its own loop, scheduler and rings, and no model.

The runner makes up its tokens and waits two milliseconds for each step, awake, as one does that waits for a GPU; that
wait is not counted. Ring B is read by another process. Three loads: everybody decodes; a closed loop, in which somebody
ends at nearly every step and somebody else is admitted; the same while a thousand wait. The last column compares each
with decoding alone, which says more than microseconds do on a machine that others use too. It prints a table and leaves
the numbers in `load_tests/results/`.
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
from tokenllm.engine.runner import all_of
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
RUNNING = (64, 256, 1024)
WAITING = 1000
PHASES = ("accept", "plan", "launch (fake)", "settle", "send", "rest")
PROMPT_TOKENS, CHUNK_TOKENS, CONTEXT, EOS = 256, 2048, 8192, 128_009
STEP_S, WARM_UP_STEPS = 0.002, 20


class Load(msgspec.Struct, frozen=True):
    """Requests for the whole measurement."""

    running: int
    turnover: bool  # one ends at each step, and another takes its row; otherwise all decode on and on
    waiting: int = 0

    @property
    def max_tokens(self) -> int:
        """A row stands idle for two steps between two requests, one ahead and one to settle."""
        return self.running - 2 if self.turnover else CONTEXT - PROMPT_TOKENS

    @property
    def name(self) -> str:
        if not self.turnover:
            return "decode"
        return f"closed loop, {self.waiting} wait" if self.waiting else "closed loop"


class Measurement(msgspec.Struct, frozen=True):
    """Microseconds per step."""

    load: Load
    phase: str
    p50_us: float
    p99_us: float


class FakeRunner:
    """Tokens are a hash of row and step, and never an EOS. `paced` steps take their time."""

    ahead = 1
    most_chunks = 64
    most_context_tokens = 1 << 20
    compilations = 0
    filled = staticmethod(all_of)

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


class Clients:
    """Send the next request for each that has ended. No two prompts begin alike."""

    def __init__(self, load: Load, gateway: Sender[Inbound]) -> None:
        self._load, self._gateway = load, gateway
        self._random, self._sent = np.random.default_rng(0), 0

    def send(self) -> None:
        prompt = self._random.integers(0, EOS, PROMPT_TOKENS, dtype="<i4")
        sampling = Sampling(seed=self._sent)
        self._gateway.send(Submit(self._sent, prompt.tobytes(), self._load.max_tokens, sampling))
        self._sent += 1

    def keep(self, known: int) -> None:
        for _ in range(self._load.running + self._load.waiting - known):
            self.send()


def make_scheduler(load: Load) -> Scheduler:
    capacity, pace = load.running * CONTEXT, LearnedPace(CHUNK_TOKENS)
    return Scheduler(
        TokenMemory(capacity),
        Router(make_policy("tokenllm", pace, capacity, Lengths()), pace, load.running),
        rows=load.running,
        max_positions=CONTEXT,
        prefill_chunk_tokens=CHUNK_TOKENS,
        most_chunks=FakeRunner.most_chunks,
        most_context_tokens=FakeRunner.most_context_tokens,
        max_queued_requests=load.running + load.waiting,
        max_queued_tokens=capacity,
        eos_ids=frozenset({EOS}),
        pace=pace,
    )


def measure(load: Load, steps: int, outbox: RingFds) -> list[Measurement]:
    """Fill the batch, one request at a step, and the queue; then time steps."""
    ring = create_ring(1 << 22)
    inbox, clients = Receiver[Inbound](ring, Inbound), Clients(load, Sender[Inbound](ring))
    scheduler, runner, sender, stopwatch = make_scheduler(load), FakeRunner(), Sender[Midway](outbox), Stopwatch()
    loop = Loop(scheduler, runner, [inbox], sender, Page(create_page()), Ready(1, 1, 1))
    for _ in range(load.running):
        clients.send()
        loop.turn()
    runner.paced = True
    watched = (scheduler, "accept"), (scheduler, "plan"), (runner, "launch"), (scheduler, "settle"), (sender, "send")
    for (owner, method), phase in zip((*watched, (runner, "collect")), (*PHASES[:-1], "wait"), strict=True):
        stopwatch.watch(owner, method, phase)
    for _ in range(WARM_UP_STEPS + steps):
        clients.keep(scheduler.rows.running + len(scheduler.waiting))
        stopwatch.step(loop.turn)
    assert scheduler.rows.running >= load.running - 4, "the batch was full all the time"
    close_ring(ring)
    del stopwatch.steps[:WARM_UP_STEPS]
    parts = {phase: stopwatch.us(phase) for phase in PHASES}
    return [summary(load, *part) for part in (*parts.items(), ("total", sum(parts.values())))]


def summary(load: Load, phase: str, us: Any) -> Measurement:
    p50, p99 = np.percentile(us, (50, 99))
    return Measurement(load, phase, round(float(p50), 1), round(float(p99), 1))


def print_table(measurements: list[Measurement], steps: int) -> None:
    table = Table(title=f"host time of one step, p50 of {steps} steps (total: p99 too), µs")
    for column in ("running", "load", *PHASES, "total", "to decoding"):
        table.add_column(column, justify="right")
    p50 = {(found.load, found.phase): found.p50_us for found in measurements}
    for whole in [found for found in measurements if found.phase == "total"]:
        load = whole.load
        cells = [f"{p50[load, phase]:.0f}" for phase in PHASES]
        times = whole.p50_us / p50[Load(load.running, turnover=False), "total"]
        total = f"{whole.p50_us:.0f} / {whole.p99_us:.0f}"
        table.add_row(str(load.running), load.name, *cells, total, f"{times:.1f}")
    Console().print(table)


def loads() -> list[Load]:
    kinds = (False, 0), (True, 0), (True, WAITING)
    return [Load(running, *kind) for running in RUNNING for kind in kinds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500, help="measured for each case")
    steps = parser.parse_args().steps
    gc.collect()
    gc.freeze()  # as the scheduler process does
    with read_ring() as outbox:
        rounds = [measure(load, steps, outbox) for load in track(loads(), description="measuring", transient=True)]
    measurements = [found for round_ in rounds for found in round_]
    print_table(measurements, steps)
    RESULTS.mkdir(exist_ok=True)
    machine = {"machine": platform.platform(), "python": platform.python_version(), "numpy": np.__version__}
    (RESULTS / "host_bench.json").write_bytes(msgspec.json.encode({**machine, "measurements": measurements}))
    Console().print(f"numbers: {RESULTS}/host_bench.json")


if __name__ == "__main__":
    main()
