"""The engine in one process, without rings and HTTP: a dummy model, the real scheduler and its loop, and a meter that
says where the host's time goes.
"""

import argparse
import gc
import random
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

import msgspec
import numpy as np
from rich.progress import track

from model_folder import write_model_folder
from tokenllm.checkpoint.description import ModelDescription, describe
from tokenllm.config import ServeConfig
from tokenllm.counters import Page, create_page
from tokenllm.engine.batch import Plan, Sampled
from tokenllm.engine.cuda_runner import Staging
from tokenllm.engine.runner import Runner
from tokenllm.engine.start import Engine, start_engine
from tokenllm.messages import Inbound, Midway, Ready, Sampling, Step, Submit
from tokenllm.models.weights import Track
from tokenllm.ring import Receiver, Sender
from tokenllm.routing.lengths import Lengths
from tokenllm.scheduler.__main__ import scheduler_for
from tokenllm.scheduler.loop import Loop

R = TypeVar("R")
Pair: TypeAlias = tuple[float | None, float | None]  # p50 and p99; none of nothing

BYTES_PER_ID = 4


def add_engine_flags(parser: argparse.ArgumentParser, running: int, chunk_tokens: int) -> None:
    add = parser.add_argument
    add("config", type=Path, help="config.json of the model's shape; its weights are random")
    add("--device", default="cuda", choices=["cuda", "cpu"], help="default: %(default)s")
    add("--max-running-requests", type=int, default=running, help="default: %(default)s")
    add("--prefill-chunk-tokens", type=int, default=chunk_tokens, help="default: %(default)s")


@dataclass(frozen=True)
class Started:
    """An engine with random weights."""

    engine: Engine
    config: ServeConfig
    description: ModelDescription
    start_s: float

    @property
    def itemsize(self) -> int:
        return 2 if self.config.device == "cuda" else 4

    @property
    def weight_bytes(self) -> int:
        """What one step reads of the weights; of the embedding only rows."""
        return matrix_elements(self.description) * self.itemsize

    @property
    def kv_bytes_per_token(self) -> int:
        d = self.description
        return d.layers * d.kv_heads * 2 * d.head_dim * self.itemsize


def matrix_elements(d: ModelDescription) -> int:
    """Of all that a token is multiplied with, the head included."""
    return layer_elements(d) + d.vocab_size * d.hidden_size


def layer_elements(d: ModelDescription) -> int:
    attention = (2 * d.heads + 2 * d.kv_heads) * d.head_dim * d.hidden_size
    return d.layers * (attention + 3 * d.hidden_size * d.intermediate_size)


def start(arguments: argparse.Namespace, max_model_len: int) -> Started:
    config = ServeConfig(
        model=str(arguments.config),
        device=arguments.device,
        load_format="dummy",
        max_running_requests=arguments.max_running_requests,
        prefill_chunk_tokens=arguments.prefill_chunk_tokens,
        max_model_len=max_model_len,
    )
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = write_model_folder(arguments.config, Path(folder))
        engine = start_engine(config, path, _progress)
        description = describe(path)
    gc.collect()
    gc.freeze()  # as the scheduler process does
    return Started(engine, config, description, time.monotonic() - began)


def _progress(doing: str) -> Track[int]:
    return lambda parts: iter(track(parts, description=doing, transient=True))


@dataclass
class Turn:
    """One turn of a loop, in seconds. A phase is without the phases inside it; `wait` is for the GPU."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    total_s: float = 0.0
    launched: Plan | None = None
    collected: Plan | None = None

    @property
    def host_s(self) -> float:
        return self.total_s - self.seconds["wait"]


class Meter:
    """Measures the turns of a loop, by phases."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self._turn = Turn()
        self._inner_s = 0.0  # of the phase under way: what phases inside it took

    def timing(self, phase: str, deed: Callable[..., R]) -> Callable[..., R]:
        def timed(*arguments: Any) -> R:
            outer_s, self._inner_s = self._inner_s, 0.0
            began = time.perf_counter()
            try:
                return deed(*arguments)
            finally:
                elapsed = time.perf_counter() - began
                self._turn.seconds[phase] += elapsed - self._inner_s
                self._inner_s = outer_s + elapsed

        return timed

    def watch(self, owner: Any, phase: str, method: str = "") -> None:
        name = method or phase
        setattr(owner, name, self.timing(phase, getattr(owner, name)))

    @contextmanager
    def turn(self) -> Iterator[Turn]:
        self._turn, self._inner_s = Turn(), 0.0
        began = time.perf_counter()
        yield self._turn
        self._turn.total_s = time.perf_counter() - began
        self._turn.seconds["rest"] = self._turn.total_s - self._inner_s
        self.turns.append(self._turn)

    @contextmanager
    def waiting_counted(self) -> Iterator[None]:
        """Waiting for the device is a phase of its own."""
        wait = Staging.wait
        Staging.wait = self.timing("wait", wait)
        try:
            yield
        finally:
            Staging.wait = wait

    def runner(self, runner: Runner[Any]) -> "MeteredRunner":
        return MeteredRunner(self, runner)

    def note_launch(self, plan: Plan) -> None:
        self._turn.launched = plan

    def note_collect(self, plan: Plan) -> None:
        self._turn.collected = plan


class MeteredRunner:
    """Passes everything on, and notes what it was."""

    def __init__(self, meter: Meter, runner: Runner[Any]) -> None:
        self.ahead, self.most_chunks = runner.ahead, runner.most_chunks
        self.most_context_tokens, self.filled = runner.most_context_tokens, runner.filled
        self._runner, self._meter = runner, meter
        self._launch = meter.timing("launch", runner.launch)
        self._collect = meter.timing("collect", runner.collect)
        self._in_flight: deque[Plan] = deque()

    @property
    def compilations(self) -> int:
        return self._runner.compilations

    def launch(self, plan: Plan) -> Any:
        self._meter.note_launch(plan)
        self._in_flight.append(plan)
        return self._launch(plan)

    def collect(self, flight: Any) -> Sampled:
        self._meter.note_collect(self._in_flight.popleft())
        return self._collect(flight)


@dataclass
class LocalEnds:
    """Both ends of the rings: what is put into `inbound` is received, and what is sent is counted."""

    inbound: list[Inbound] = field(default_factory=list)
    output_tokens: int = 0
    ended: int = 0

    def receive(self) -> list[Inbound]:
        arrived, self.inbound = self.inbound, []
        return arrived

    def send(self, message: Midway) -> None:
        match message:
            case Step(ids=ids, finished=finished):
                self.output_tokens += len(ids) // BYTES_PER_ID
                self.ended += int(np.count_nonzero(finished))
            case _ if type(message).__name__ == "Refused":
                raise AssertionError(f"the scheduler refused a request of the benchmark: {message}")


class Drive:
    """The scheduler's own loop over an engine, metered."""

    def __init__(self, started: Started) -> None:
        engine = started.engine
        self.meter, self.ends = Meter(), LocalEnds()
        config = ServeConfig(max_queued_requests=1 << 20, max_queued_tokens=1 << 30)
        scheduler = scheduler_for(config, engine, Lengths())
        for phase in ("accept", "plan", "settle"):
            self.meter.watch(scheduler, phase)
        self.meter.watch(self.ends, "send")
        inbox, outbox = cast(Receiver[Inbound], self.ends), cast(Sender[Midway], self.ends)
        runner = self.meter.runner(engine.runner)
        self._loop = Loop(scheduler, runner, [inbox], outbox, Page(create_page()), Ready(1, 1, 1))

    def submit(self, requests: Iterable[Submit]) -> None:
        self.ends.inbound += requests

    def run(self, turns: int | None = None) -> float:
        """Seconds until there is nothing left to do, or so many turns are done."""
        began = time.perf_counter()
        with self.meter.waiting_counted():
            while turns is None or turns > 0:
                with self.meter.turn():
                    more = self._loop.turn()
                if not more:
                    break
                turns = None if turns is None else turns - 1
        return time.perf_counter() - began


def greedy(uid: int, prompt: Sequence[int], max_tokens: int) -> Submit:
    ids = np.array(prompt, "<i4").tobytes()
    return Submit(uid, ids, max_tokens, Sampling(seed=uid, temperature=0.0), ignore_eos=True)


def random_prompt(seed: int, tokens: int, vocab_size: int) -> list[int]:
    return random.Random(seed).choices(range(vocab_size), k=tokens)


def percentiles(values: Iterable[float], scale: float) -> Pair:
    found = [value * scale for value in values]
    return (float(np.percentile(found, 50)), float(np.percentile(found, 99))) if found else (None, None)


class HostTime(msgspec.Struct, frozen=True):
    """Microseconds of one kind of step, p50 and p99 by phase."""

    kind: str
    steps: int
    phases: dict[str, Pair]


PHASES = ("accept", "plan", "launch", "collect", "settle", "send", "rest")


def host_times(turns: Sequence[Turn]) -> list[HostTime]:
    """Of decode steps and of those that carry prompts, by what was launched."""
    kinds: dict[str, list[Turn]] = {"decode": [], "mixed": [], "prefill": []}
    for turn in turns:
        if turn.launched:
            kinds[kind_of(turn.launched)].append(turn)
    return [HostTime(kind, len(those), _phases(those)) for kind, those in kinds.items() if those]


def _phases(turns: Sequence[Turn]) -> dict[str, Pair]:
    found = {phase: percentiles((turn.seconds[phase] for turn in turns), 1e6) for phase in PHASES}
    return found | {"host": percentiles((turn.host_s for turn in turns), 1e6)}


def kind_of(plan: Plan) -> str:
    return "decode" if not plan.chunks else "mixed" if len(plan.decodes.rows) else "prefill"
