"""A timer for what hardly ever takes too long: to put it off costs an assignment, and no timer of the event loop."""

import asyncio
from collections.abc import Callable
from math import inf


class Alarm:
    """Rings once, at the time that was set last. Times are those of the event loop, which is `time.monotonic`."""

    def __init__(self, ring: Callable[[], object]) -> None:
        self._ring = ring
        self._due_s = self._looks_s = inf
        self._look: asyncio.TimerHandle | None = None

    def set(self, due_s: float) -> None:
        """Ring then, and no more at the time before; never, if it is infinite."""
        self._due_s = due_s
        if due_s < self._looks_s:
            self._look_at(due_s)

    def stop(self) -> None:
        """Nothing is left in the event loop."""
        self._due_s = self._looks_s = inf
        if self._look:
            self._look.cancel()

    def _look_at(self, when_s: float) -> None:
        if self._look:
            self._look.cancel()
        self._looks_s = when_s
        self._look = asyncio.get_running_loop().call_at(when_s, self._looked)

    def _looked(self) -> None:
        """It may have been put off since."""
        looked_s, self._looks_s = self._looks_s, inf
        if self._due_s <= looked_s:
            self._due_s = inf
            self._ring()
        else:
            self.set(self._due_s)
