"""What the gateway costs: everything of the server is real but the engine, which says words as fast as they are read.

Measured are the time to the first token that the server adds; how many chunks a core of a gateway writes where each
token is one, against a bare ASGI application on the same HTTP server; tokens per second where an endless supply of
them joins into longer chunks, for each number of gateway processes; and how late the event loop is while prompts of
1 MB are tokenized. Prints tables, and leaves the numbers and a plot in `load_tests/results/`.
"""

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import msgspec
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from loadgen.processes import Child, answers, free_port, process_name
from loadgen.raw import Readers, connect, http_request, total
from loadgen.report import machine_name, now, open_console
from tokenllm.config import ServeConfig

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SERVE, BARE = HERE / "gateway" / "serve.py", HERE / "gateway" / "bare.py"
FREE = 1_000_000  # a seed from here on asks the fake engine for as many tokens as are read
ENDLESS = 1 << 20
SETTLE_S = 1.0  # for all streams to begin
PROMPT_BYTES = 1_000_000
PROBE_PAUSE_S = 0.002
GATEWAY, DETOKENIZER, ENGINE, BARE_SERVER = "tokenllm.gateway", "tokenllm.detokenizer", "fake_engine.py", "bare.py"


class Times(msgspec.Struct, frozen=True):
    """Milliseconds."""

    p50: float
    p99: float
    samples: int


class Flow(msgspec.Struct, frozen=True):
    """Streams that were read for a while. `cores` are those that each kind of process used."""

    name: str
    gateways: int
    streams: int
    tokens_per_s: float
    chunks_per_s: float
    bytes_per_s: float
    cores: dict[str, float]

    @property
    def chunks_per_core(self) -> float:
        return self.chunks_per_s / self.cores[BARE_SERVER if BARE_SERVER in self.cores else GATEWAY]


class Figures(msgspec.Struct, frozen=True):
    measured_at: str
    machine: str
    first_token: Times
    one_chunk_per_token: list[Flow]
    joined: list[Flow]
    health_idle: Times
    health_while_tokenizing: Times
    tokenized_mb_per_s: float


class CpuClock:
    """The processor time of a process and its descendants, noted again and again in a thread. A context manager."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._at_s: list[float] = []
        self._used_s: dict[str, list[float]] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._note)

    def __enter__(self) -> "CpuClock":
        self._processes = [self._root, *self._root.children(recursive=True)]
        self._names = [process_name(process.cmdline()) for process in self._processes]
        self._used_s = {name: [] for name in self._names}
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._ended.set()
        self._thread.join()

    def _note(self) -> None:
        while not self._ended.wait(0.05):
            used = dict.fromkeys(self._used_s, 0.0)
            for name, process in zip(self._names, self._processes, strict=True):
                used[name] += sum(process.cpu_times()[:2])
            self._at_s.append(time.monotonic())
            for name, seconds in used.items():
                self._used_s[name].append(seconds)

    def cores(self, start_s: float, end_s: float) -> dict[str, float]:
        ends = {name: np.interp([start_s, end_s], self._at_s, used) for name, used in self._used_s.items()}
        return {name: float(end - start) / (end_s - start_s) for name, (start, end) in ends.items()}


class Bench:
    """One call of this script: its readers, its model and how long it measures each thing."""

    def __init__(self, options: argparse.Namespace, readers: Readers, folder: Path, console: Console) -> None:
        self.options = options
        self.readers = readers
        self.folder = folder
        self.console = console

    @contextmanager
    def served(self, gateways: int) -> Iterator[tuple[int, Child]]:
        port = free_port()
        config = ServeConfig(
            model=str(self.folder),
            served_model_name="fake",
            load_format="dummy",
            port=port,
            gateway_processes=gateways,
            drain_s=0.0,
        )
        log = self.folder / f"gateways-{gateways}.log"
        with Child([sys.executable, str(SERVE), msgspec.json.encode(config).decode()], log) as server:
            ready = f"http://127.0.0.1:{port}/health/ready"
            server.wait_until_ready(ready)
            while not all(answers(ready) for _ in range(4 * gateways)):  # each connection meets any of the gateways
                time.sleep(0.05)
            yield port, server

    @contextmanager
    def bare(self, event: bytes) -> Iterator[tuple[int, Child]]:
        port = free_port()
        command = [sys.executable, str(BARE), str(port), event.decode(), str(self.options.pace)]
        with Child(command, self.folder / "bare.log") as server:
            while not _listens(port):
                time.sleep(0.02)
            yield port, server

    def flow(self, name: str, server: tuple[int, Child], request: bytes, streams: int, gateways: int = 1) -> Flow:
        port, child = server
        end_s = time.monotonic() + SETTLE_S + self.options.seconds
        start_s = end_s - self.options.seconds
        with CpuClock(child.process.pid) as clock:
            parts = [part.result() for part in self.readers.streams(port, request, streams, end_s)]
        tokens, events, size = (total(parts, column, start_s, end_s) for column in ("tokens", "events", "bytes"))
        seconds = self.options.seconds
        cores = clock.cores(start_s, end_s)
        flow = Flow(name, gateways, streams, tokens / seconds, events / seconds, size / seconds, cores)
        self.console.print(f"{name}: {flow.chunks_per_s:,.0f} chunks/s", style="dim", highlight=False)
        return flow


def _listens(port: int) -> bool:
    try:
        connect(port).close()
    except ConnectionRefusedError:
        return False
    return True


def main() -> int:
    options, console = _options(), open_console()
    with tempfile.TemporaryDirectory() as name, Readers(options.clients) as readers:
        bench = Bench(options, readers, write_model(Path(name)), console)
        figures = measure(bench)
    show(console, figures)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "gateway.json").write_bytes(msgspec.json.encode(figures))
    plot(figures, RESULTS / "gateway.png")
    console.print(f"numbers and plot: {RESULTS}/gateway.json, {RESULTS}/gateway.png", highlight=False)
    return 0


def _options() -> argparse.Namespace:
    cores = os.cpu_count() or 1
    usual = [str(count) for count in (1, 2, 4, 8) if count == 1 or 2 * count <= cores]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gateway-processes", default=",".join(usual), help="numbers with commas")
    parser.add_argument("--streams", type=int, default=128, help="for each gateway process, up to 512 in all")
    parser.add_argument("--pace", type=int, default=60, help="tokens per second and stream where each is a chunk")
    parser.add_argument("--seconds", type=float, default=3.0, help="that each thing is measured")
    parser.add_argument("--rounds", type=int, default=2, help="of one chunk per token, in turns with the bare server")
    parser.add_argument("--clients", type=int, default=max(2, cores // 4), help="processes that read")
    return parser.parse_args()


def write_model(folder: Path) -> Path:
    """A model folder without weights; its tokenizer has learned the words of this script."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=["<eos>", "<user>", "<end>"], initial_alphabet=letters, show_progress=False
    )
    texts = [path.read_text() for path in (HERE.glob("**/*.py"))]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    (folder / "tokenizer_config.json").write_text(
        msgspec.json.encode({"eos_token": "<eos>", "chat_template": template}).decode()
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": 1 << 22,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "eos_token_id": 0,
    }
    (folder / "config.json").write_bytes(msgspec.json.encode(config))
    return folder


def chat(max_tokens: int, pace: int, text: str = "Say something.", stream: bool = True) -> bytes:
    body = {
        "model": "fake",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": max_tokens,
        "stream": stream,
        "ignore_eos": True,
        "seed": pace,
    }
    return http_request("POST", "/v1/chat/completions", body)


def measure(bench: Bench) -> Figures:
    numbers = [int(number) for number in bench.options.gateway_processes.split(",")]
    with bench.served(1) as server:
        first_token = time_first_token(bench, server)
        one_chunk = write_one_chunk_per_token(bench, server)
        idle, busy, mb_per_s = time_health(bench, server)
    joined = [read_all_there_is(bench, number) for number in numbers]
    return Figures(now(), machine_name(), first_token, one_chunk, joined, idle, busy, mb_per_s)


def time_first_token(bench: Bench, server: tuple[int, Child]) -> Times:
    """One request after the other, whose tokens the engine has at once."""
    taken = bench.readers.times(server[0], chat(1, FREE), time.monotonic() + bench.options.seconds, 0.005).result()
    return times(taken)


def times(taken: list[float]) -> Times:
    p50, p99 = np.percentile(taken, [50, 99]) * 1e3
    return Times(float(p50), float(p99), len(taken))


def write_one_chunk_per_token(bench: Bench, server: tuple[int, Child]) -> list[Flow]:
    """By turns the gateway and the bare server, which writes an event of the gateway's."""
    streams, event = bench.options.streams, an_event(server[0])
    flows = []
    for _ in range(bench.options.rounds):
        flows.append(bench.flow("gateway", server, chat(ENDLESS, bench.options.pace), streams))
        for together in (1, 32):
            with bench.bare(event) as bare:
                name = f"bare ASGI, {together} together"
                flows.append(bench.flow(name, bare, http_request("GET", f"/{together}"), streams))
    return flows


def an_event(port: int) -> bytes:
    """One of those in the middle of a stream."""
    _, _, body = chat(8, 100).partition(b"\r\n\r\n")
    request = Request(f"http://127.0.0.1:{port}/v1/chat/completions", body, {"content-type": "application/json"})
    with urlopen(request, timeout=10) as answer:
        return answer.read().split(b"\n\n")[4] + b"\n\n"


def time_health(bench: Bench, server: tuple[int, Child]) -> tuple[Times, Times, float]:
    """What somebody waits who only asks for the gateway's health: alone, and beside prompts of 1 MB."""
    port, seconds = server[0], bench.options.seconds
    probe = http_request("GET", "/health/live")
    idle = bench.readers.times(port, probe, time.monotonic() + seconds, PROBE_PAUSE_S).result()
    words = (HERE / "load_gateway.py").read_text().replace("<", "(")  # no control tokens
    prompt = chat(1, FREE, (words * (1 + PROMPT_BYTES // len(words)))[:PROMPT_BYTES], stream=False)
    end_s = time.monotonic() + 2 * seconds
    prompts = bench.readers.times(port, prompt, end_s)
    busy = bench.readers.times(port, probe, end_s, PROBE_PAUSE_S).result()
    return times(idle), times(busy), len(prompts.result()) * PROMPT_BYTES / 1e6 / (2 * seconds)


def read_all_there_is(bench: Bench, gateways: int) -> Flow:
    """The engine never waits but for the rings, so the gateways are always behind."""
    streams = min(512, bench.options.streams * gateways)
    with bench.served(gateways) as server:
        return bench.flow(f"{gateways} gateway processes", server, chat(ENDLESS, FREE), streams, gateways)


def ratios(flows: list[Flow], bare: str) -> list[float]:
    """Of each round."""
    ours = [flow.chunks_per_core for flow in flows if flow.name == "gateway"]
    theirs = [flow.chunks_per_core for flow in flows if flow.name == bare]
    return [our / their for our, their in zip(ours, theirs, strict=True)]


def show(console: Console, figures: Figures) -> None:
    table = Table(title=f"streams of the gateway on {figures.machine}")
    for heading in ("", "streams", "tokens/s", "chunks/s", "tokens\nper chunk", "MB/s", "gateway\ncores"):
        table.add_column(heading, justify="right")
    for heading in ("detokenizer\ncores", "engine\ncores", "chunks/s\nper core", "of the bare"):
        table.add_column(heading, justify="right")
    for flow in (*_typical(figures.one_chunk_per_token), *figures.joined):
        table.add_row(*_row(flow, figures.one_chunk_per_token))
    console.print(table)
    console.print(f"time to first token added: {_told(figures.first_token)}", highlight=False)
    console.print(f"health, while nothing else happens: {_told(figures.health_idle)}", highlight=False)
    told, speed = _told(figures.health_while_tokenizing), figures.tokenized_mb_per_s
    console.print(f"health, beside prompts of 1 MB ({speed:.1f} MB/s): {told}", highlight=False)


def _told(found: Times) -> str:
    return f"p50 {found.p50:.2f} ms, p99 {found.p99:.2f} ms ({found.samples} samples)"


def _typical(flows: list[Flow]) -> list[Flow]:
    """Of each name the one with the median chunks per core."""
    by_name = {name: [flow for flow in flows if flow.name == name] for name in dict.fromkeys(f.name for f in flows)}
    return [sorted(some, key=lambda flow: flow.chunks_per_core)[len(some) // 2] for some in by_name.values()]


def _row(flow: Flow, rounds: list[Flow]) -> list[str]:
    bare = flow.name.startswith("bare")
    return [
        flow.name,
        str(flow.streams),
        "-" if bare else f"{flow.tokens_per_s:,.0f}",
        f"{flow.chunks_per_s:,.0f}",
        "-" if bare else f"{flow.tokens_per_s / (flow.chunks_per_s or 1):.2f}",
        f"{flow.bytes_per_s / 1e6:.1f}",
        f"{flow.cores[BARE_SERVER if bare else GATEWAY]:.2f}",
        "-" if bare else f"{flow.cores[DETOKENIZER]:.2f}",
        "-" if bare else f"{flow.cores[ENGINE]:.2f}",
        f"{flow.chunks_per_core:,.0f}",
        f"{statistics.median(ratios(rounds, flow.name)):.2f}" if bare else "",
    ]


def plot(figures: Figures, path: Path) -> None:
    from matplotlib.figure import Figure  # here, since each reader imports this file and needs none of it

    drawing = Figure(figsize=(13, 4.5), layout="constrained")
    chunks, growth = drawing.subplots(1, 2)
    names = list(dict.fromkeys(flow.name for flow in figures.one_chunk_per_token))
    chunks.boxplot([[f.chunks_per_core for f in figures.one_chunk_per_token if f.name == name] for name in names])
    chunks.set_xticks(range(1, 1 + len(names)), names)
    chunks.set(title="one chunk per token", ylabel="chunks per second and core", ylim=(0, None))
    numbers = [flow.gateways for flow in figures.joined]
    growth.plot(numbers, [flow.tokens_per_s for flow in figures.joined], "o-", label="tokens per second")
    growth.plot(numbers, [flow.chunks_per_s for flow in figures.joined], "o-", label="chunks per second")
    growth.set(title="as fast as they are read", xlabel="gateway processes", ylim=(0, None))
    growth.grid(alpha=0.3)
    growth.legend()
    drawing.suptitle(figures.machine)
    drawing.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
