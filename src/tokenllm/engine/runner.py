"""Executes plans: owns KV memory, the index table and everything else that lives where the model does.

`launch(plan)` returns a flight, `collect(flight)` what it sampled. Flights are collected in the order of their launch,
and all state belongs to that one order. On a CPU the work is done when `launch` returns, and `ahead` is 0: computing a
step before the last one is known would waste rows and keep newcomers waiting.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokenllm.engine.batch import Piece, Plan, Sampled
from tokenllm.models.decoder import Decoder
from tokenllm_kernels import plan_attention, sample, top_logprobs


@dataclass(frozen=True)
class Flight:
    """A launched step: one row per piece that samples, in the order of the plan."""

    pieces: tuple[Piece, ...]
    tokens: Tensor  # [pieces]
    logits: Tensor  # [pieces, vocab]


class Runner:
    """One model with `slots` tokens of KV memory and `rows` requests of at most `max_positions` tokens."""

    ahead = 0  # how many steps may be in flight when the next is launched

    def __init__(self, decoder: Decoder, slots: int, rows: int, max_positions: int) -> None:
        self._decoder = decoder
        self._padding_slot = slots
        self._kv = decoder.kv_memory(slots)
        self._index = torch.full((rows, max_positions), slots, dtype=torch.int32)  # [row, position] → slot
        self._last_token = torch.zeros(rows, dtype=torch.int64)
        self._counts: dict[int, Tensor] = {}  # row → how often each token was generated, for rows with penalties

    @torch.inference_mode()
    def launch(self, plan: Plan) -> Flight:
        pieces = plan.pieces
        for piece in pieces:
            self._index[piece.row, piece.start : piece.end] = torch.from_numpy(piece.slots)
        attention = plan_attention(
            self._index,
            [piece.row for piece in pieces],
            [piece.start for piece in pieces],
            [piece.tokens for piece in pieces],
            self._padding_slot,
            self._decoder.dtype,
        )
        logits = self._decoder(*self._inputs(pieces), self._kv, attention, _last_places(pieces))
        sampling = tuple(piece for piece in pieces if piece.samples)
        return Flight(sampling, self._sample(logits, sampling), logits)

    def _inputs(self, pieces: Sequence[Piece]) -> tuple[Tensor, Tensor, Tensor]:
        """ids, positions and slots of all tokens, each [tokens]."""
        ids = torch.cat([self._ids(piece) for piece in pieces]).clamp_(0, self._decoder.vocab_size - 1)
        positions = np.concatenate([np.arange(piece.start, piece.end) for piece in pieces])
        slots = np.concatenate([piece.slots for piece in pieces]).astype(np.int64)
        return ids, torch.from_numpy(positions), torch.from_numpy(slots)

    def _ids(self, piece: Piece) -> Tensor:
        if piece.ids is None:
            return self._last_token[piece.row : piece.row + 1]
        return torch.from_numpy(piece.ids.astype(np.int64))

    def _sample(self, logits: Tensor, pieces: Sequence[Piece]) -> Tensor:
        counts = [self._counts_of(piece) for piece in pieces]
        tokens = sample(logits, [p.rule for p in pieces], [p.end for p in pieces], counts)
        self._last_token[[p.row for p in pieces]] = tokens
        for token, count in zip(tokens, counts, strict=True):
            if count is not None:
                count[token] += 1
        return tokens

    def _counts_of(self, piece: Piece) -> Tensor | None:
        if piece.ids is not None:  # the prompt has just been read: nothing was generated yet
            self._counts.pop(piece.row, None)
        if not piece.rule.penalizes:
            return None
        if piece.row not in self._counts:
            self._counts[piece.row] = torch.zeros(self._decoder.vocab_size)
        return self._counts[piece.row]

    @torch.inference_mode()
    def collect(self, flight: Flight) -> tuple[Sampled, ...]:
        """One `Sampled` per piece of the plan that samples, in its order."""
        asked = [i for i, piece in enumerate(flight.pieces) if piece.logprobs is not None]
        sampled = [Sampled(token) for token in flight.tokens.tolist()]
        if asked:
            most = max(flight.pieces[i].logprobs or 0 for i in asked)
            chosen, values, ids = (t.tolist() for t in top_logprobs(flight.logits[asked], flight.tokens[asked], most))
            for place, i in enumerate(asked):
                wanted = flight.pieces[i].logprobs or 0
                top = tuple(zip(ids[place][:wanted], values[place][:wanted], strict=True))
                sampled[i] = Sampled(sampled[i].token, chosen[place], top)
        return tuple(sampled)


def _last_places(pieces: Sequence[Piece]) -> Tensor:
    """Where in the batch the last tokens of the pieces that sample stand."""
    ends = np.cumsum([piece.tokens for piece in pieces])
    return torch.from_numpy(ends[[piece.samples for piece in pieces]] - 1)
