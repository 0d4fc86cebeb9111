"""What a router knows of requests: numbers in columns, one entry per request, and what it decides from them.

A running request computes `unread` tokens before its next one is sampled: its prompt at first (and after a pause what
it had generated too), then just its newest token. So it holds `prompt + generated - unread` tokens of KV memory.
"""

from dataclasses import dataclass, fields
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Columns:
    """Requests that run, in the order of admission, or that wait, in any order."""

    uid: Ints
    prompt: Ints
    generated: Ints
    max_tokens: Ints
    unread: Ints  # for one that waits: what a prefix hit leaves to compute
    shared: Ints  # of its tokens, those that others who run hold too: they cost nothing more, nor come free with it
    arrival: Floats
    kind: Ints  # its row in Lengths
    tenant: Ints
    priority: Ints  # higher goes first

    def __len__(self) -> int:
        return len(self.uid)

    def take(self, places: Ints | slice) -> "Columns":
        return Columns(*[column[places] for column in _columns(self)])

    def then(self, others: "Columns") -> "Columns":
        return Columns(*map(np.concatenate, zip(_columns(self), _columns(others), strict=True)))

    @property
    def whole(self) -> Ints:
        """The tokens each holds once it has read all it has, in slots it pays for."""
        return self.prompt + self.generated - self.shared

    @property
    def held(self) -> Ints:
        """The slots that come free if it leaves."""
        return self.whole - self.unread

    @property
    def most(self) -> Ints:
        """The slots each will have paid for if it generates all it may."""
        return self.prompt + self.max_tokens - self.shared

    @property
    def decodes(self) -> NDArray[np.bool_]:
        return self.unread == 1


_columns = attrgetter(*(field.name for field in fields(Columns)))


@dataclass(frozen=True)
class Decision:
    """What one step does. Whoever is not told to compute keeps its memory and is held for this step."""

    admit: Ints  # places among the waiting, in the order of admission
    pause: Ints  # places among the running
    tokens: Ints  # to compute in this step: of the running, then of the admitted
