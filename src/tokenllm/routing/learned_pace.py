"""The pace of the very machine it runs on: a step's line, fitted to the steps that were measured, old ones fading.

Least squares of four numbers, none of which may be negative. Before anything is measured it is a guess.
"""

import numpy as np

from tokenllm.routing.columns import Floats
from tokenllm.routing.pace import Pace

TARGET_S = 0.05  # between two tokens of a stream, while others' prompts are read
LEAST_CHUNK = 256  # however late the streams are, prompts are read: so much, or an eighth of the most
WINDOW = 500  # measured steps after which one weighs 1/e of a new one
FITTED_EVERY = 16
LATE = 4.0  # a step that takes so many times what was expected was disturbed: it counts as no longer than that
UNITS: Floats = np.array([1.0, 1e4, 1e2, 1e3])  # steps, tokens held, decodes, tokens read: numbers of like size
GUESS: Floats = np.array([0.02, 0.0, 0.0, 0.03])  # s for each of these units
FAITH = 1e-3  # in the guess, in steps
SHORTEST_S = 1e-9  # nothing takes no time


class LearnedPace(Pace):
    """Tell it what steps `took`."""

    def __init__(self, most_chunk: int) -> None:
        least = min(LEAST_CHUNK, max(1, most_chunk // 8))
        step, held, decode, read = (GUESS / UNITS).tolist()
        super().__init__(step, held, decode, read, TARGET_S, least, most_chunk)
        self._products, self._sums = np.zeros((4, 4)), np.zeros(4)
        self._found, self._count = GUESS, 0
        self._steps: list[tuple[float, ...]] = []  # seconds and load of those that the sums do not contain yet

    def took(self, seconds: float, held: int, decodes: int, read: int) -> None:
        """A step in which so many streams, who held so many tokens, and so many prompt tokens were computed."""
        self._steps.append((seconds, 1.0, held, decodes, read))
        self._count += 1
        if len(self._steps) == FITTED_EVERY or self._count < FITTED_EVERY:
            self._fit()

    def _fit(self) -> None:
        seconds, loads = np.split(np.array(self._steps), [1], 1)
        loads /= UNITS
        if self._count > WINDOW / 8:
            seconds = np.minimum(seconds, LATE * (loads @ self._found)[:, None])
        fades = (1 - 1 / WINDOW) ** np.arange(len(self._steps))[::-1, None]
        fade = fades[0] * (1 - 1 / WINDOW)
        self._products = fade * self._products + loads.T @ (fades * loads)
        self._sums = fade * self._sums + (fades * seconds * loads).sum(0)
        self._steps = []
        self._found = _least_squares(self._products + FAITH * np.eye(4), self._sums + FAITH * GUESS)
        step, held, decode, read = np.maximum(self._found / UNITS, [SHORTEST_S, 0, 0, SHORTEST_S]).tolist()
        self.step_s, self.per_held_s, self.per_decode_s, self.per_read_s = step, held, decode, read


def _least_squares(products: Floats, sums: Floats) -> Floats:
    """Whatever would be negative is nothing, and the others are found anew without it."""
    found, free = np.zeros(len(sums)), np.arange(len(sums))
    while len(free):
        found[:] = 0
        found[free] = np.linalg.solve(products[np.ix_(free, free)], sums[free])
        if (found >= 0).all():
            break
        free = (found > 0).nonzero()[0]
    return found
