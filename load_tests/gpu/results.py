"""What a benchmark leaves behind: a table on the terminal, a JSON file with everything, and a picture."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from timing import Limits

RESULTS = Path(__file__).parents[1] / "results"


def add_out_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file and the picture")


def open_console() -> Console:
    """A terminal's own width; enough for the tables where the output goes to a file."""
    console = Console()
    return console if console.is_terminal else Console(width=150)


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def table_of(title: str, headings: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """Numbers as they are read: floats with three digits that count."""
    table = Table(title=title)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left")
    for row in rows:
        table.add_row(*map(_cell, row))
    return table


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"


def limits_line(limits: Limits) -> str:
    return (
        f"{limits.device}: copy {limits.copy_tb_s:.2f} TB/s, read {limits.read_tb_s:.2f} TB/s, "
        f"GEMM {limits.gemm_tflop_s:.0f} TFLOP/s"
    )


def keep(folder: Path, name: str, measured: Mapping[str, object], figure: Figure | None = None) -> None:
    """Write NAME.json, and NAME.png if there is a picture, and say where."""
    folder.mkdir(parents=True, exist_ok=True)
    conditions = {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "device": device_name(),
        "torch": torch.__version__,
    }
    (folder / f"{name}.json").write_text(json.dumps({**conditions, **measured}, indent=1))
    if figure:
        figure.savefig(folder / f"{name}.png", dpi=110)
    open_console().print(f"saved {folder / name}.json{' and .png' if figure else ''}", highlight=False)


def one_plot(title: str, width: float = 9.0, height: float = 5.0) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.grid(alpha=0.3, which="both")
    return figure, axes
