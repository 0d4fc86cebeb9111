"""When it is worth coming back to a full queue: what all who wait will take of the machine, by the rate at which it
has lately served. Owns that rate, and the mean length of answers.
"""

import math

import numpy as np

from tokenllm.routing.columns import Columns
from tokenllm.routing.pace import Pace

WINDOW_S = 60.0
RECENT = 0.05  # weight of the newest answer in the mean length
LONGEST_S = 60


class Backlog:
    """Service is seconds of the machine, as `Pace` has it."""

    def __init__(self, pace: Pace, capacity: int) -> None:
        self._pace, self._capacity = pace, capacity
        self._length = 0.0
        self._rate, self._rate_at_s = 0.0, 0.0

    def finished(self, length: int) -> None:
        self._length += (RECENT if self._length else 1.0) * (length - self._length)

    def admitted(self, now: float, requests: Columns) -> None:
        fades = math.exp((self._rate_at_s - now) / WINDOW_S) if self._rate else 0.0
        self._rate = self._rate * fades + self._service_s(requests) / WINDOW_S
        self._rate_at_s = now

    def retry_after_s(self, waiting: Columns) -> int:
        """At least a second, at most a minute."""
        if not self._rate:
            return 1
        return max(1, min(LONGEST_S, math.ceil(self._service_s(waiting) / self._rate)))

    def _service_s(self, requests: Columns) -> float:
        left = np.minimum(requests.max_tokens - requests.generated, self._length or math.inf)
        return float(self._pace.service_s(requests.unread, requests.whole, left, self._capacity).sum())
