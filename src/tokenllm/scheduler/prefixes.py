"""Which rows that decode share a prefix: those that hold the same slots. A slot belongs to one token after one history,
so rows with the same slot at some position share everything up to it.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from tokenllm.engine.batch import Column, SharedPrefix

LEAST_SAVED = 8192  # tokens that a step need not read: for fewer the detour does not pay
PROBES = [64 * 2**octave * half for octave in range(12) for half in (2, 3)]  # tokens: the lengths that are looked at


def shared_prefixes(slots: NDArray[np.int32], rows: NDArray[np.intp], known: Column) -> tuple[SharedPrefix, ...]:
    """Groups of those `rows` that share most; a row is in one at most. None where all of it would not pay.

    slots [rows of the batch, positions]; known: of each of `rows`, the tokens whose slots it holds.
    """
    best, whose = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    sharing = np.arange(len(rows))
    for tokens in PROBES:
        long = sharing[known[sharing] >= tokens]
        if len(long) < 2:
            break
        at = slots[rows[long], tokens - 1].astype(np.int64)
        gain = (_holders(at) - 1) * tokens  # tokens that need not be read where all with the same slot join
        better = gain > best[long]
        best[long[better]], whose[long[better]] = gain[better], at[better] * len(PROBES) + PROBES.index(tokens)
        sharing = long[gain > 0]  # who shares nothing up to here shares nothing further on
    groups = tuple(_groups(rows, best, whose))
    saved = sum((len(group.members) - 1) * group.tokens for group in groups)
    return groups if saved >= LEAST_SAVED else ()


def _holders(at: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many have the same slot as each."""
    ordered = np.sort(at)
    return ordered.searchsorted(at, "right") - ordered.searchsorted(at)


def _groups(rows: NDArray[np.intp], best: NDArray[np.int64], whose: NDArray[np.int64]) -> Iterable[SharedPrefix]:
    sharing = (best > 0).nonzero()[0]
    names, which = np.unique(whose[sharing], return_inverse=True)
    for number, name in enumerate(names.tolist()):
        members = sharing[which == number].astype(np.int32)
        if len(members) > 1:
            yield SharedPrefix(int(rows[members[0]]), PROBES[name % len(PROBES)], members)
