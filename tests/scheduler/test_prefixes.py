"""Rows that decode and share a prefix are found by the slots that they hold, and no others."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenllm.scheduler import prefixes
from tokenllm.scheduler.prefixes import PROBES, shared_prefixes

# who branched off whom (an earlier one), after how many tokens, and how many tokens of its own followed
BRANCHES = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 900), st.integers(1, 900)), min_size=1, max_size=30)


@given(BRANCHES, st.permutations(range(30)))
def test_members_hold_the_same_slots_and_no_row_is_in_two_groups(branches, order) -> None:
    slots, held = grown(branches)
    rows = np.array([row for row in order if row < len(branches)])
    groups = shared_prefixes(slots, rows, held[rows])
    members = [place for group in groups for place in group.members.tolist()]
    assert len(set(members)) == len(members)
    for group in groups:
        theirs = rows[group.members]
        assert len(theirs) > 1 and group.row in theirs
        assert (held[theirs] >= group.tokens).all()
        assert (slots[theirs, : group.tokens] == slots[group.row, : group.tokens]).all()


def grown(branches: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Slots of each row and how many tokens it holds, nobody's slots being anybody else's unless shared."""
    slots, held = np.zeros((len(branches), 30_000), np.int32), np.zeros(len(branches), np.int32)
    taken = 0
    for row, (parent, shared, own) in enumerate(branches):
        if row:
            shared = min(shared, int(held[parent % row]))
            slots[row, :shared] = slots[parent % row, :shared]
        else:
            shared = 0
        slots[row, shared : shared + own] = range(taken, taken + own)
        taken += own
        held[row] = shared + own
    return slots, held


def test_a_common_prefix_of_many_is_found_whole() -> None:
    slots, held = grown([(0, 0, 2048 + 9)] + [(0, 2048, 9)] * 7)
    (group,) = shared_prefixes(slots, np.arange(8), held)
    assert group.tokens == 2048 and group.members.tolist() == list(range(8))


def test_the_cut_that_saves_most_is_taken() -> None:
    """Twelve share 1024 tokens, and two of them 3072: 11·1024 is more than 1·3072."""
    slots, held = grown([(0, 0, 4000)] + [(0, 1024, 9)] * 10 + [(0, 3072, 9), (9, 0, 5000)])
    (group,) = shared_prefixes(slots, np.arange(13), held)
    assert group.tokens == 1024 and group.members.tolist() == list(range(12))


def test_hardly_anything_shared_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    slots, held = grown([(0, 0, 400), (0, 200, 100)])
    assert shared_prefixes(slots, np.arange(2), held) == ()
    monkeypatch.setattr(prefixes, "LEAST_SAVED", 1)
    (group,) = shared_prefixes(slots, np.arange(2), held)
    assert group.tokens == max(probe for probe in PROBES if probe <= 200)
