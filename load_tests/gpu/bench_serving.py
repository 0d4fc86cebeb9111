"""A workload over HTTP: starts `tokenllm serve` with random weights, loads it by several client processes, with 256
requests in flight and then with all at once, and stops it. Flags that are not its own go to the server.

    make bench-gpu BENCH=serving ARGS="tests/data/llama-3.1-8b-config.json --max-running-requests 1024"
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from loadgen import report
from loadgen.client import Answered
from loadgen.figures import Run, percentiles
from model_folder import write_model_folder
from results import add_out_flag, keep, open_console, table_of
from served import served

LOAD_TESTS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Figures:
    """Milliseconds, p50 and p99; the time per output token is that of a request, the first token left out."""

    label: str
    output_tok_s: float
    wall_s: float
    failed: int
    ttft_ms: tuple[float, float]
    tpot_ms: tuple[float, float]

    @classmethod
    def of(cls, run: Run) -> "Figures":
        answers = [outcome for outcome in run.outcomes if isinstance(outcome, Answered)]
        per_token = [(a.total_s - a.ttft_s) / (a.output_tokens - 1) for a in answers if a.output_tokens > 1]
        figures = run.figures
        ttft, tpot = _p50_p99([a.ttft_s for a in answers]), _p50_p99(per_token)
        return cls(run.label, figures.output_tokens_per_s, figures.wall_s, figures.failed, ttft, tpot)


def _p50_p99(seconds: list[float]) -> tuple[float, float]:
    found = percentiles(seconds)
    return (found.p50 * 1e3, found.p99 * 1e3) if found else (0.0, 0.0)


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("config", type=Path, help="config.json of the model's shape; its weights are random")
    add("--device", default="cuda", help="default: %(default)s")
    add("--workload", type=Path, default=LOAD_TESTS / "workloads" / "w1.json", help="default: %(default)s")
    add("--concurrency", default="256,1000", help="requests in flight, one run for each; default: %(default)s")
    add("--requests", type=int, help="in each run; default: all of the workload")
    add("--processes", type=int, default=4, help="of the client; default: %(default)s")
    add_out_flag(parser)
    return parser.parse_known_args()


def load(base_url: str, arguments: argparse.Namespace, out: Path) -> list[Run]:
    options = {
        "--base-url": base_url,
        "--name": arguments.config.stem,
        "--workload": arguments.workload,
        "--token-ids": id_range(arguments.config),
        "--concurrency": arguments.concurrency,
        "--processes": arguments.processes,
        "--out": out,
    }
    if arguments.requests:
        options["--requests"] = arguments.requests
    words = [str(word) for option in options.items() for word in option]
    if subprocess.run([sys.executable, LOAD_TESTS / "load.py", *words]).returncode == 2:
        raise SystemExit("the load generator could not do its work; its last line says why")
    return report.load(Path(f"{out}.json")).runs


def id_range(config: Path) -> str:
    """1000 to 100000, as everybody sends, where the vocabulary is so large."""
    high = min(100_000, json.loads(config.read_text())["vocab_size"])
    return f"{min(1000, high // 2)}:{high}"


def show(found: Sequence[Figures], name: str) -> None:
    headings = ("", "output tok/s", "wall s", "errors", "TTFT ms p50", "p99", "TPOT ms p50", "p99")
    rows = [(f.label, f.output_tok_s, f.wall_s, f.failed, *f.ttft_ms, *f.tpot_ms) for f in found]
    open_console().print(table_of(name, headings, rows))


def main() -> None:
    arguments, flags = parse_arguments()
    name = f"gpu-serving-{arguments.config.stem}"
    flags = ["--load-format", "dummy", "--device", arguments.device, *flags]
    with tempfile.TemporaryDirectory() as folder:
        path = write_model_folder(arguments.config, Path(folder))
        with served(path, flags, arguments.out / f"{name}.log") as server:
            runs = load(server.base_url, arguments, arguments.out / f"{name}-requests")
    found = [Figures.of(run) for run in runs]
    show(found, f"{arguments.config.stem} over HTTP, {arguments.processes} client processes")
    keep(arguments.out, name, {"flags": flags, "ready_s": server.ready_s, "runs": [asdict(f) for f in found]})


if __name__ == "__main__":
    main()
