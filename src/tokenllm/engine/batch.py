"""What one step computes. A plan is made by the scheduler from its own books and is immutable: whoever executes it
(today one process, later every tensor-parallel rank) needs nothing else. What repeats for every running request comes
in columns, so that a step costs no Python per request.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tokenllm.memory.token_slots import Slots
from tokenllm_kernels import LogitsRule

__all__ = ["Chunk", "Decodes", "Foretold", "LogitsRule", "Logprob", "Plan", "Pooled", "Sampled"]

Column = NDArray[np.int32]


def _no_slots() -> Slots:
    return np.empty(0, np.int32)


@dataclass(frozen=True)
class SharedPrefix:
    """Decodes whose first tokens lie in the same slots: whoever executes the step may read these once for all."""

    row: int  # of one of them
    tokens: int
    members: Column  # places among the decodes, two at least


@dataclass(frozen=True)
class Decodes:
    """One more token for each of these rows: the one the row sampled last, which only the device may know yet."""

    rows: Column
    positions: Column  # of that token
    slots: Slots  # where its K and V go
    prefixes: tuple[SharedPrefix, ...] = ()  # the same object as long as the rows are the same

    @classmethod
    def none(cls) -> "Decodes":
        nothing = np.empty(0, np.int32)
        return cls(nothing, nothing, nothing)


@dataclass(frozen=True)
class Foretold:
    """Tokens of a prompt whose logprobs are asked for: those that follow the chunk's tokens from `first` on."""

    uid: int
    first: int
    tokens: Column
    alternatives: int


@dataclass(frozen=True)
class Pooled:
    """Tokens of a prompt whose vector is asked for: the chunk's from `first` on."""

    uid: int
    first: int
    begins: bool  # there are none before them
    ends: bool  # nor after them


@dataclass(frozen=True)
class Chunk:
    """Part of a prompt, or all of it: the tokens at positions start … start + len(slots) of a row. The prompt of a
    request that was paused ends with what it had generated.
    """

    row: int
    start: int
    slots: Slots  # one per token
    ids: Column
    samples: bool  # the prompt ends here: choose the token that follows
    rule: LogitsRule
    logprobs: int | None  # report the chosen tokens', and that many alternatives
    prefix: Slots = field(default_factory=_no_slots)  # of all positions before `start`, where the row has adopted some
    generated: Column = field(default_factory=_no_slots)  # ids that the request itself has generated: penalties count
    foretold: Foretold | None = None
    pooled: Pooled | None = None

    @property
    def tokens(self) -> int:
        return len(self.slots)

    @property
    def end(self) -> int:
        return self.start + len(self.slots)


@dataclass(frozen=True)
class Plan:
    """One step, never empty: tokens are laid end to end, the decodes first. Every decode samples, and every last chunk
    of a prompt; what they sample comes back in this order.
    """

    decodes: Decodes
    chunks: tuple[Chunk, ...] = ()

    @cached_property
    def tokens(self) -> int:
        return len(self.decodes.rows) + sum(chunk.tokens for chunk in self.chunks)

    def foretold(self) -> Iterator[tuple[int, Foretold]]:
        """What is asked of prompts, each with the place in the batch of the token that foretells the first."""
        for place, chunk in self._places():
            if chunk.foretold:
                yield place + chunk.foretold.first, chunk.foretold

    def pooled(self) -> Iterator[tuple[slice, int, Pooled]]:
        """What goes into vectors, each with its places in the batch and its row."""
        for place, chunk in self._places():
            if chunk.pooled:
                yield slice(place + chunk.pooled.first, place + chunk.tokens), chunk.row, chunk.pooled

    def _places(self) -> Iterator[tuple[int, Chunk]]:
        place = len(self.decodes.rows)
        for chunk in self.chunks:
            yield place, chunk
            place += chunk.tokens

    @cached_property
    def sampling_rows(self) -> Column:
        last = [chunk.row for chunk in self.chunks if chunk.samples]
        return np.concatenate((self.decodes.rows, np.array(last, np.int32))) if last else self.decodes.rows


@dataclass(frozen=True)
class Logprob:
    """The raw model's log-probability of a chosen token, and the likeliest alternatives as (id, logprob)."""

    chosen: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Sampled:
    """What a step chose, in the order of `Plan.sampling_rows`. Token -1: the model's output was not a number.

    A vector is the sum of the hidden states that were pooled, so it points where their mean does.
    """

    tokens: Column
    logprobs: Mapping[int, Logprob] = field(default_factory=dict)  # place → of a row that asked
    foretold: Mapping[int, Sequence[tuple[int, Logprob]]] = field(default_factory=dict)  # uid → tokens of its prompt
    vectors: Mapping[int, NDArray[np.float32]] = field(default_factory=dict)  # uid → [hidden], of prompts that end
