"""Figures for people: tables on the terminal, one JSON file and one picture per report."""

import platform
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from loadgen.client import Answered, Arrivals, Pace, Streams
from loadgen.figures import Figures, Percentiles, Run

TELLING_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")


class Report(msgspec.Struct, frozen=True):
    """Everything one call of the load generator measured, as it is saved."""

    name: str
    measured_at: str
    machine: str
    base_url: str
    model: str
    workload: str
    runs: list[Run]


class ReportError(ValueError):
    """A saved report that cannot be read; the message names the file."""


def machine_name() -> str:
    """The processor and those of its abilities that decide how fast a model runs on it."""
    info = Path("/proc/cpuinfo")
    fields = [line.partition(":") for line in info.read_text().splitlines()] if info.exists() else []
    models = [value.strip() for key, _, value in fields if key.strip() == "model name"]
    flags = {flag for key, _, value in fields if key.strip() == "flags" for flag in value.split()}
    if not models:
        return platform.processor()
    return " ".join([f"{len(models)} x {models[0]}", *(flag for flag in TELLING_FLAGS if flag in flags)])


def open_console() -> Console:
    """A terminal's own width; enough for the tables where the output goes to a file."""
    console = Console()
    return console if console.is_terminal else Console(width=170)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def pace_name(pace: Pace) -> str:
    match pace:
        case Streams(streams=streams):
            return f"{streams} stream{'s' if streams > 1 else ''}"
        case Arrivals(per_s=per_s):
            return f"{per_s:g} requests/s"


def save(report: Report, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.encode(report))


def load(path: Path) -> Report:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Report)
    except (OSError, msgspec.DecodeError) as fault:
        raise ReportError(f"{path}: {fault}") from fault


def _all_of(times: Percentiles | None, unit_s: float = 1.0, digits: int = 2) -> str:
    if not times:
        return "-"
    return " / ".join(f"{time / unit_s:.{digits}f}" for time in (times.p50, times.p90, times.p99))


def runs_table(title: str, runs: Sequence[Run]) -> Table:
    table = Table(title=title)
    for heading in ("", "requests", "errors", "output\ntok/s", "prompt\ntok/s", "TTFT s\np50 / p90 / p99"):
        table.add_column(heading, justify="right")
    for heading in ("ITL ms\np50 / p90 / p99", "request s\np50 / p90 / p99", "load\naverage"):
        table.add_column(heading, justify="right")
    for run in runs:
        table.add_row(run.label, *_row(run.figures))
    return table


def _row(figures: Figures) -> list[str]:
    return [
        str(figures.requests),
        f"[red]{figures.failed}[/red]" if figures.failed else "0",
        f"{figures.output_tokens_per_s:.1f}",
        f"{figures.prompt_tokens_per_s:.1f}",
        _all_of(figures.ttft_s),
        _all_of(figures.inter_token_s, unit_s=1e-3, digits=1),
        _all_of(figures.request_s),
        f"{figures.load_average:.1f}",
    ]


def remarks(runs: Sequence[Run]) -> list[str]:
    """What a reader of the table must know: every error by its text, answers cut short, tokens counted by chunks."""
    told = []
    for run in runs:
        told += [f"{run.label}: {times} x {error}" for error, times in run.figures.errors.items()]
        if run.figures.ended_early:
            told.append(f"{run.label}: {run.figures.ended_early} answers ended before the tokens asked for")
        if not run.figures.usage_reported:
            told.append(f"{run.label}: the server reports no usage, so that a chunk is counted as one token")
    return told


def _ratio(value: float | None, base: float | None) -> str:
    return f"{value / base:.2f}" if value and base else "-"


def _p50(times: Percentiles | None) -> float | None:
    return times.p50 if times else None


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def comparison_table(reports: Sequence[Report]) -> Table:
    """All reports by label of their runs, with ratios to the first report that has a run of that label."""
    table = Table(title=f"ratios are to {reports[0].name}")
    for heading in ("", "report", "output tok/s", "ratio", "TTFT p50 s", "ratio", "ITL p50 ms", "ratio", "errors"):
        table.add_column(heading, justify="right")
    for label in dict.fromkeys(run.label for report in reports for run in report.runs):
        rows = [(report.name, run.figures) for report in reports for run in report.runs if run.label == label]
        for name, figures in rows:
            table.add_row(label, name, *_comparison_row(figures, rows[0][1]))
        table.add_section()
    return table


def _comparison_row(figures: Figures, base: Figures) -> list[str]:
    ttft_s, inter_token_s = _p50(figures.ttft_s), _p50(figures.inter_token_s)
    return [
        f"{figures.output_tokens_per_s:.1f}",
        _ratio(figures.output_tokens_per_s, base.output_tokens_per_s),
        _number(ttft_s, 3),
        _ratio(ttft_s, _p50(base.ttft_s)),
        _number(inter_token_s and 1e3 * inter_token_s, 1),
        _ratio(inter_token_s, _p50(base.inter_token_s)),
        str(figures.failed),
    ]


def plot(reports: Sequence[Report], path: Path) -> None:
    """TTFT and inter-token latency as the share of samples below a time; throughput by run."""
    figure = Figure(figsize=(16, 5), layout="constrained")
    ttft, inter_token, throughput = figure.subplots(1, 3)
    for report in reports:
        for run in report.runs:
            label = f"{report.name}, {run.label}" if len(reports) > 1 else run.label
            answers = [outcome for outcome in run.outcomes if isinstance(outcome, Answered)]
            _share_below(ttft, (answer.ttft_s for answer in answers), label)
            _share_below(inter_token, (1e3 * gap for answer in answers for gap in answer.inter_token_s), label)
    _dress(ttft, "time to first token", "s")
    _dress(inter_token, "inter-token latency", "ms")
    _bars(throughput, reports)
    figure.suptitle(f"{reports[0].workload} on {reports[0].machine}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _share_below(axes: Axes, samples: Iterable[float], label: str) -> None:
    times = np.sort(list(samples))
    if len(times):
        axes.plot(times, np.arange(1, len(times) + 1) / len(times), label=label, drawstyle="steps-post")


def _dress(axes: Axes, title: str, unit: str) -> None:
    axes.set(title=title, xlabel=unit, ylabel="share of samples below", ylim=(0, 1.02), xscale="log")
    axes.grid(alpha=0.3, which="both")
    if axes.lines:
        axes.legend(fontsize="small")


def _bars(axes: Axes, reports: Sequence[Report]) -> None:
    labels = list(dict.fromkeys(run.label for report in reports for run in report.runs))
    width = 0.8 / len(reports)
    for place, report in enumerate(reports):
        speeds = {run.label: run.figures.output_tokens_per_s for run in report.runs}
        at = [number + (place - (len(reports) - 1) / 2) * width for number in range(len(labels))]
        drawn = axes.bar(at, [speeds.get(label, 0.0) for label in labels], width, label=report.name)
        axes.bar_label(drawn, fmt="%.0f", fontsize="small")
    axes.set(title="throughput", ylabel="output tokens per second")
    axes.set_xticks(range(len(labels)), labels)
    axes.legend(fontsize="small")
