"""Two pictures of the runs on one workload: memory and queue over time, and what the requests felt."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tokenllm.simulate.server import Books


def draw(runs: Mapping[str, Books], capacity: int, title: str, path: Path) -> None:
    # of the load extra: only here, so that a server without it can simulate too
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    (memory, queue), (first, whole) = figure.subplots(2, 2)
    for name, books in runs.items():
        start, _, used, _, waiting = np.array(books.timeline).T
        bins = np.linspace(0, books.seconds, 400)
        at = np.minimum(np.searchsorted(start, bins), len(start) - 1)
        memory.plot(bins, used[at] / capacity, label=name, linewidth=0.9)
        queue.plot(bins, waiting[at], linewidth=0.9)
        for axes, values in ((first, books.first_token_s), (whole, books.last_token_s)):
            values = np.sort(values[~np.isnan(values)])
            axes.plot(values, np.linspace(0, 1, len(values)), linewidth=0.9)
    memory.set(xlabel="time, s", ylabel="memory in use", ylim=(0, 1.02), title=title)
    memory.legend(loc="lower center", fontsize="small")
    queue.set(xlabel="time, s", ylabel="requests waiting")
    first.set(xlabel="time to first token, s", ylabel="share of requests", xscale="symlog")
    whole.set(xlabel="time to last token, s", ylabel="share of requests", xscale="symlog")
    figure.savefig(path, dpi=110)
