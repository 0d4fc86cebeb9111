"""From logits to tokens and log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_TEMPERATURE = 1e-30  # float32 takes anything less for zero
LIKELY = 1024  # tokens that nearly always hold the nucleus; sorting the whole vocabulary costs more than a small model


@dataclass(frozen=True)
class LogitsRule:
    """How one row's next token is chosen: temperature 0 is greedy, top_k 0 and top_p 1 are off."""

    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    @property
    def penalizes(self) -> bool:
        return self.frequency_penalty != 0 or self.presence_penalty != 0


def sample(
    logits: Tensor, rules: Sequence[LogitsRule], positions: Sequence[int], counts: Sequence[Tensor | None]
) -> Tensor:
    """Choose the next token of each row: [rows] int64, or -1 where the logits hold a NaN or nothing finite.

    logits [rows, vocab] float32; positions: of the token to be chosen; counts: how often each token was generated
    before, [vocab], for rows whose rule penalizes. The order is OpenAI's: penalties, temperature, top-k, top-p.
    A row's randomness is `philox_uniform(seed, position)`, so its token does not depend on its neighbours.
    """
    highest, chosen = logits.max(-1)
    for row, rule in enumerate(rules):
        if rule.penalizes or rule.temperature > 0:
            chosen[row] = _sample_row(logits[row], rule, positions[row], counts[row])
    return chosen.masked_fill_(~highest.isfinite(), -1)


def _sample_row(logits: Tensor, rule: LogitsRule, position: int, counts: Tensor | None) -> Tensor:
    if rule.penalizes and counts is not None:
        logits = logits - rule.frequency_penalty * counts - rule.presence_penalty * (counts > 0)
    if rule.temperature == 0:
        return logits.argmax()
    # from the highest down: however small the temperature, the likeliest stays finite
    p, ids = _candidates((logits - logits.max()) / max(rule.temperature, SMALLEST_TEMPERATURE), rule)
    upto = p.cumsum(-1, dtype=torch.float64)
    total = float(upto[-1])
    # a product that rounds up to the total would point past the last token
    drawn = torch.searchsorted(
        upto, min(total * philox_uniform(rule.seed, position), math.nextafter(total, 0)), right=True
    )
    return drawn if ids is None else ids[drawn]


def _candidates(logits: Tensor, rule: LogitsRule) -> tuple[Tensor, Tensor | None]:
    """What may be drawn: probabilities (not normalised again after top-p) and ids, None when it is the vocabulary."""
    vocab = logits.numel()
    if 0 < rule.top_k < vocab:
        values, ids = logits.topk(rule.top_k)
        p = values.softmax(-1)
    elif rule.top_p < 1:
        p, ids = logits.softmax(-1).topk(min(LIKELY, vocab))
        if p.sum() < rule.top_p:  # a flat distribution: all of it has to be sorted
            p, ids = logits.softmax(-1).sort(descending=True)
    else:
        return logits.softmax(-1), None
    before = p.cumsum(-1) - p
    return p * (before < rule.top_p), ids  # the nucleus: the fewest whose mass reaches top_p (Holtzman et al., 2019)


def philox_uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits that depends on (seed, position) alone.

    Philox 4x32-10 (Salmon et al., 2011: "Parallel random numbers: as easy as 1, 2, 3"), key = seed, counter = position.
    """
    c0, c1, c2, c3 = position & 0xFFFFFFFF, position >> 32, 0, 0
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 1 << 32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return ((c0 << 21) | (c1 >> 11)) / (1 << 53)


def top_logprobs(logits: Tensor, chosen: Tensor, alternatives: int) -> tuple[Tensor, Tensor, Tensor]:
    """The raw model's log-probabilities, before temperature, penalties and masks.

    logits [rows, vocab]; chosen [rows] → (of the chosen [rows], of the likeliest [rows, alternatives], their ids).
    """
    logprobs = logits.float().log_softmax(-1)
    top = logprobs.topk(alternatives, -1)
    return logprobs.gather(-1, chosen.clamp(min=0)[:, None])[:, 0], top.values, top.indices
