"""Past-Future scheduling (ASPLOS'25): lengths are drawn from the past, and the worst of a few draws must fit."""

import numpy as np

from tokenllm.routing.columns import Columns, Floats
from tokenllm.routing.first_come import FirstCome
from tokenllm.routing.peaks import peak, peaks

WINDOW = 1000
RESERVE = 0.03


class PastFuture(FirstCome):
    """Admits while  max over N draws of peak(tokens held, length drawn - generated) < room·(1 - reserve).

    N = min(5, 200 / running + 1). Who runs draws from the lengths above what it has generated, interpolated, with its
    `max_tokens` as the longest; a candidate draws any. The window begins with the first `max_tokens` that it sees.
    """

    retries = True

    def __init__(self, seed: int = 0, reserve: float = RESERVE) -> None:
        self._random = np.random.default_rng(seed)
        self._foresees = np.random.default_rng(seed)  # of its own: to ask for the peak changes nothing
        self._share = 1 - reserve
        self._past: list[int] = []
        self._sorted: Floats = np.zeros(0)

    def admits(self, running: Columns, candidates: Columns, room: float) -> int:
        if not len(candidates):
            return 0
        if not self._past:
            self._past = [int(candidates.max_tokens[0])]
            self._sorted = np.sort(np.array(self._past, float))
        draws = min(5, 200 // max(1, len(running)) + 1)
        tokens = np.broadcast_to(running.whole, (draws, len(running)))
        steps = self._draw(running, draws, self._random)
        for count in range(len(candidates)):
            one = candidates.take(np.array([count]))
            tokens = np.concatenate((tokens, np.broadcast_to(one.whole, (draws, 1))), 1)
            steps = np.concatenate((steps, self._draw(one, draws, self._random)), 1)
            if peaks(tokens, steps).max() >= room * self._share:
                return count
        return len(candidates)

    def peak(self, running: Columns) -> float:
        return peak(running.whole, self._draw(running, 1, self._foresees)[0]) if self._past else super().peak(running)

    def _draw(self, requests: Columns, draws: int, random: np.random.Generator) -> Floats:
        """Steps each still lives, [draws, requests]."""
        past = np.append(self._sorted, self._sorted[-1] if len(self._sorted) else 1)
        first = np.searchsorted(past, requests.generated, "right").astype(float)
        place = first + random.random((draws, len(requests))) * np.maximum(0, len(past) - 1 - first)
        below = np.minimum(place.astype(np.int64), len(past) - 2)
        length = past[below] + (place - below) * (past[below + 1] - past[below])
        length = np.where(first >= len(past) - 1, requests.max_tokens, np.minimum(length, requests.max_tokens))
        return np.maximum(1, length - requests.generated)

    def learn(self, kind: int, length: int) -> None:
        self._past.append(length)
        del self._past[:-WINDOW]
        self._sorted = np.sort(np.array(self._past, float))
