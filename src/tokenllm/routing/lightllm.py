"""LightLLM's rule of 2026: one moving average of finished lengths stands for everybody's length."""

import numpy as np

from tokenllm.routing.columns import Columns, Ints
from tokenllm.routing.first_come import FirstCome
from tokenllm.routing.peaks import peak


class LightLLM(FirstCome):
    """Admits while the sorted cumulative peak of  (a, b)  stays below the room, with

        a = prompt + generated + 1
        M = max_tokens                                     when busy: at least 85 % of the room is in use
            min(max_tokens, max(1.1·generated, average))   otherwise
        b = max(0, M - generated - 1 + reading steps) + 16

    The average begins at 2048; each finish moves it towards max(length, 64), by half at first and at last by 0.04.
    """

    def __init__(self, chunk_tokens: int = 2048) -> None:
        self.average, self._alpha = 2048.0, 0.5
        self._chunk_tokens = chunk_tokens

    def admits(self, running: Columns, candidates: Columns, room: float) -> int:
        busy = bool(running.held.sum() >= 0.85 * room)
        everybody = running.then(candidates)
        tokens, steps = everybody.whole + 1, self._steps(everybody, busy)
        for count in range(1, len(candidates) + 1):
            alive = slice(len(running) + count)
            if peak(tokens[alive], steps[alive]) >= room:
                return count - 1
        return len(candidates)

    def peak(self, running: Columns) -> float:
        return peak(running.whole + 1, self._steps(running, busy=False))

    def _steps(self, requests: Columns, busy: bool) -> Ints:
        most = requests.max_tokens
        if not busy:
            most = np.minimum(most, np.maximum(1.1 * requests.generated, self.average).astype(np.int64))
        reading = np.where(requests.decodes, 0, -(-requests.unread // self._chunk_tokens) * 2)
        return np.maximum(0, reading + most - requests.generated - 1) + 16

    def learn(self, kind: int, length: int) -> None:
        self.average += self._alpha * (max(length, 64) - self.average)
        self._alpha = max(0.04, self._alpha * 0.8)
