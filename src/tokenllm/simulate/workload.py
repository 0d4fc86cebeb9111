"""Requests to simulate: read from a trace file or drawn from a named mix."""

import csv
import json
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np

from tokenllm.routing.columns import Floats, Ints

BLOCK_TOKENS = 512  # of one entry of hash_ids


class TraceError(Exception):
    """A trace that cannot be read. Its text names the file, the line and what is wrong."""


@dataclass(frozen=True)
class Workload:
    """Requests in the order of arrival, in columns."""

    name: str
    arrival: Floats  # s
    prompt: Ints
    length: Ints  # tokens generated, the truth that only an oracle sees
    max_tokens: Ints
    group: Ints  # which application sent it, as far as its prompt's beginning tells; -1: it does not
    tenant: Ints
    priority: Ints
    blocks: list[Ints]  # of each prompt; empty lists: nothing is shared

    def __len__(self) -> int:
        return len(self.arrival)

    def at_rate(self, times: float) -> "Workload":
        return replace(self, arrival=self.arrival / times)

    def first(self, count: int) -> "Workload":
        columns = {name: getattr(self, name)[:count] for name in self.__dataclass_fields__ if name != "name"}
        return Workload(self.name, **columns)


def of(
    name: str,
    prompt: Ints,
    length: Ints,
    max_tokens: int | Ints,
    arrival: Floats | None = None,
    group: Ints | None = None,
    blocks: list[Ints] | None = None,
) -> Workload:
    """A workload of one tenant; without arrivals all requests are there at once."""
    count = len(prompt)
    zeros = np.zeros(count, np.int64)
    return Workload(
        name=name,
        arrival=np.zeros(count) if arrival is None else arrival - arrival.min(),
        prompt=np.maximum(1, prompt),
        length=np.maximum(1, length),
        max_tokens=np.maximum(np.broadcast_to(max_tokens, count), length).astype(np.int64),
        group=zeros - 1 if group is None else group,
        tenant=zeros,
        priority=zeros,
        blocks=blocks or [],
    )


def read(path: Path) -> Workload:
    """A trace, by the ending of its name. Who asked for how many tokens at most is seldom told: the next power of two
    above the longest answer stands in for everybody."""
    match path.suffix:
        case ".csv":
            rows = _csv_rows(path)
        case ".jsonl":
            rows = _jsonl_rows(path)
        case _:
            raise TraceError(f"{path}: a trace ends in .csv or .jsonl")
    if not rows:
        raise TraceError(f"{path}: the trace is empty")
    rows.sort(key=lambda row: row[0])
    times, prompts, lengths, blocks = (list(column) for column in zip(*rows, strict=True))
    length = np.array(lengths)
    most = 1 << int(length.max() - 1).bit_length()
    return of(
        path.stem,
        np.array(prompts),
        length,
        most,
        np.array(times, float),
        _groups(blocks),
        _numbered(blocks) if any(blocks) else None,
    )


Row = tuple[float, int, int, list[int]]


def _csv_rows(path: Path) -> list[Row]:
    rows: list[Row] = []
    with path.open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            try:
                stamp = row.get("TIMESTAMP")
                seconds = datetime.fromisoformat(stamp[:26]).timestamp() if stamp else 0.0
                rows.append((seconds, *_tokens(row, "ContextTokens", "GeneratedTokens"), []))
            except (KeyError, TypeError, ValueError) as error:
                raise TraceError(f"{path}:{number}: {_word(error)}") from error
    return rows


def _jsonl_rows(path: Path) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            tokens = _tokens(row, "input_length", "output_length")
            rows.append((float(row["timestamp"]) / 1000, *tokens, [int(block) for block in row.get("hash_ids") or []]))
        except (KeyError, TypeError, ValueError) as error:
            raise TraceError(f"{path}:{number}: {_word(error)}") from error
    return rows


def _word(error: Exception) -> str:
    return f"there is no {error}" if isinstance(error, KeyError) else str(error)


def _tokens(row: dict[str, str | int], prompt: str, length: str) -> tuple[int, int]:
    """Both counts, refused when negative."""
    counts = int(row[prompt]), int(row[length])
    if min(counts) < 0:
        raise ValueError(f"{prompt} and {length} are counts, not {counts}")
    return counts


def _numbered(blocks: list[list[int]]) -> list[Ints]:
    """Ids may be hashes of any size: the blocks, counted from 0."""
    numbers: dict[int, int] = {}
    return [np.array([numbers.setdefault(block, len(numbers)) for block in ids], np.int64) for ids in blocks]


def _groups(blocks: list[list[int]]) -> Ints:
    """Requests whose first block is the same belong together."""
    return np.array([abs(ids[0]) % (1 << 62) if ids else -1 for ids in blocks], np.int64)
