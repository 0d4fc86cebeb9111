"""What was learned about the lengths of a model's answers, kept across restarts: a small JSON file in the cache folder.

It is written seldom: every few minutes while the server works, and soon after it has come to rest, since whoever stops
a server kills this process without a word.
"""

import sys
import time
import zlib
from pathlib import Path

import msgspec
import numpy as np

from tokenllm.routing.lengths import BINS, Lengths

EVERY_S = 600.0  # while requests run
AT_REST_EVERY_S = 5.0


class _Row(msgspec.Struct, frozen=True):
    """One line of the file, as `Lengths` writes it."""

    group: int
    size: int
    longest: int
    ended: list[float]


class History:
    """The lengths of the server that runs, and the file they come from and go to."""

    def __init__(self, folder: Path, model_path: Path) -> None:
        name = f"lengths-{model_path.stem}-{zlib.crc32(str(model_path.resolve()).encode()):08x}.json"
        self._path = folder / name
        self.lengths = self._load()
        self._saved, self._saved_s = self.lengths.learned, time.monotonic()

    def save_when_due(self, busy: bool) -> float | None:
        """In how many seconds to ask again, if nothing happens meanwhile; None: there is nothing new to keep."""
        if self.lengths.learned == self._saved:
            return None
        left_s = self._saved_s + (EVERY_S if busy else AT_REST_EVERY_S) - time.monotonic()
        if left_s > 0:
            return left_s
        self._saved, self._saved_s = self.lengths.learned, time.monotonic()
        self._save()
        return None

    def _load(self) -> Lengths:
        try:
            _check(self._path.read_bytes())
            return Lengths.load(self._path)
        except FileNotFoundError:
            return Lengths()
        except (OSError, ValueError, KeyError) as error:
            print(f"tokenllm: {self._path} is not read, lengths are learned anew: {error}", file=sys.stderr)
            return Lengths()

    def _save(self) -> None:
        """Another server sees the old file or the new one."""
        fresh = self._path.with_suffix(".new")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self.lengths.save(fresh)
            fresh.replace(self._path)
        except OSError as error:
            print(f"tokenllm: lengths are not kept: {error}", file=sys.stderr)


def _check(text: bytes) -> None:
    """A ValueError where it is not what `Lengths` writes; a KeyError in loading where a row's class is missing."""
    for row in msgspec.json.decode(text, type=list[_Row]):
        ended = np.array(row.ended)
        if len(ended) != BINS or not (np.isfinite(ended) & (ended >= 0)).all():
            raise ValueError(f"row {row.group}, {row.size}: {BINS} numbers of answers are expected")
