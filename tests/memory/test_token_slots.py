"""Law: free and held make up the capacity, and no slot is ever held twice."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenllm.memory.token_slots import TokenSlots


@given(st.integers(1, 200), st.lists(st.tuples(st.booleans(), st.integers(0, 60)), max_size=60))
def test_every_slot_is_free_or_held_once(capacity: int, deeds: list[tuple[bool, int]]) -> None:
    slots, held = TokenSlots(capacity), []
    for take, count in deeds:
        if take and count <= slots.free:
            held.append(slots.take(count))
        elif held and not take:
            slots.give_back(held.pop(count % len(held)))
        together = np.concatenate([*held, []])
        assert slots.free + slots.held == slots.capacity == capacity
        assert slots.held == len(together) == len(np.unique(together))
        assert ((together >= 0) & (together < capacity)).all()


def test_a_refusal_changes_nothing() -> None:
    slots = TokenSlots(8)
    slots.take(5)
    with pytest.raises(MemoryError, match="4 token slots wanted, 3 of 8 free"):
        slots.take(4)
    assert slots.free == 3


def test_what_is_taken_is_a_copy() -> None:
    """A slot list must not change under its holder when others give theirs back."""
    slots = TokenSlots(4)
    first, second = slots.take(2), slots.take(2)
    before = first.copy()
    slots.give_back(second[::-1].copy())
    assert (first == before).all()


def test_no_memory_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="0 tokens"):
        TokenSlots(0)
