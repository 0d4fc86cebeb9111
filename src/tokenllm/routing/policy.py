"""Who may join the running batch. A policy sees only numbers, so that a simulator can run the very same code."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Demand:
    """What one request holds and may still take of KV memory, in tokens."""

    prompt: int
    generated: int
    max_tokens: int

    @property
    def most(self) -> int:
        """The tokens it holds at its longest; the last one generated is never stored."""
        return self.prompt + self.max_tokens - 1


@dataclass(frozen=True)
class Demands:
    """The same of many requests, in columns: one entry per request."""

    prompt: NDArray[np.int32]
    generated: NDArray[np.int32]
    max_tokens: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.prompt)


class Conservative:
    """Admits a request only if everybody could reach `max_tokens`: Σ (prompt + max_tokens - 1) ≤ capacity.

    Nobody is ever paused, and memory that is reserved but never used is the price.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity

    def predicted_peak(self, running: Demands) -> int:
        """The most token slots the running requests will hold together."""
        return int(running.prompt.sum(dtype=np.int64) + running.max_tokens.sum(dtype=np.int64)) - len(running)

    def admits(self, candidate: Demand, running: Demands) -> bool:
        return self.predicted_peak(running) + candidate.most <= self.capacity
