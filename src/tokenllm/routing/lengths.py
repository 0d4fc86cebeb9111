"""How long answers get: survival functions learned from the requests that finish, and from those that have not yet.

A hierarchy of histograms: the application (told by a prompt's beginning), within the class of `max_tokens`, within all.
A child with few samples leans on its parent. Owns the histograms; they can be saved and loaded as JSON.
"""

import json
from pathlib import Path

import numpy as np

from tokenllm.routing.columns import Floats, Ints

FINE = 64  # up to here every length has a bin of its own; then each is 1.5 % wider than the last
LOOKED_UP = 1 << 17  # longer ones share the last bin
FRESH = 1 / 64  # of the answers that were learned from may be missing in the table, up to so much of a WINDOW
WINDOW = 1000  # finishes after which a sample weighs 1/e of a new one
LEAN = 12.0  # as many samples as a parent's word counts
PRIOR = 2.0  # the same of the guess before anything is known
PRIOR_PACE = 0.3
TAIL = 2.0
MOST_ENDING = 0.5  # of those who reach a bin, as a guess
SEEN_OFTEN = 8  # requests of an application before it has a row
MOST_ROWS = 1024
MOST_SEEN = MOST_ROWS * 64  # applications that are counted at once

EDGES: Ints = np.unique(
    np.concatenate((np.arange(FINE + 1), FINE * 1.015 ** np.arange(1, 513), [LOOKED_UP])).astype(np.int64)
)
WIDTHS: Ints = np.diff(EDGES)
BINS = len(EDGES) - 1  # bin b holds the lengths from EDGES[b] up to EDGES[b + 1]
BIN_OF: Ints = np.searchsorted(EDGES, np.arange(LOOKED_UP), "right") - 1


def bins(lengths: Ints) -> Ints:
    return BIN_OF.take(lengths, mode="clip")


class Lengths:
    """Survival by the product-limit rule:

        S(b) = Π_{c<b} (1 - h(c))        h(c) = (ended in c + w·h_parent(c)) / (reached c + w)

    Those still running have reached their bins without ending there: a young history is not fooled by the short
    answers that come first. The root's own parent is a guess at what lies beyond what anybody has reached:

        h(c) = max(PRIOR_PACE / (max_tokens - c),  TAIL/c · tokens of answers ended before c / all tokens before c)

    Before anything is known nearly everybody is taken to use all of `max_tokens`. Then answers go on ending as they
    have so far: the second is right for the beginning of lengths that are spread evenly, bold by TAIL for a power law,
    and cautious for whatever ends sooner.
    """

    def __init__(self) -> None:
        self.learned = 0  # answers, since it was made or loaded
        self._row_of: dict[tuple[int, int], int] = {}  # (application or -1, max_tokens class) → row
        self._seen: dict[tuple[int, int], int] = {}
        self._parents = [-1]
        self._longest = [0]
        self._ended = np.zeros((8, BINS))
        self._weight = 1.0  # of a new sample: growing weights make old ones fade
        self._stale, self._unseen = True, 0  # answers that are not in the table yet
        self.table: Floats = np.ones((1, BINS))
        self.mean: Floats = np.ones(1)

    def kind(self, group: int, max_tokens: int) -> int:
        """The row that speaks for a new request."""
        size = max_tokens.bit_length()
        row = self._row_of.get((group, size))
        if row is not None:
            return row
        parent = self._row_of.get((-1, size))
        if parent is None:
            parent = self._new_row((-1, size), 0)
        if max_tokens > self._longest[parent]:
            self._longest[parent] = max_tokens
            self._longest[0] = max(self._longest[0], max_tokens)
            self._stale = True
        if group >= 0 and len(self._parents) < MOST_ROWS and self._is_often_seen((group, size)):
            return self._new_row((group, size), parent)
        return parent

    def _is_often_seen(self, key: tuple[int, int]) -> bool:
        """Counted anew after many that were not: most beginnings are seen once."""
        if len(self._seen) >= MOST_SEEN:
            self._seen.clear()
        self._seen[key] = self._seen.get(key, 0) + 1
        return self._seen[key] > SEEN_OFTEN

    def _new_row(self, key: tuple[int, int], parent: int) -> int:
        row = len(self._parents)
        self._parents.append(parent)
        self._longest.append(self._longest[parent])
        self._row_of[key] = row
        if row >= len(self._ended):
            self._ended = np.concatenate((self._ended, np.zeros_like(self._ended)))
        self._stale = True
        return row

    def learn(self, kind: int, length: int) -> None:
        self.learned += 1
        place = BIN_OF[min(length, LOOKED_UP - 1)]
        while kind >= 0:
            self._ended[kind, place] += self._weight
            kind = self._parents[kind]
        self._weight *= 1 + 1 / WINDOW
        if self._weight > 1e6:
            self._ended /= self._weight
            self._weight = 1.0
        self._unseen += 1
        self._stale |= self._unseen >= FRESH * min(self.learned, WINDOW)

    def refresh(self, kinds: Ints, generated: Ints) -> None:
        """Bring `table` and `mean` up to date, those who run having got so far."""
        if not self._stale:
            return
        rows = len(self._parents)
        reached = np.zeros((rows, BINS))
        np.add.at(reached, (kinds, bins(generated)), self._weight)
        for row in range(rows - 1, 0, -1):
            reached[self._parents[row]] += reached[row]
        hazard = self._hazard(self._ended[:rows] / self._weight, reached / self._weight)
        survival = np.ones((rows, BINS + 1))
        survival[:, 1:] = np.cumprod(1 - hazard, 1)
        self.table = np.where(WIDTHS > 1, (survival[:, :-1] + survival[:, 1:]) / 2, survival[:, :-1])
        self.mean = (self.table * WIDTHS).sum(1)
        self._stale, self._unseen = False, 0

    def _hazard(self, ended: Floats, running: Floats) -> Floats:
        at_risk = (ended + running)[:, ::-1].cumsum(1)[:, ::-1]
        hazard = np.empty_like(ended)
        for row, parent in enumerate(self._parents):
            above = hazard[parent] if parent >= 0 else self._guess(self._longest[row], ended[row], at_risk[row])
            weight = LEAN if parent >= 0 else PRIOR
            hazard[row] = (ended[row] + weight * above) / (at_risk[row] + weight)
        return hazard

    @staticmethod
    def _guess(longest: int, ended: Floats, at_risk: Floats) -> Floats:
        ends = EDGES[1:]
        uniform = PRIOR_PACE * WIDTHS / np.maximum(1, longest + 1 - EDGES[:-1])
        of_ended, of_all = (ended * ends).cumsum(), (at_risk * WIDTHS).cumsum() + PRIOR * ends
        going_on = np.minimum(MOST_ENDING, TAIL * of_ended / of_all * WIDTHS / ends)
        return np.minimum(1.0, np.maximum(uniform, going_on))

    def _recent(self, row: int) -> list[float]:
        return (self._ended[row] / self._weight).round(4).tolist()

    def save(self, path: Path) -> None:
        rows = [
            {"group": group, "size": size, "longest": self._longest[row], "ended": self._recent(row)}
            for (group, size), row in self._row_of.items()
        ]
        path.write_text(json.dumps(rows))

    @classmethod
    def load(cls, path: Path) -> "Lengths":
        lengths = cls()
        for entry in json.loads(path.read_text()):
            group, size = entry["group"], entry["size"]
            row = lengths._new_row((group, size), 0 if group < 0 else lengths._row_of[-1, size])
            lengths._longest[row] = entry["longest"]
            lengths._ended[row] = entry["ended"]
            if group < 0:
                lengths._longest[0] = max(lengths._longest[0], entry["longest"])
                lengths._ended[0] += entry["ended"]
        return lengths
