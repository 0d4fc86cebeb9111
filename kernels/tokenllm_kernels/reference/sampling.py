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
    """How one row's next token is chosen: temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off."""

    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    min_p: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, added to its logit), each token once; -inf masks it
    only_biased: bool = False  # tokens that logit_bias does not name are masked
    muted: tuple[int, ...] = ()  # masked at the positions before `muted_until`
    muted_until: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()  # of two tokens or more: the last is masked right after the others
    repetition_penalty: float = 1.0  # divides logits above 0, multiplies those below; of generated tokens …
    prompt: tuple[int, ...] = ()  # … and of these, which only such a rule names

    @property
    def penalizes(self) -> bool:
        return self.frequency_penalty != 0 or self.presence_penalty != 0 or self.repetition_penalty != 1

    @property
    def has_lists(self) -> bool:
        """Whether it names tokens: it has no bound on its length then."""
        return bool(self.logit_bias or self.only_biased or self.muted or self.bad_words or self.prompt)

    @property
    def adjusts(self) -> bool:
        return self.penalizes or self.has_lists


def sample(
    logits: Tensor,
    rules: Sequence[LogitsRule],
    positions: Sequence[int],
    counts: Sequence[Tensor | None],
    said: Sequence[Sequence[int]] = (),
) -> Tensor:
    """Choose the next token of each row: [rows] int64, or -1 where the logits hold a NaN or nothing finite.

    logits [rows, vocab] float32; positions: of the token to be chosen; counts: how often each token was generated
    before, [vocab], for rows whose rule penalizes; said: what each row generated last, for rules with bad words; none
    where no rule has any. The order: bias, masks, penalties (repetition, frequency, presence), temperature, top-k,
    top-p of what top-k left, min-p. Every filter keeps the tokens from some logit up, so equal logits stay or go
    together; among equal highest ones greedy takes the lowest id. The draw walks the kept tokens by id until their
    weight exceeds `philox_uniform(seed, position)` of the whole, so a row's token does not depend on its neighbours.
    """
    highest, chosen = logits.max(-1)
    usable = highest.isfinite()
    for row, rule in enumerate(rules):
        if usable[row] and (rule.adjusts or rule.temperature > 0):
            mine = (
                _masked(logits[row], rule, positions[row], said[row] if said else ()) if rule.has_lists else logits[row]
            )
            if rule.penalizes:
                mine = _penalized(mine, rule, counts[row])
            chosen[row] = _sample_row(mine, rule, positions[row])
    return chosen.masked_fill_(~usable, -1)


def _masked(logits: Tensor, rule: LogitsRule, position: int, said: Sequence[int]) -> Tensor:
    """With the bias, and without what may not come here."""
    ids = logits.new_tensor([token for token, _ in rule.logit_bias], dtype=torch.long)
    named = logits[ids] + logits.new_tensor([value for _, value in rule.logit_bias])
    masked = torch.full_like(logits, -math.inf) if rule.only_biased else logits.clone()
    masked[ids] = named
    bad = [word[-1] for word in rule.bad_words if tuple(said[1 - len(word) :]) == word[:-1]]
    muted = rule.muted if position < rule.muted_until else ()
    masked[[*bad, *muted]] = -math.inf
    return masked


def _penalized(logits: Tensor, rule: LogitsRule, counts: Tensor | None) -> Tensor:
    assert counts is not None, "rules that penalize come with counts"
    if rule.repetition_penalty != 1:
        repeated = counts > 0
        repeated[list(rule.prompt)] = True
        penalty = torch.where(logits > 0, 1 / rule.repetition_penalty, rule.repetition_penalty)
        logits = torch.where(repeated, logits * penalty, logits)
    return logits - rule.frequency_penalty * counts - rule.presence_penalty * (counts > 0)


def _sample_row(logits: Tensor, rule: LogitsRule, position: int) -> Tensor:
    highest, best = logits.max(-1)
    if rule.temperature == 0 or not highest.isfinite():
        return best.masked_fill(~highest.isfinite(), -1)
    weights = _Weights(highest, max(rule.temperature, SMALLEST_TEMPERATURE))
    ids = _kept(logits, weights, rule)
    upto = weights(logits if ids is None else logits[ids]).cumsum(-1, dtype=torch.float64)
    total = float(upto[-1])
    # a product that rounds up to the total would point past the last token
    target = min(total * philox_uniform(rule.seed, position), math.nextafter(total, 0))
    drawn = torch.searchsorted(upto, target, right=True)
    return drawn if ids is None else ids[drawn]


@dataclass(frozen=True)
class _Weights:
    """Unnormalised probabilities. They count from the highest: however small the temperature, its weight is 1."""

    highest: Tensor
    temperature: float

    def __call__(self, logits: Tensor) -> Tensor:
        return ((logits - self.highest) / self.temperature).exp_()


def _kept(logits: Tensor, weights: _Weights, rule: LogitsRule) -> Tensor | None:
    """Ids that pass the filters, in order; None when it is the vocabulary."""
    vocab = logits.numel()
    limited = 0 < rule.top_k < vocab
    if not (limited or rule.top_p < 1 or rule.min_p > 0):
        return None
    values, ids = logits.topk(min(2 * rule.top_k if limited else LIKELY, vocab))
    kept = _how_many(values, logits, weights, rule)
    if kept == values.numel() < vocab:  # perhaps there are more: all of it has to be sorted
        values, ids = logits.sort(descending=True)
        kept = _how_many(values, logits, weights, rule)
    return ids[:kept].sort().values


def _how_many(likely: Tensor, logits: Tensor, weights: _Weights, rule: LogitsRule) -> int:
    """How many of `likely`, the highest of `logits` in order, pass the filters; all of them: there may be more."""
    limited = 0 < rule.top_k < logits.numel()
    if limited:
        looked_at = likely.numel()
        likely = likely[likely >= likely[rule.top_k - 1]]
        if likely.numel() == looked_at < logits.numel():  # equals of the last one may follow, and their mass counts
            return looked_at
    if rule.top_p < 1:
        upto = weights(likely).cumsum(-1, dtype=torch.float64)
        enough = rule.top_p * float(upto[-1] if limited else weights(logits).sum())
        reached = torch.searchsorted(upto, enough).clamp(max=likely.numel() - 1)
        likely = likely[likely >= likely[reached]]  # the fewest whose mass reaches top_p (Holtzman et al., 2019)
    if rule.min_p > 0:
        likely = likely[likely >= weights.highest + weights.temperature * math.log(rule.min_p)]
    return likely.numel()


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
