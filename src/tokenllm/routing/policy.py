"""Who may join the running batch. A policy sees only numbers, so that a simulator can run the very same code."""

from collections.abc import Iterable
from dataclasses import dataclass


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


class Conservative:
    """Admits a request only if everybody could reach `max_tokens`: Σ (prompt + max_tokens - 1) ≤ capacity.

    Nobody is ever paused, and memory that is reserved but never used is the price.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity

    def predicted_peak(self, running: Iterable[Demand]) -> int:
        """The most token slots the running requests will hold together."""
        return sum(demand.most for demand in running)

    def admits(self, candidate: Demand, running: Iterable[Demand]) -> bool:
        return self.predicted_peak(running) + candidate.most <= self.capacity
