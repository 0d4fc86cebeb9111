"""What one step computes. A plan is made by the scheduler from its own books and is immutable: whoever executes it
(today one process, later every tensor-parallel rank) needs nothing else.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenllm.memory.token_slots import Slots
from tokenllm_kernels import LogitsRule

__all__ = ["LogitsRule", "Piece", "Plan", "Sampled"]


@dataclass(frozen=True)
class Piece:
    """One request's share of a step: the tokens at positions start … start + len(slots) of its row."""

    row: int
    start: int
    slots: Slots  # one per token
    ids: NDArray[np.int32] | None  # None: the one token the row sampled last, which only the device may know yet
    samples: bool  # choose the token that follows
    rule: LogitsRule
    logprobs: int | None  # report the chosen token's, and that many alternatives

    @property
    def tokens(self) -> int:
        return len(self.slots)

    @property
    def end(self) -> int:
        return self.start + len(self.slots)


@dataclass(frozen=True)
class Plan:
    """The pieces of one step, never empty."""

    pieces: tuple[Piece, ...]

    @property
    def tokens(self) -> int:
        return sum(piece.tokens for piece in self.pieces)


@dataclass(frozen=True)
class Sampled:
    """What a piece that samples gets back. Token -1: the model's output was not a number."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
