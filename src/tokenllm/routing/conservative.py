"""The worst case: everybody may generate `max_tokens`."""

from tokenllm.routing.columns import Columns
from tokenllm.routing.first_come import FirstCome


class WorstCase(FirstCome):
    """Admits while  Σ (prompt + max_tokens - 1) ≤ room.

    Nobody is ever paused; memory reserved and unused is the price.
    """

    def admits(self, running: Columns, candidates: Columns, room: float) -> int:
        after = self.peak(running) + (candidates.prompt + candidates.max_tokens - 1 - candidates.shared).cumsum()
        return int((after <= room).sum())

    def peak(self, running: Columns) -> float:
        return float((running.prompt + running.max_tokens - 1 - running.shared).sum())
