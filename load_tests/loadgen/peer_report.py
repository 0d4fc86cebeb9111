"""The CPU comparison as it is saved and shown: samples of all rounds, medians of the quiet ones, ratios."""

from collections.abc import Callable
from pathlib import Path
from statistics import median

import msgspec
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from loadgen.client import Outcome
from loadgen.figures import Figures
from loadgen.peers import Peer
from loadgen.processes import Memory

OURS = "tokenllm"
QUIET_CORES = 0.2


class Sample(msgspec.Struct, frozen=True):
    """One run of one peer."""

    peer: str
    round: int
    streams: int
    other_cores: float  # used meanwhile by processes that have nothing to do with it
    figures: Figures
    outcomes: list[Outcome]


class Life(msgspec.Struct, frozen=True):
    """What one start of a peer told; its memory was weighed after the load."""

    peer: str
    round: int
    start_s: float
    kv_tokens: int | None
    memory: list[Memory]


class PeersReport(msgspec.Struct, frozen=True):
    measured_at: str
    machine: str
    peers: list[Peer]
    workload: str
    samples: list[Sample]
    lives: list[Life]


class Row(msgspec.Struct, frozen=True):
    """One peer with so many streams: medians over the quiet samples of all rounds, or the quietest alone."""

    streams: int
    peer: str
    quiet_samples: int
    samples: int
    output_tokens_per_s: float
    lowest: float
    highest: float
    ttft_p50_s: float
    inter_token_p50_s: float
    failed: int
    other_cores: float


def rows_of(samples: list[Sample]) -> list[Row]:
    places = dict.fromkeys((sample.streams, sample.peer) for sample in samples)
    return [_row([s for s in samples if (s.streams, s.peer) == place]) for place in sorted(places, key=lambda p: p[0])]


def _row(samples: list[Sample]) -> Row:
    quiet = [s for s in samples if s.other_cores <= QUIET_CORES]
    counted = quiet or [min(samples, key=lambda s: s.other_cores)]
    speeds = [s.figures.output_tokens_per_s for s in counted]
    return Row(
        streams=counted[0].streams,
        peer=counted[0].peer,
        quiet_samples=len(quiet),
        samples=len(samples),
        output_tokens_per_s=median(speeds),
        lowest=min(speeds),
        highest=max(speeds),
        ttft_p50_s=median(s.figures.ttft_s.p50 for s in counted if s.figures.ttft_s),
        inter_token_p50_s=median(s.figures.inter_token_s.p50 for s in counted if s.figures.inter_token_s),
        failed=sum(s.figures.failed for s in samples),
        other_cores=max(s.other_cores for s in counted),
    )


SPEED_HEADINGS = ["streams", "peer", "output tok/s", "lowest - highest", "tokenllm / peer", "TTFT p50 s"]
SPEED_HEADINGS += ["tokenllm / peer", "ITL p50 ms", "failed", "quiet samples", "other cores"]


def speed_cells(rows: list[Row]) -> list[list[str]]:
    ours = {row.streams: row for row in rows if row.peer == OURS}
    return [_speed_cells(row, ours.get(row.streams)) for row in rows]


def _speed_cells(row: Row, ours: Row | None) -> list[str]:
    return [
        str(row.streams),
        row.peer,
        f"{row.output_tokens_per_s:.1f}",
        f"{row.lowest:.1f} - {row.highest:.1f}",
        _ratio(row, ours, lambda row: row.output_tokens_per_s),
        f"{row.ttft_p50_s:.3f}",
        _ratio(row, ours, lambda row: row.ttft_p50_s),
        f"{1e3 * row.inter_token_p50_s:.1f}",
        str(row.failed),
        f"{row.quiet_samples} of {row.samples}",
        f"{row.other_cores:.2f}",
    ]


def _ratio(row: Row, ours: Row | None, value: Callable[[Row], float]) -> str:
    """tokenllm's value over the peer's. One strange process can cost a peer nine tenths: noise gets no ratio."""
    if not ours or row.peer == OURS:
        return ""
    return f"{value(ours) / value(row):.2f}" if ours.quiet_samples and row.quiet_samples else "noisy"


LIFE_HEADINGS = ["peer", "start to ready s", "KV tokens", "process", "RSS MB", "PSS MB"]


def life_cells(lives: list[Life]) -> list[list[str]]:
    """Median start-up over the rounds; memory after the last one."""
    cells = []
    for peer in dict.fromkeys(life.peer for life in lives):
        own = [life for life in lives if life.peer == peer]
        kv_tokens = own[-1].kv_tokens
        head = [peer, f"{median(life.start_s for life in own):.2f}", "" if kv_tokens is None else f"{kv_tokens:,}"]
        for memory in own[-1].memory:
            cells.append([*head, memory.name, f"{memory.rss_bytes / 1e6:.0f}", f"{memory.pss_bytes / 1e6:.0f}"])
            head = ["", "", ""]
    return cells


def tables(report: PeersReport) -> list[tuple[list[str], list[list[str]]]]:
    """Headings and cells: the speeds, then start-up and memory."""
    return [(SPEED_HEADINGS, speed_cells(rows_of(report.samples))), (LIFE_HEADINGS, life_cells(report.lives))]


def title(report: PeersReport) -> str:
    return f"{report.workload}, on {report.machine}"


def terminal(report: PeersReport) -> list[str | Table]:
    return [title(report), *(_terminal_table(headings, cells) for headings, cells in tables(report))]


def _terminal_table(headings: list[str], cells: list[list[str]]) -> Table:
    table = Table(*headings)
    for row in cells:
        table.add_row(*row)
    return table


def markdown(report: PeersReport) -> str:
    parts = [f"{title(report)}, {report.measured_at}", *(_markdown_table(h, cells) for h, cells in tables(report))]
    return "\n\n".join(parts) + "\n"


def _markdown_table(headings: list[str], cells: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


PANELS = (
    ("output tokens per second", lambda row: row.output_tokens_per_s),
    ("TTFT p50, s", lambda row: row.ttft_p50_s),
    ("inter-token latency p50, ms", lambda row: 1e3 * row.inter_token_p50_s),
)


def plot(report: PeersReport, path: Path) -> None:
    rows = rows_of(report.samples)
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    panels = figure.subplots(1, len(PANELS))
    for axes, (name, value) in zip(panels, PANELS, strict=True):
        _bars(axes, name, value, rows)
    figure.suptitle(title(report))
    figure.savefig(path, dpi=110)


def _bars(axes: Axes, name: str, value: Callable[[Row], float], rows: list[Row]) -> None:
    streams, peers = sorted({row.streams for row in rows}), list(dict.fromkeys(row.peer for row in rows))
    width = 0.8 / len(peers)
    for place, peer in enumerate(peers):
        own = [row for row in rows if row.peer == peer]
        at = [streams.index(row.streams) + (place - (len(peers) - 1) / 2) * width for row in own]
        axes.bar_label(axes.bar(at, list(map(value, own)), width, label=peer), fmt="%.3g", fontsize="small")
    axes.set(title=name, xlabel="concurrent streams")
    axes.set_xticks(range(len(streams)), list(map(str, streams)))
    axes.legend(fontsize="small")
