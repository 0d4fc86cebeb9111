"""Which slots of KV memory are free. One slot holds one token of one sequence: there are no blocks, so nothing is
wasted and nothing fragments. The free list is an array and a mark: to take is a slice, to give back is a copy.
"""

import numpy as np
from numpy.typing import NDArray

Slots = NDArray[np.int32]


class TokenSlots:
    """`capacity` slots, numbered from 0. Invariant: `free + held == capacity`."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"KV memory for {capacity} tokens: at least one is needed")
        self.capacity = capacity
        self.free = capacity
        self._stack = np.arange(capacity - 1, -1, -1, dtype=np.int32)  # the free ones are _stack[:free], top last

    @property
    def held(self) -> int:
        return self.capacity - self.free

    def free_slots(self) -> Slots:
        return self._stack[: self.free]

    def take(self, count: int) -> Slots:
        """`count` free slots; a MemoryError that changes nothing when there are fewer."""
        if count > self.free:
            raise MemoryError(f"{count} token slots wanted, {self.free} of {self.capacity} free")
        self.free -= count
        return self._stack[self.free : self.free + count].copy()

    def give_back(self, slots: Slots) -> None:
        """Return slots taken before. Each slot once: a slot returned twice would belong to two sequences."""
        assert self.free + len(slots) <= self.capacity, "more slots returned than were taken"
        self._stack[self.free : self.free + len(slots)] = slots
        self.free += len(slots)
