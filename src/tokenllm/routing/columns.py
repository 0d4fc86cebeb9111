"""What a router knows of requests: numbers in columns, one entry per request, and what it decides from them.

A running request computes `unread` tokens before its next one is sampled: its prompt at first (and after a pause what
it had generated too), then just its newest token. So it holds `prompt + generated - unread` tokens of KV memory.
"""

import numpy as np
from msgspec import Struct
from msgspec.structs import astuple
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Columns(Struct, frozen=True):
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
        return Columns(*[column[places] for column in astuple(self)])

    def first(self, count: int) -> "Columns":
        return self if count == len(self) else self.take(slice(count))

    def then(self, others: "Columns") -> "Columns":
        return Columns(*map(np.concatenate, zip(astuple(self), astuple(others), strict=True)))

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


class Decision(Struct, frozen=True):
    """What one step does. Every stream that is not paused gets its token; the rest of the tokens are of prompts."""

    admit: Ints  # places among the waiting, in the order of admission
    pause: Ints  # places among the running
    tokens: int  # to compute in this step
