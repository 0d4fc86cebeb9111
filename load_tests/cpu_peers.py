"""The embedded model on this machine's processor: tokenllm, llama.cpp's server and transformers.generate, in turn.

Each peer is started alone, warmed up, loaded by the same client with the same prompts, weighed and stopped,
round after round, so that a drift of the machine shows. A sample during which other processes were busy is
taken again; medians are over quiet samples, and without them no ratio is shown.

    make bench-cpu ARGS="--rounds 1"
"""

import argparse
import os
import shlex
import signal
import sys
from datetime import datetime
from pathlib import Path

import msgspec
from rich.console import Console

from loadgen import peer_report, report
from loadgen.client import ServerFault
from loadgen.figures import summarise
from loadgen.peer_report import QUIET_CORES, Life, PeersReport, Sample
from loadgen.peers import BatchPeer, HttpPeer, Peer, Running, running
from loadgen.processes import OthersClock, ProcessError, wait_until_quiet
from loadgen.workload import IdRange, IdsPrompt, Lengths
from tokenllm.checkpoint import source

HERE = Path(__file__).parent
ATTEMPTS = 3  # to take a sample while the machine is quiet
WARM_UP_TOKENS = 8


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, help="a GGUF file; default: the embedded model")
    add("--peers", default="tokenllm,llama.cpp,transformers", help="default: %(default)s")
    add("--concurrency", default="1,8,16", help="streams; default: %(default)s")
    add("--rounds", type=int, default=3, help="default: %(default)s")
    add("--waves", type=int, default=2, help="requests per stream in one sample; default: %(default)s")
    add("--prompt-tokens", type=int, default=128, help="default: %(default)s")
    add("--output-tokens", type=int, default=64, help="default: %(default)s")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of a peer; default: one per core")
    add("--patience", type=float, default=60.0, help="seconds to wait for a quiet machine; default: %(default)s")
    add("--tokenllm", help="command to start it, with {port} and {model}")
    add("--llama-server", help="command to start another build of llama.cpp's server, with {port} and {model}")
    add("--out", type=Path, help="without ending; default: load_tests/results/cpu- and the time")
    return parser.parse_args()


def known_peers(arguments: argparse.Namespace, streams: int) -> list[Peer]:
    threads = arguments.threads
    stream_tokens = 2 * (arguments.prompt_tokens + arguments.output_tokens)
    tokenllm = shlex.quote(str(Path(sys.executable).with_name("tokenllm")))
    child = f"{shlex.quote(sys.executable)} {shlex.quote(str(HERE / 'peers'))}"
    llama = f"{child}/llama_server.py {{model}} --port {{port}} --threads {threads}"
    llama += f" --streams {streams} --stream-tokens {stream_tokens}"
    return [
        HttpPeer("tokenllm", arguments.tokenllm or f"{tokenllm} serve {{model}} --port {{port}}", "/health/ready"),
        HttpPeer("llama.cpp", arguments.llama_server or llama, "/health", {"cache_prompt": False}),
        BatchPeer("transformers", f"{child}/transformers_generate.py {{model}} --threads {threads}"),
    ]


def choose_peers(arguments: argparse.Namespace, streams: int) -> list[Peer]:
    known = {peer.name: peer for peer in known_peers(arguments, streams)}
    names = arguments.peers.split(",")
    if unknown := [name for name in names if name not in known]:
        raise ProcessError(f"--peers knows {', '.join(known)}, not {', '.join(unknown)}")
    return [known[name] for name in names]


class Bench:
    """The rounds, and what they have measured so far."""

    def __init__(self, arguments: argparse.Namespace, console: Console) -> None:
        self.streams = [int(count) for count in arguments.concurrency.split(",")]
        self.waves, self.patience_s, self.console = arguments.waves, arguments.patience, console
        shape = (arguments.prompt_tokens, arguments.output_tokens)
        self.workload = Lengths(f"{shape[0]} random ids in, {shape[1]} out", [shape], IdRange(1000, 49000))
        self.samples: list[Sample] = []
        self.lives: list[Life] = []

    def play(self, peer: Peer, round_: int, model: Path, logs: Path) -> None:
        """One life of a peer: start, warm up, load, weigh, stop."""
        wait_until_quiet(QUIET_CORES, self.patience_s)
        with running(peer, model, logs / f"{peer.name}-{round_}.log") as peer_running:
            self._warm_up(peer_running)
            first = 0  # prompts are never sent twice to one process: no cache may know them
            for streams in self.streams:
                first = self._sample(peer.name, round_, streams, peer_running, first)
            life = Life(peer.name, round_, peer_running.start_s, peer_running.kv_tokens, peer_running.child.memory())
        self.lives.append(life)

    def _warm_up(self, peer: Running) -> None:
        prompts = [self.workload.prompt(-1 - number) for number in range(max(self.streams))]
        peer.ask([IdsPrompt(prompt.ids, WARM_UP_TOKENS) for prompt in prompts], len(prompts))

    def _sample(self, name: str, round_: int, streams: int, peer: Running, first: int) -> int:
        for _ in range(ATTEMPTS):
            wait_until_quiet(QUIET_CORES, self.patience_s)
            prompts = [self.workload.prompt(number) for number in range(first, first + streams * self.waves)]
            first += len(prompts)
            others = OthersClock()
            outcomes = peer.ask(prompts, streams)
            sample = Sample(name, round_, streams, others.cores(), summarise(outcomes), outcomes)
            self.samples.append(sample)
            self._tell(sample)
            if sample.other_cores <= QUIET_CORES:
                break
        return first

    def _tell(self, sample: Sample) -> None:
        speed, ttft = sample.figures.output_tokens_per_s, sample.figures.ttft_s
        self.console.print(
            f"round {sample.round} {sample.peer}, {sample.streams} streams: {speed:.1f} tok/s, "
            f"TTFT {ttft.p50 if ttft else float('nan'):.2f} s, {sample.figures.failed} failed, "
            f"other processes {sample.other_cores:.2f} cores, load average {sample.figures.load_average:.1f}",
            highlight=False,
        )


def finish(bench: Bench, peers: list[Peer], out: Path) -> None:
    measured = PeersReport(report.now(), report.machine_name(), peers, bench.workload.name, bench.samples, bench.lives)
    out.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{out}.json").write_bytes(msgspec.json.encode(measured))
    Path(f"{out}.md").write_text(peer_report.markdown(measured))
    peer_report.plot(measured, Path(f"{out}.png"))
    bench.console.print(*peer_report.terminal(measured), sep="\n")
    bench.console.print(f"saved {out}.json, .md and .png", highlight=False)


def play_rounds(bench: Bench, peers: list[Peer], arguments: argparse.Namespace, logs: Path) -> None:
    model = arguments.model or source.resolve("")
    try:
        for round_ in range(1, arguments.rounds + 1):
            for peer in peers:
                bench.play(peer, round_, model, logs)
    except KeyboardInterrupt:
        bench.console.print("interrupted: this is what was measured until now", style="red")


def main() -> int:
    arguments, console = parse_arguments(), report.open_console()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no peer is left running
    out = arguments.out or HERE / "results" / datetime.now().strftime("cpu-%Y-%m-%d-%H%M%S")
    bench = Bench(arguments, console)
    try:
        peers = choose_peers(arguments, max(bench.streams))
        play_rounds(bench, peers, arguments, Path(f"{out}-logs"))
    except (ProcessError, ServerFault) as fault:
        console.print(f"cpu_peers: {fault}", style="red", markup=False)
        return 2
    finish(bench, peers, out)
    return 1 if any(sample.figures.failed for sample in bench.samples) else 0


if __name__ == "__main__":
    sys.exit(main())
