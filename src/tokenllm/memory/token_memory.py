"""All token slots of the server, and who holds them: each is free, cached (held by the prefix tree alone) or active (in
the rows of running requests, one or many). Owns the free slots and the tree; `free + cached + active == capacity`.
"""

from collections.abc import Iterable

import numpy as np

from tokenllm.memory.prefix_tree import PrefixTree
from tokenllm.memory.token_slots import Slots, TokenSlots


class TokenMemory:
    """What the tree alone holds is as good as free: it is forgotten, least recently used first, when room is wanted."""

    def __init__(self, capacity: int) -> None:
        self.prefixes = PrefixTree()
        self._slots = TokenSlots(capacity)

    @property
    def capacity(self) -> int:
        return self._slots.capacity

    @property
    def free(self) -> int:
        return self._slots.free

    @property
    def cached(self) -> int:
        return self.prefixes.evictable

    @property
    def active(self) -> int:
        """Distinct slots of running requests: what is shared counts once."""
        return self._slots.held - self.prefixes.evictable

    @property
    def available(self) -> int:
        """So many can be taken."""
        return self._slots.free + self.prefixes.evictable

    def take(self, count: int) -> Slots:
        """`count` slots for tokens to be computed; a MemoryError that changes nothing when fewer are available."""
        if count > self.available:
            raise MemoryError(f"{count} token slots wanted, {self.available} of {self.capacity} free or only cached")
        missing = count - self.free
        if missing > 0:
            self._slots.give_back(self.prefixes.evict(missing))
        return self._slots.take(count)

    def give_back(self, slots: Slots) -> None:
        """Return slots taken before, which neither a running request nor the tree holds."""
        self._slots.give_back(slots)

    def idle_slots(self) -> Slots:
        """Of which a step may take: free ones, and those of tokens that the tree alone holds."""
        return np.concatenate([self._slots.free_slots(), self.prefixes.unheld_slots()])

    def check(self, rows: Iterable[Slots]) -> None:
        """For tests: every slot is free, cached or active, and only one of them. `rows`: what running requests hold."""
        self.prefixes.check()
        active = np.unique(np.concatenate([np.empty(0, np.int32), *rows]))
        holders = np.bincount(np.concatenate([self.idle_slots(), active]))
        wrong = (holders != 1).nonzero()[0]
        assert len(holders) == self.capacity and not len(wrong), f"slots not held exactly once: {wrong}"
        assert self.active == len(active), (
            f"{self.active} slots are counted as active, running requests hold {len(active)}"
        )
