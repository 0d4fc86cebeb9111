"""Load any OpenAI-compatible server and report throughput, time to first token and inter-token latency.

load_tests/load.py --base-url http://127.0.0.1:8000/v1 --concurrency 1,8,16
load_tests/load.py --compare load_tests/results/ours.json load_tests/results/theirs.json
"""

import argparse
import asyncio
import json
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from loadgen import report as reports
from loadgen.client import Answered, Arrivals, Failed, Outcome, Pace, Server, ServerFault, Streams, find_model, run_load
from loadgen.figures import Run, summarise
from loadgen.many import run_in_processes
from loadgen.workload import CHAT_FILE, Lengths, Workload, WorkloadError, parse_id_range, read_workload

RESULTS = Path(__file__).parent / "results"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base-url", default="http://127.0.0.1:8000/v1", help="default: %(default)s")
    add("--api-key", default=os.environ.get("OPENAI_API_KEY", ""), help="default: $OPENAI_API_KEY")
    add("--model", default="", help="default: the first that the server names")
    add("--workload", default="chat", help="chat, random, or a JSON file of lengths or conversations; default: chat")
    add("--prompt-tokens", type=_at_least_one, default=128, help="of each random prompt; default: %(default)s")
    add("--output-tokens", type=_at_least_one, default=64, help="of each random or chat answer; default: %(default)s")
    add("--token-ids", default="1000:49000", help="LOW:HIGH, range of random ids; default: %(default)s")
    add("--requests", type=_at_least_one, help="in each run; default: all of a workload, 2 per stream of random")
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument("--concurrency", default="1,8,16", help="streams, one run for each; default: %(default)s")
    pace.add_argument("--rate", type=float, help="requests per second, arriving at random, instead of --concurrency")
    add("--seed", type=int, default=0, help="of the arrival times; default: %(default)s")
    add("--processes", type=_at_least_one, default=1, help="that share the requests; default: %(default)s")
    add("--timeout", type=float, default=600.0, help="seconds for one request; default: %(default)s")
    add(
        "--extra-body",
        type=_json_object,
        default={},
        help="JSON for every request, such as '{\"cache_prompt\": false}'",
    )
    add("--name", default="", help="of the report; default: the model's")
    add("--out", type=Path, help="without ending; default: load_tests/results/ and the time")
    add("--compare", type=Path, nargs="+", metavar="JSON", help="send nothing: show these saved reports side by side")
    return parser.parse_args(argv)


def _at_least_one(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as fault:
        raise argparse.ArgumentTypeError(f"not JSON: {fault}") from fault
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value


def choose_workload(arguments: argparse.Namespace) -> Workload:
    ids = parse_id_range(arguments.token_ids)
    if arguments.workload == "random":
        shape = (arguments.prompt_tokens, arguments.output_tokens)
        return Lengths(f"random ids, {shape[0]} in, {shape[1]} out", [shape], ids)
    path = CHAT_FILE if arguments.workload == "chat" else Path(arguments.workload)
    return read_workload(path, ids, arguments.output_tokens)


def choose_paces(arguments: argparse.Namespace) -> list[Pace]:
    if arguments.rate is not None:
        if arguments.rate <= 0:
            raise WorkloadError(f"--rate must be above 0, not {arguments.rate:g}")
        return [Arrivals(arguments.rate, arguments.seed)]
    counts = arguments.concurrency.split(",")
    if not all(count.isdigit() and int(count) for count in counts):
        raise WorkloadError(f"--concurrency must be numbers above 0 with commas, not {arguments.concurrency!r}")
    return [Streams(int(count)) for count in counts]


def request_count(asked: int | None, workload: Workload, pace: Pace) -> int:
    match workload, pace:
        case _ if asked:
            return asked
        case Lengths(lengths=[_]), Streams(streams=streams):
            return 2 * streams
        case Lengths(lengths=lengths), _:
            return len(lengths)
        case _:
            return len(workload.conversations)


class LiveProgress:
    """A bar that counts answers, failures and tokens per second while a run lasts."""

    def __init__(self, console: Console, label: str, total: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Progress(*columns, TextColumn("{task.fields[state]}"), console=console)
        self.label, self.tokens, self.failed = label, 0, 0
        self.task = self.bar.add_task(label, total=total, state="")

    def count(self, outcome: Outcome) -> None:
        match outcome:
            case Answered(output_tokens=tokens):
                self.tokens += tokens
            case Failed():
                self.failed += 1
        speed = self.tokens / (self.bar.tasks[self.task].elapsed or 1e-9)
        self.bar.update(self.task, advance=1, state=f"{speed:.0f} tok/s, {self.failed} failed")


async def measure(
    server: Server, workload: Workload, paces: list[Pace], asked: int | None, processes: int, console: Console
) -> list[Run]:
    """One run for each pace, after one request that is not counted and shows that the server answers."""
    await _warm_up(server, workload)
    runs, first = [], 0
    for pace in paces:
        count = request_count(asked, workload, pace)
        prompts = [workload.prompt(number) for number in range(first, first + count)]
        first += count
        live = LiveProgress(console, reports.pace_name(pace), count)
        with live.bar:
            if processes == 1:
                outcomes = await run_load(server, prompts, pace, live.count)
            else:
                outcomes = await asyncio.to_thread(run_in_processes, processes, server, prompts, pace, live.count)
        runs.append(Run(reports.pace_name(pace), pace, summarise(outcomes), outcomes))
    return runs


async def _warm_up(server: Server, workload: Workload) -> None:
    (outcome,) = await run_load(server, [workload.prompt(-1)], Streams(1))
    if isinstance(outcome, Failed):
        raise ServerFault(f"the first request failed: {outcome.error}")


async def load_server(arguments: argparse.Namespace, console: Console) -> reports.Report:
    workload, paces = choose_workload(arguments), choose_paces(arguments)
    base_url = arguments.base_url.rstrip("/")
    model = arguments.model or await find_model(base_url, arguments.api_key)
    server = Server(base_url, model, arguments.api_key, arguments.extra_body, arguments.timeout)
    runs = await measure(server, workload, paces, arguments.requests, arguments.processes, console)
    name = arguments.name or Path(model).stem
    return reports.Report(name, reports.now(), reports.machine_name(), base_url, model, workload.name, runs)


def show(console: Console, report: reports.Report, out: Path) -> None:
    title = f"{report.name} at {report.base_url}: {report.workload}"
    console.print(reports.runs_table(title, report.runs))
    for remark in reports.remarks(report.runs):
        console.print(remark, style="yellow", markup=False)
    reports.save(report, Path(f"{out}.json"))
    reports.plot([report], Path(f"{out}.png"))
    console.print(f"saved {out}.json and {out}.png", highlight=False)


def compare(console: Console, paths: list[Path], out: Path) -> None:
    saved = [reports.load(path) for path in paths]
    console.print(reports.comparison_table(saved))
    reports.plot(saved, Path(f"{out}.png"))
    console.print(f"saved {out}.png", highlight=False)


def main(argv: list[str] | None = None) -> int:
    arguments, console = parse_arguments(argv), reports.open_console()
    out = arguments.out or RESULTS / datetime.now().strftime("%Y-%m-%d-%H%M%S")
    try:
        if arguments.compare:
            compare(console, arguments.compare, out)
            return 0
        report = asyncio.run(load_server(arguments, console))
    except (WorkloadError, ServerFault, reports.ReportError) as fault:
        console.print(f"load: {fault}", style="red", markup=False)
        return 2
    show(console, report, out)
    return 1 if any(run.figures.failed for run in report.runs) else 0


if __name__ == "__main__":
    sys.exit(main())
