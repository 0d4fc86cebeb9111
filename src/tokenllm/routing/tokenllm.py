"""tokenllm's own policy: memory by conditional survival, the shortest service first without letting anybody starve."""

import numpy as np

from tokenllm.routing.columns import Columns, Floats, Ints
from tokenllm.routing.lengths import BINS, LOOKED_UP, Lengths, bins
from tokenllm.routing.order import ShortestService
from tokenllm.routing.pace import Pace

AHEAD: Ints = np.unique(np.geomspace(1, LOOKED_UP, 24).astype(np.int64)) - 1  # steps at which memory is looked at
CAUTION = 1.7  # z, at first and at most
BOLDEST = 0.5
PAUSES = 0.007  # of the requests that finish: with fewer, z falls
STEP = 0.1  # by which a pause raises z
RELIEF_STEPS = 200  # a pause shall free what so many steps of the others take


class TokenLLM(ShortestService):
    """Admits while, at every step t ahead,  mean(t) + z·sigma(t) ≤ room.

    Request i, which has generated d, still lives t steps on with probability  q = S(d+t) / S(d)  and then holds
    x = its tokens + t:

        mean(t) = Σ q·x        sigma(t)² = Σ q·(1 - q)·x²

    S is learned (lengths.py), 0 beyond `max_tokens`. z is slowly lowered while hardly anybody has to be paused, and
    raised by each pause: where many small requests run, little reserve is needed.
    """

    def __init__(self, lengths: Lengths, pace: Pace, capacity: int, caution: float = CAUTION) -> None:
        super().__init__(pace, capacity)
        self.lengths = lengths
        self._z = self._most = caution

    def order(self, now: float, running: Columns, waiting: Columns, most: int) -> Ints:
        self.lengths.refresh(running.kind, running.generated)
        return super().order(now, running, waiting, most)

    def expected(self, waiting: Columns) -> Floats:
        return np.maximum(1.0, np.minimum(self.lengths.mean[waiting.kind], waiting.max_tokens) - waiting.generated)

    def admits(self, running: Columns, candidates: Columns, room: float) -> int:
        mean, variance = self.ahead(running.then(candidates))
        count, all_one = len(running), np.ones(len(running))
        means = all_one @ mean[:count] + mean[count:].cumsum(0)
        variances = all_one @ variance[:count] + variance[count:].cumsum(0)
        highest = (means + self._z * np.sqrt(variances)).max(1)
        return int(np.logical_and.accumulate(highest <= room).sum())

    def peak(self, running: Columns) -> float:
        if not len(running):
            return 0.0
        self.lengths.refresh(running.kind, running.generated)
        mean, variance = self.ahead(running)
        return float((mean.sum(0) + self._z * np.sqrt(variance.sum(0))).max())

    def kind(self, group: int, max_tokens: int) -> int:
        return self.lengths.kind(group, max_tokens)

    def ahead(self, requests: Columns) -> tuple[Floats, Floats]:
        """Mean and variance of what each holds at the steps AHEAD, [requests, steps]."""
        left = requests.max_tokens - requests.generated
        steps = AHEAD[: int(np.searchsorted(AHEAD, left.max()))]
        places = bins(requests.generated[:, None] + steps)
        lives = self.lengths.table.take(places + (requests.kind * BINS)[:, None])
        lives /= np.maximum(1e-9, lives[:, :1])
        lives *= steps < left[:, None]
        tokens = (requests.whole[:, None] + steps).astype(float)
        mean = lives * tokens
        return mean, mean * (tokens - mean)

    def victims(self, running: Columns) -> Ints:
        """The cheapest to compute again among those large enough to make room for a while; else the largest."""
        held = running.held
        return np.argsort(np.where(held >= RELIEF_STEPS * len(running), held, 1e9 - held), kind="stable")

    def paused(self, requests: Columns) -> None:
        self._z = min(self._most, self._z + STEP * len(requests))

    def learn(self, kind: int, length: int) -> None:
        self._z = max(min(BOLDEST, self._most), self._z - STEP * PAUSES)
        self.lengths.learn(kind, length)
