"""tokenllm's own policy: memory by conditional survival, the shortest service first without letting anybody starve."""

from collections import deque

import numpy as np

from tokenllm.routing.columns import Columns, Floats, Ints
from tokenllm.routing.lengths import BINS, LOOKED_UP, Lengths, bins
from tokenllm.routing.order import ShortestService
from tokenllm.routing.pace import Pace

AHEAD: Ints = np.unique(np.geomspace(1, LOOKED_UP, 24).astype(np.int64)) - 1  # steps at which memory is looked at
CAUTION = 1.5  # z at first
BOLDEST, MOST_CAREFUL = 0.5, 2.5
STEP = 0.03  # by which z rises when somebody is paused for the first time
PAUSED = 0.022  # of the requests with long answers may be paused; it overshoots by a fifth before it has learned
LONG, LEAST = 1000.0, 0.2  # of those with shorter ones in proportion, down to a fifth
RELIEF_STEPS = 100  # a pause shall free what so many steps of the others take
REMEMBERED = 1024  # of those who were paused


class TokenLLM(ShortestService):
    """Admits while, at every step t ahead,  mean(t) + z·sigma(t) ≤ room.

    Request i, which has generated d, still lives t steps on with probability  q = S(d+t) / S(d)  and then holds
    x = its tokens + t:

        mean(t) = Σ q·x        sigma(t)² = Σ q·(1 - q)·x²

    S is learned (lengths.py), 0 beyond `max_tokens`. z is what keeps the share of the requests that are ever paused at

        PAUSED · min(1, max(LEAST, length / LONG))

    by small steps: up with each of them, down with each finish. Who was paused comes back as soon as the mean fits,
    and is the first to be paused again: its tokens are mostly still cached, and its reader has waited already.
    """

    def __init__(self, lengths: Lengths, pace: Pace, capacity: int, paused: float = PAUSED) -> None:
        super().__init__(pace, capacity)
        self.lengths = lengths
        self._z, self._paused = CAUTION, paused
        self._were_paused: deque[int] = deque(maxlen=REMEMBERED)

    def order(self, now: float, running: Columns, waiting: Columns, most: int) -> Ints:
        self.lengths.refresh(running.kind, running.generated)
        return super().order(now, running, waiting, most)

    def expected(self, waiting: Columns) -> Floats:
        return np.maximum(1.0, np.minimum(self.lengths.mean[waiting.kind], waiting.max_tokens) - waiting.generated)

    def admits(self, running: Columns, candidates: Columns, room: float) -> int:
        if running.most.sum() + candidates.most.sum() <= room:
            return len(candidates)  # however long their answers get
        mean, variance = self.ahead(running.then(candidates))
        count, all_one = len(running), np.ones(len(running))
        means = all_one @ mean[:count] + mean[count:].cumsum(0)
        variances = all_one @ variance[:count] + variance[count:].cumsum(0)
        z = np.where(candidates.generated > 0, 0.0, self._z)
        highest = (means + z[:, None] * np.sqrt(variances)).max(1)
        return int(np.logical_and.accumulate(highest <= room).sum())

    def peak(self, running: Columns) -> float:
        """As lengths were known when the queue was last put in order: to ask changes nothing."""
        if not len(running):
            return 0.0
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
        """Who was paused before; then the cheapest to compute again among those large enough to make room for a while;
        else the largest."""
        again = np.isin(running.uid, np.array(self._were_paused, np.int64))
        held = running.held
        return np.lexsort((np.where(held >= RELIEF_STEPS * len(running), held, 1e9 - held), ~again))

    def paused(self, requests: Columns) -> None:
        first = [uid for uid in requests.uid.tolist() if uid not in self._were_paused]
        self._were_paused.extend(first)
        self._z = min(MOST_CAREFUL, self._z + STEP * len(first))

    def learn(self, kind: int, length: int) -> None:
        self._z = max(BOLDEST, self._z - STEP * self._paused * min(1.0, max(LEAST, length / LONG)))
        self.lengths.learn(kind, length)
