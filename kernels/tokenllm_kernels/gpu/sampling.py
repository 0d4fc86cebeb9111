"""From logits to tokens without the host: no sort, no synchronisation, nothing allocated, so a CUDA graph holds it.

Meaning: `reference/sampling.py`; the decisions are made on the device, row by row. `_survey` reads the logits once,
one program per block of ids, and leaves each block's highest logit and mass, and for rows with filters the highest
logit of every small group. `_choose`, one program per row, finds the token: greedy from the blocks' maxima, a plain
draw in the one block that holds it. Every filter keeps the tokens from some logit up, so top-k and top-p are searches
for that logit; they read only the groups that may hold it, which the groups' maxima tell.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from tokenllm_kernels.reference.sampling import SMALLEST_TEMPERATURE, LogitsRule

BLOCK = 4096  # ids one program surveys
GROUP = 32  # ids that share a maximum
PASS = 128  # groups read at once
SURVEY_WARPS = 8
CHOOSE_WARPS = 16
REGISTERS = 64  # two programs that choose share a multiprocessor, four that survey
BIASED = 1024  # biased and muted tokens of one request
BAD_WORDS, BAD_WORD_TOKENS = 64, 8  # of one request, of more than one token
_RULE = struct.Struct("=iQ6f5i")  # see `write_rules`
RULE_WORDS = _RULE.size // 4  # of a packed rule, before its bias
MOST_COUNTED = 32767  # counts are int16 and stay here
IN_PROMPT = -32768  # their sign: a token of the prompt that counts as repeated

_SMALLEST = tl.constexpr(SMALLEST_TEMPERATURE)
_MOST_COUNTED = tl.constexpr(MOST_COUNTED)
_IN_PROMPT = tl.constexpr(IN_PROMPT)
_NOWHERE = tl.constexpr(2**31 - 1)
_WORDS = tl.constexpr(RULE_WORDS)


@dataclass(frozen=True)
class SamplingTable:
    """What the device knows of the requests, one entry per row; filled by `set_rules`, kept up by `sample_rows`."""

    seed: Tensor  # [rows] int64
    temperature: Tensor  # [rows] float32, as the five that follow
    top_p: Tensor
    min_p: Tensor
    frequency_penalty: Tensor
    presence_penalty: Tensor
    repetition_penalty: Tensor
    top_k: Tensor  # [rows] int32, 0 or less than the vocabulary
    biased: Tensor  # [rows] int32, how many of the next three hold
    bias_ids: Tensor  # [rows, BIASED] int32
    bias_values: Tensor  # [rows, BIASED] float32
    early_values: Tensor  # [rows, BIASED] float32, instead of them at positions before `muted_until`
    muted_until: Tensor  # [rows] int32
    only_biased: Tensor  # [rows] int32, 1: all other tokens are masked
    bad_words: Tensor  # [rows] int32, how many of the next hold
    bad_tokens: Tensor  # [rows, BAD_WORD_TOKENS, BAD_WORDS] int32: last tokens, those before them, …; -1 is any
    said: Tensor  # [rows, BAD_WORD_TOKENS] int32, the newest first; kept up where there are bad words
    counts: Tensor  # [rows, vocab] int16: how often each token was generated, below 0 where it counts as repeated
    last_token: Tensor  # [rows] int32: the token chosen last, 0 where there was none

    @classmethod
    def empty(cls, rows: int, vocab: int, device: torch.device) -> SamplingTable:
        def column(dtype: torch.dtype, *width: int) -> Tensor:
            return torch.zeros(rows, *width, dtype=dtype, device=device)

        return cls(
            seed=column(torch.int64),
            temperature=column(torch.float32),
            top_p=column(torch.float32),
            min_p=column(torch.float32),
            frequency_penalty=column(torch.float32),
            presence_penalty=column(torch.float32),
            repetition_penalty=column(torch.float32) + 1,
            top_k=column(torch.int32),
            biased=column(torch.int32),
            bias_ids=column(torch.int32, BIASED),
            bias_values=column(torch.float32, BIASED),
            early_values=column(torch.float32, BIASED),
            muted_until=column(torch.int32),
            only_biased=column(torch.int32),
            bad_words=column(torch.int32),
            bad_tokens=column(torch.int32, BAD_WORD_TOKENS, BAD_WORDS),
            said=column(torch.int32, BAD_WORD_TOKENS),
            counts=column(torch.int16, vocab),
            last_token=column(torch.int32),
        )

    @property
    def vocab(self) -> int:
        return self.counts.shape[1]


@dataclass(frozen=True)
class SamplingWorkspace:
    """What `_survey` leaves for `_choose`, for batches of at most `rows`. One batch at a time may use it."""

    adjusted: Tensor  # [rows, blocks · block] float32: logits with bias and penalties, of rows that have some
    highest: Tensor  # [rows, blocks] float32, NaN where the block holds one
    best: Tensor  # [rows, blocks] int32, the lowest id that has it
    mass: Tensor  # [rows, blocks] float32, relative to the block's highest
    group_highest: Tensor  # [rows, groups] float32; later the kept mass of the listed groups
    listed: Tensor  # [rows, groups] int32, groups that may hold kept tokens
    block: int

    @classmethod
    def empty(cls, rows: int, vocab: int, device: torch.device, block: int = BLOCK) -> SamplingWorkspace:
        def column(dtype: torch.dtype, width: int) -> Tensor:
            return torch.empty(rows, width, dtype=dtype, device=device)

        blocks = triton.cdiv(vocab, block)
        groups = blocks * (block // GROUP)
        return cls(
            adjusted=column(torch.float32, blocks * block),
            highest=column(torch.float32, blocks),
            best=column(torch.int32, blocks),
            mass=column(torch.float32, blocks),
            group_highest=column(torch.float32, groups),
            listed=column(torch.int32, groups),
            block=block,
        )


# ---- what both kernels say ----


@triton.jit
def _adjusts(row, frequency_penalty, presence_penalty, repetition_penalty, biased, only_biased, bad_words):
    penalized = (tl.load(frequency_penalty + row) != 0) | (tl.load(presence_penalty + row) != 0)
    penalized |= tl.load(repetition_penalty + row) != 1
    masked = (tl.load(only_biased + row) > 0) | (tl.load(bad_words + row) > 0)
    return penalized | masked | (tl.load(biased + row) > 0)


@triton.jit
def _filters(row, top_p, top_k, min_p):
    return (tl.load(top_p + row) < 1) | (tl.load(top_k + row) > 0) | (tl.load(min_p + row) > 0)


@triton.jit
def _per_temperature(row, temperature):
    return 1.0 / tl.maximum(tl.load(temperature + row), _SMALLEST)


# ---- the survey ----


@triton.jit
def _times(counted):
    """How often a token was generated."""
    return tl.where(counted < 0, counted - _IN_PROMPT, counted)


@triton.jit
def _bias(
    x, ids, row, mine, position, biased, bias_ids, bias_values, early_values, muted_until, only_biased,
    BLOCK: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """The named tokens with their bias, the others as they are, or masked."""
    tl.store(mine + ids, x)
    tl.debug_barrier()
    at = tl.arange(0, BIASED)
    token = tl.load(bias_ids + row * BIASED + at, mask=at < tl.load(biased + row), other=-1)
    here = (token >= tl.min(ids, 0)) & (token < tl.min(ids, 0) + BLOCK)
    value = tl.load(bias_values + row * BIASED + at, mask=here, other=0.0)
    early = tl.load(early_values + row * BIASED + at, mask=here, other=0.0)
    value = tl.where(position < tl.load(muted_until + row), early, value)
    named = tl.load(mine + token, mask=here, other=0.0) + value
    tl.debug_barrier()
    tl.store(mine + ids, tl.where(tl.load(only_biased + row) > 0, float("-inf"), x))
    tl.debug_barrier()
    tl.store(mine + token, named, mask=here)
    tl.debug_barrier()
    return tl.load(mine + ids)


@triton.jit
def _without_bad_words(
    x, ids, row, mine, words, bad_tokens, said,
    BLOCK: tl.constexpr, BAD_WORDS: tl.constexpr, BAD_WORD_TOKENS: tl.constexpr,
):  # fmt: skip
    """The last tokens of words whose others were just said are masked."""
    tl.store(mine + ids, x)
    tl.debug_barrier()
    at = tl.arange(0, BAD_WORDS)
    mine_of = bad_tokens + row * BAD_WORD_TOKENS * BAD_WORDS + at
    token = tl.load(mine_of, mask=at < words, other=-1)
    ends = (token >= tl.min(ids, 0)) & (token < tl.min(ids, 0) + BLOCK)
    for back in range(1, BAD_WORD_TOKENS):
        before = tl.load(mine_of + back * BAD_WORDS, mask=at < words, other=-1)
        ends &= (before == -1) | (before == tl.load(said + row * BAD_WORD_TOKENS + back - 1))
    tl.store(mine + token, tl.full((BAD_WORDS,), float("-inf"), tl.float32), mask=ends)
    tl.debug_barrier()
    return tl.load(mine + ids)


@triton.jit
def _adjust(
    x, ids, row, mine, position, frequency_penalty, presence_penalty, repetition_penalty,
    biased, bias_ids, bias_values, early_values, muted_until, only_biased, bad_words, bad_tokens, said, counts,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, BIASED: tl.constexpr,
    BAD_WORDS: tl.constexpr, BAD_WORD_TOKENS: tl.constexpr,
):  # fmt: skip
    """Bias and masks, then penalties; the result is also left in `mine`."""
    if (tl.load(biased + row) > 0) | (tl.load(only_biased + row) > 0):
        x = _bias(
            x, ids, row, mine, position, biased, bias_ids, bias_values, early_values, muted_until, only_biased,
            BLOCK, BIASED,
        )  # fmt: skip
    words = tl.load(bad_words + row)
    if words > 0:
        x = _without_bad_words(x, ids, row, mine, words, bad_tokens, said, BLOCK, BAD_WORDS, BAD_WORD_TOKENS)
    counted = tl.load(counts + row * VOCAB + ids, mask=ids < VOCAB, other=0).to(tl.int32)
    penalty = tl.load(repetition_penalty + row)
    repeated = tl.where(x > 0, x * (1.0 / penalty), x * penalty)
    x = tl.where(counted != 0, repeated, x)
    count = _times(counted).to(tl.float32)
    x = x - tl.load(frequency_penalty + row) * count
    x = tl.where(count > 0, x - tl.load(presence_penalty + row), x)
    tl.debug_barrier()  # in a short block several threads have the same ids: all have read what stands there
    tl.store(mine + ids, x)
    return x


# the columns of a batch may begin anywhere in their buffers, and must not be compiled for again
@triton.jit(do_not_specialize_on_alignment=["rows", "positions"])
def _survey(
    logits, logits_stride, rows, positions,
    temperature, top_p, top_k, min_p, frequency_penalty, presence_penalty, repetition_penalty,
    biased, only_biased, bad_words, bias_ids, bias_values, early_values, muted_until, bad_tokens, said, counts,
    adjusted, highest, best, mass, group_highest,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, GROUP: tl.constexpr, BIASED: tl.constexpr,
    BAD_WORDS: tl.constexpr, BAD_WORD_TOKENS: tl.constexpr,
):  # fmt: skip
    block, batch_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = tl.load(rows + batch_row).to(tl.int64)
    if row < 0:
        return
    ids = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + batch_row * logits_stride + ids, mask=ids < VOCAB, other=float("-inf")).to(tl.float32)
    if _adjusts(row, frequency_penalty, presence_penalty, repetition_penalty, biased, only_biased, bad_words):
        mine = adjusted + batch_row * BLOCKS * BLOCK
        x = _adjust(
            x, ids, row, mine, tl.load(positions + batch_row),
            frequency_penalty, presence_penalty, repetition_penalty,
            biased, bias_ids, bias_values, early_values, muted_until, only_biased, bad_words, bad_tokens, said, counts,
            VOCAB, BLOCK, BIASED, BAD_WORDS, BAD_WORD_TOKENS,
        )  # fmt: skip
    top = tl.max(x, 0)
    broken = tl.max((x != x).to(tl.int32), 0)
    place = batch_row * BLOCKS + block
    tl.store(highest + place, tl.where(broken > 0, float("nan"), top))
    tl.store(best + place, tl.min(tl.where(x == top, ids, _NOWHERE), 0))
    if tl.load(temperature + row) > 0:
        base = tl.where(top > float("-inf"), top, 0.0)
        tl.store(mass + place, tl.sum(tl.exp((x - base) * _per_temperature(row, temperature)), 0))
        if _filters(row, top_p, top_k, min_p):
            group = tl.arange(0, BLOCK // GROUP)
            group_tops = tl.max(tl.reshape(x, (BLOCK // GROUP, GROUP)), 1)
            tl.store(group_highest + place * (BLOCK // GROUP) + group, group_tops)


# ---- the choice ----


@triton.jit
def _key(value):
    """An integer that orders as the float does."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _value(key):
    bits = key.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _uniform(seed, position):
    """`philox_uniform`."""
    none = position * 0
    first, second, _, _ = tl.philox(seed, position, none, none, none)
    bits = (first.to(tl.uint64) << 21) | (second >> 11).to(tl.uint64)
    return bits.to(tl.int64).to(tl.float64) * (1.0 / 9007199254740992.0)


@triton.jit
def _first_beyond(weights, target):
    """The first index whose cumulative weight exceeds `target`, else the last of any; `target` less what precedes."""
    weights = weights.to(tl.float64)
    index = tl.arange(0, weights.shape[0])
    upto = tl.cumsum(weights, 0)
    found = tl.min(tl.where((upto > target) & (weights > 0), index, _NOWHERE), 0)
    found = tl.where(found < _NOWHERE, found, tl.max(tl.where(weights > 0, index, 0), 0))
    return found, target - tl.sum(tl.where(index < found, weights, 0.0), 0)


@triton.jit
def _read(logits, adjusted, adjusts, ids, inside):
    if adjusts:
        x = tl.load(adjusted + ids, mask=inside, other=float("-inf"))
    else:
        x = tl.load(logits + ids, mask=inside, other=float("-inf")).to(tl.float32)
    return x


@triton.jit
def _read_groups(
    logits, adjusted, adjusts, listed, start, stop, VOCAB: tl.constexpr, GROUP: tl.constexpr, PASS: tl.constexpr
):
    """Logits of PASS listed groups [PASS, GROUP]."""
    at = start + tl.arange(0, PASS)
    group = tl.load(listed + at, mask=at < stop, other=0)
    ids = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    return _read(logits, adjusted, adjusts, ids, (at < stop)[:, None] & (ids < VOCAB))


@triton.jit
def _list_groups(group_highest, listed, floor, GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr):
    """Write down, in order, the groups that reach `floor`; how many they are."""
    group = tl.arange(0, GROUPS_PADDED)
    tops = tl.load(group_highest + group, mask=group < GROUPS, other=float("-inf"))
    reach = ((tops >= floor) & (group < GROUPS)).to(tl.int32)
    tl.debug_barrier()
    tl.store(listed + tl.cumsum(reach, 0) - 1, group, mask=reach > 0)
    tl.debug_barrier()
    return tl.sum(reach, 0)


@triton.jit
def _floor_of_groups(group_highest, top, wanted, PASS: tl.constexpr, GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr):
    """A logit that at least `wanted` groups reach, and not many more; minus infinity where there are no more."""
    group = tl.arange(0, GROUPS_PADDED)
    tops = tl.load(group_highest + group, mask=group < GROUPS, other=float("-inf"))
    low, high = _key(top * 0 + float("-inf")), _key(top) + 1
    reaching = tl.where(wanted < GROUPS, GROUPS, 0)
    few = tl.maximum(PASS, 2 * wanted)
    while (reaching > few) & (high - low > 1):
        middle = low + (high - low) // 2
        count = tl.sum(((tops >= _value(middle)) & (group < GROUPS)).to(tl.int32), 0)
        reaching = tl.where(count >= wanted, count, reaching)
        low, high = tl.where(count >= wanted, middle, low), tl.where(count >= wanted, high, middle)
    return _value(low)


@triton.jit
def _from_up(
    logits, adjusted, adjusts, listed, length, top, per_temperature, a, b, c,
    COUNT: tl.constexpr, VOCAB: tl.constexpr, GROUP: tl.constexpr, PASS: tl.constexpr,
):  # fmt: skip
    """How many tokens of the listed groups, or how much mass, lie from the logits a, b and c up."""
    from_a = tl.zeros((PASS, GROUP), tl.float32)
    from_b = tl.zeros((PASS, GROUP), tl.float32)
    from_c = tl.zeros((PASS, GROUP), tl.float32)
    for start in range(0, length, PASS):
        x = _read_groups(logits, adjusted, adjusts, listed, start, length, VOCAB, GROUP, PASS)
        weight = tl.full((PASS, GROUP), 1.0, tl.float32) if COUNT else tl.exp((x - top) * per_temperature)
        from_a += tl.where(x >= a, weight, 0.0)
        from_b += tl.where(x >= b, weight, 0.0)
        from_c += tl.where(x >= c, weight, 0.0)
    return tl.sum(from_a), tl.sum(from_b), tl.sum(from_c)


@triton.jit
def _search(
    logits, adjusted, adjusts, listed, length, top, per_temperature, target, low, grain,
    COUNT: tl.constexpr, VOCAB: tl.constexpr, GROUP: tl.constexpr, PASS: tl.constexpr,
):  # fmt: skip
    """The key of the highest logit from which up there are `target` tokens (or that mass); `low` where there is none.

    Logits differ by `grain` keys or more: where `low` and `high` are no farther apart, one logit is between them.
    """
    high = _key(top) + 1
    while high - low > grain:
        step = tl.maximum((high - low) // 4, 1)
        a, b, c = low + step, low + 2 * step, low + 3 * step
        from_a, from_b, from_c = _from_up(
            logits, adjusted, adjusts, listed, length, top, per_temperature, _value(a), _value(b), _value(c),
            COUNT, VOCAB, GROUP, PASS,
        )  # fmt: skip
        above = tl.where(from_a < target, a, tl.where(from_b < target, b, tl.where(from_c < target, c, high)))
        low = tl.where(from_c >= target, c, tl.where(from_b >= target, b, tl.where(from_a >= target, a, low)))
        high = tl.minimum(above, high)
    return low


@triton.jit
def _smallest_kept(
    logits, adjusted, adjusts, group_highest, listed, top, per_temperature, total, k, p, least,
    VOCAB: tl.constexpr, GROUP: tl.constexpr, PASS: tl.constexpr,
    GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr, GRAIN: tl.constexpr,
):  # fmt: skip
    """The logit from which up tokens are kept, and how many groups that may hold such are listed.

    `least` is min-p's; it comes last, since top-p is of the mass that top-k left.
    """
    floor = least
    if (k > 0) | (p < 1):
        wanted = tl.where(k > 0, k, 2 * PASS)  # a nucleus is nearly always among these
        floor = _floor_of_groups(group_highest, top, wanted, PASS, GROUPS, GROUPS_PADDED)
    length = _list_groups(group_highest, listed, floor, GROUPS, GROUPS_PADDED)
    enough = p * total
    if (k == 0) & (p < 1):
        reached, _, _ = _from_up(
            logits, adjusted, adjusts, listed, length, top, per_temperature, floor, top, top,
            False, VOCAB, GROUP, PASS,
        )  # fmt: skip
        if (reached < enough) & (least < floor):
            # a flat distribution: but a vocabulary of tokens below this has half the mass that top-p leaves out
            floor = top + tl.log((total - enough) / (2 * VOCAB)) / per_temperature
            length = _list_groups(group_highest, listed, floor, GROUPS, GROUPS_PADDED)
    low = _key(floor)
    grain = tl.where(adjusts, 1, GRAIN)
    if k > 0:
        low = _search(
            logits, adjusted, adjusts, listed, length, top, per_temperature, k.to(tl.float32), low, grain,
            True, VOCAB, GROUP, PASS,
        )  # fmt: skip
        left, _, _ = _from_up(
            logits, adjusted, adjusts, listed, length, top, per_temperature, _value(low), top, top,
            False, VOCAB, GROUP, PASS,
        )  # fmt: skip
        enough = p * left
    if p < 1:
        low = _search(
            logits, adjusted, adjusts, listed, length, top, per_temperature, tl.maximum(enough, 1e-30), low, grain,
            False, VOCAB, GROUP, PASS,
        )  # fmt: skip
    return tl.maximum(_value(low), least), length


@triton.jit
def _draw_group(
    logits, adjusted, adjusts, listed, length, masses, top, per_temperature, floor, uniform,
    VOCAB: tl.constexpr, GROUP: tl.constexpr, PASS: tl.constexpr, GROUPS_PADDED: tl.constexpr, BUNDLE: tl.constexpr,
):  # fmt: skip
    """The group the draw falls into, and what is left to walk in it: first by bundles of groups, then by groups."""
    for start in range(0, length, PASS):
        x = _read_groups(logits, adjusted, adjusts, listed, start, length, VOCAB, GROUP, PASS)
        kept = tl.where(x >= floor, tl.exp((x - top) * per_temperature), 0.0)
        at = start + tl.arange(0, PASS)
        tl.store(masses + at, tl.sum(kept, 1), mask=at < length)
    tl.debug_barrier()
    at = tl.arange(0, GROUPS_PADDED // BUNDLE)[:, None] * BUNDLE + tl.arange(0, BUNDLE)[None, :]
    bundles = tl.sum(tl.load(masses + at, mask=at < length, other=0.0), 1)
    bundle, target = _first_beyond(bundles, uniform * tl.sum(bundles.to(tl.float64), 0))
    at = bundle * BUNDLE + tl.arange(0, BUNDLE)
    found, target = _first_beyond(tl.load(masses + at, mask=at < length, other=0.0), target)
    return tl.load(listed + bundle * BUNDLE + found), target


@triton.jit(do_not_specialize_on_alignment=["rows", "positions", "out"])
def _choose(
    logits, logits_stride, rows, positions,
    seed, temperature, top_p, top_k, min_p, frequency_penalty, presence_penalty, repetition_penalty,
    biased, only_biased, bad_words, said, counts, last_token,
    adjusted, highest, best, mass, group_highest, listed, out,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, BLOCKS_PADDED: tl.constexpr,
    GROUP: tl.constexpr, PASS: tl.constexpr, GROUPS_PADDED: tl.constexpr, GRAIN: tl.constexpr,
    BAD_WORD_TOKENS: tl.constexpr,
):  # fmt: skip
    batch_row = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + batch_row).to(tl.int64)
    if row < 0:
        tl.store(out + batch_row, -1)
        return
    block = tl.arange(0, BLOCKS_PADDED)
    tops = tl.load(highest + batch_row * BLOCKS + block, mask=block < BLOCKS, other=float("-inf"))
    ids = tl.load(best + batch_row * BLOCKS + block, mask=block < BLOCKS, other=_NOWHERE)
    top = tl.max(tops, 0)
    broken = tl.max((tops != tops).to(tl.int32), 0)
    if (broken > 0) | (tl.abs(top) == float("inf")):
        tl.store(out + batch_row, -1)
        tl.store(last_token + row, 0)
        return
    token = tl.min(tl.where(tops == top, ids, _NOWHERE), 0)
    if tl.load(temperature + row) > 0:
        adjusts = _adjusts(row, frequency_penalty, presence_penalty, repetition_penalty, biased, only_biased, bad_words)
        per_temperature = _per_temperature(row, temperature)
        logits += batch_row * logits_stride
        adjusted += batch_row * BLOCKS * BLOCK
        uniform = _uniform(tl.load(seed + row), tl.load(positions + batch_row))
        block_mass = tl.load(mass + batch_row * BLOCKS + block, mask=block < BLOCKS, other=0.0)
        block_mass *= tl.exp((tops - top) * per_temperature)
        total = tl.sum(block_mass, 0)
        floor = top * 0 + float("-inf")
        if _filters(row, top_p, top_k, min_p):
            GROUPS: tl.constexpr = BLOCKS * (BLOCK // GROUP)
            group_highest += batch_row * GROUPS
            listed += batch_row * GROUPS
            least = top + tl.log(tl.load(min_p + row)) / per_temperature
            floor, length = _smallest_kept(
                logits, adjusted, adjusts, group_highest, listed, top, per_temperature, total,
                tl.load(top_k + row), tl.load(top_p + row), least,
                VOCAB, GROUP, PASS, GROUPS, GROUPS_PADDED, GRAIN,
            )  # fmt: skip
            BUNDLE: tl.constexpr = GROUPS_PADDED if GROUPS_PADDED < 64 else 64
            group, target = _draw_group(
                logits, adjusted, adjusts, listed, length, group_highest, top, per_temperature, floor, uniform,
                VOCAB, GROUP, PASS, GROUPS_PADDED, BUNDLE,
            )  # fmt: skip
            first = group * GROUP
            width = tl.minimum(GROUP, VOCAB - first)
        else:
            found, target = _first_beyond(block_mass, uniform * tl.sum(block_mass.to(tl.float64), 0))
            first = found * BLOCK
            width = tl.minimum(BLOCK, VOCAB - first)
        at = tl.arange(0, BLOCK)
        x = _read(logits, adjusted, adjusts, first + at, at < width)
        weight = tl.where(x >= floor, tl.exp((x - top) * per_temperature), 0.0)
        place, _ = _first_beyond(weight, target)
        # the sums of the two passes may differ in the last bit: where they leave nothing, the likeliest stands
        token = tl.where(tl.sum(weight, 0) > 0, first + place, token)
    tl.store(out + batch_row, token)
    tl.store(last_token + row, token)
    counted = counts + row * VOCAB + token
    count = tl.load(counted).to(tl.int32)
    more = tl.minimum(_times(count) + 1, _MOST_COUNTED)
    tl.store(counted, tl.where(count < 0, more + _IN_PROMPT, more).to(tl.int16))
    if tl.load(bad_words + row) > 0:
        back = tl.arange(0, BAD_WORD_TOKENS)
        mine = said + row * BAD_WORD_TOKENS + back
        older = tl.load(mine - 1, mask=back > 0, other=0)
        tl.debug_barrier()
        tl.store(mine, tl.where(back == 0, token, older))


_GRAIN = {torch.float32: 1, torch.float16: 1 << 13, torch.bfloat16: 1 << 16}


def sample_rows(
    logits: Tensor, rows: Tensor, positions: Tensor, table: SamplingTable, out: Tensor, workspace: SamplingWorkspace
) -> None:
    """Choose the next token of each batch row into `out` [n] int32: -1 for padding and where logits are not a number.

    logits [n, vocab] float32, float16 or bfloat16; rows [n] int32, where in the table, each once, -1 is padding;
    positions [n] int32 of the tokens to be chosen. `last_token` and `counts` of the rows follow; a token -1 is not
    counted, and kept as 0 so that it can be embedded.
    """
    n, vocab = logits.shape
    block, blocks = workspace.block, triton.cdiv(vocab, workspace.block)
    assert vocab == table.vocab and blocks == workspace.highest.shape[1], (
        "table and workspace are of another vocabulary"
    )
    assert n <= workspace.highest.shape[0] and logits.stride(1) == 1
    t, w = table, workspace
    rule = (
        t.temperature, t.top_p, t.top_k, t.min_p, t.frequency_penalty, t.presence_penalty, t.repetition_penalty,
        t.biased, t.only_biased, t.bad_words,
    )  # fmt: skip
    _survey[(blocks, n)](
        logits, logits.stride(0), rows, positions, *rule,
        t.bias_ids, t.bias_values, t.early_values, t.muted_until, t.bad_tokens, t.said, t.counts,
        w.adjusted, w.highest, w.best, w.mass, w.group_highest,
        VOCAB=vocab, BLOCK=block, BLOCKS=blocks, GROUP=GROUP, BIASED=BIASED,
        BAD_WORDS=BAD_WORDS, BAD_WORD_TOKENS=BAD_WORD_TOKENS, num_warps=SURVEY_WARPS, maxnreg=REGISTERS,
    )  # fmt: skip
    _choose[(n,)](
        logits, logits.stride(0), rows, positions, t.seed, *rule, t.said, t.counts, t.last_token,
        w.adjusted, w.highest, w.best, w.mass, w.group_highest, w.listed, out,
        VOCAB=vocab, BLOCK=block, BLOCKS=blocks, BLOCKS_PADDED=triton.next_power_of_2(blocks),
        GROUP=GROUP, PASS=PASS, GROUPS_PADDED=triton.next_power_of_2(blocks * block // GROUP),
        GRAIN=_GRAIN[logits.dtype], BAD_WORD_TOKENS=BAD_WORD_TOKENS, num_warps=CHOOSE_WARPS, maxnreg=REGISTERS,
    )  # fmt: skip


# ---- new requests ----


@triton.jit(do_not_specialize=["bias_width"])
def _unpack(
    packed, count, bias_width,
    seed, temperature, top_p, min_p, frequency_penalty, presence_penalty, repetition_penalty, top_k,
    biased, bias_ids, bias_values, early_values, muted_until, only_biased, bad_words, counts,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) >= tl.load(count):
        return
    mine = packed + tl.program_id(1) * (_WORDS + 3 * bias_width)
    row = tl.load(mine).to(tl.int64)
    ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(counts + row * VOCAB + ids, tl.zeros((BLOCK,), tl.int16), mask=ids < VOCAB)
    if tl.program_id(0) == 0:
        low, high = tl.load(mine + 1).to(tl.int64) & 0xFFFFFFFF, tl.load(mine + 2).to(tl.int64)
        tl.store(seed + row, low | (high << 32))
        tl.store(temperature + row, tl.load(mine + 3).to(tl.float32, bitcast=True))
        tl.store(top_p + row, tl.load(mine + 4).to(tl.float32, bitcast=True))
        tl.store(min_p + row, tl.load(mine + 5).to(tl.float32, bitcast=True))
        tl.store(frequency_penalty + row, tl.load(mine + 6).to(tl.float32, bitcast=True))
        tl.store(presence_penalty + row, tl.load(mine + 7).to(tl.float32, bitcast=True))
        tl.store(repetition_penalty + row, tl.load(mine + 8).to(tl.float32, bitcast=True))
        tl.store(top_k + row, tl.load(mine + 9))
        biases = tl.load(mine + 10)
        tl.store(biased + row, biases)
        tl.store(muted_until + row, tl.load(mine + 11))
        tl.store(only_biased + row, tl.load(mine + 12))
        tl.store(bad_words + row, tl.load(mine + 13))
        at = tl.arange(0, BIASED)
        bias = mine + _WORDS + at
        token = tl.load(bias, mask=at < biases, other=0)
        value = tl.load(bias + bias_width, mask=at < biases, other=0)
        early = tl.load(bias + 2 * bias_width, mask=at < biases, other=0)
        tl.store(bias_ids + row * BIASED + at, token, mask=at < biases)
        tl.store(bias_values + row * BIASED + at, value.to(tl.float32, bitcast=True), mask=at < biases)
        tl.store(early_values + row * BIASED + at, early.to(tl.float32, bitcast=True), mask=at < biases)


def take_rules(packed: Tensor, count: Tensor, most: int, table: SamplingTable, bias_width: int = 0) -> None:
    """Give rows of the table new requests, from the next `sample_rows` on; may be captured.

    packed [most, RULE_WORDS + 3 · bias_width] int32, what `write_rules` wrote; of it the first `count` [1] int32 count.
    """
    t = table
    _unpack[(triton.cdiv(t.vocab, BLOCK), most)](
        packed, count, bias_width,
        t.seed, t.temperature, t.top_p, t.min_p, t.frequency_penalty, t.presence_penalty, t.repetition_penalty, t.top_k,
        t.biased, t.bias_ids, t.bias_values, t.early_values, t.muted_until, t.only_biased, t.bad_words, t.counts,
        VOCAB=t.vocab, BLOCK=BLOCK, BIASED=BIASED,
    )  # fmt: skip


def set_rules(table: SamplingTable, rows: Sequence[int], rules: Sequence[LogitsRule]) -> None:
    """`take_rules` of rules that may name tokens, which are too many to travel with every step: copies of their own,
    no waiting.

    ValueError where the table has no room for what a rule names, or the vocabulary has no such token.
    """
    for rule in rules:
        _check_lists(rule, table.vocab)
    biases = [_bias_of(rule) for rule in rules]
    width = max(map(len, biases), default=0)
    stride = RULE_WORDS + 3 * width
    packed = torch.empty(1 + len(rows) * stride, dtype=torch.int32, pin_memory=table.seed.is_cuda)
    packed[0] = len(rows)
    words = packed[1:].numpy().reshape(-1, stride)
    write_rules(words, rows, rules, table.vocab)
    _write_biases(words, biases, width)
    # the allocator of pinned memory keeps the buffer until the copy is done
    sent = packed.to(table.seed.device, non_blocking=True)
    take_rules(sent[1:], sent, len(rows), table, width)
    for row, rule in zip(rows, rules, strict=True):
        _set_bad_words(table, row, rule.bad_words)
        _set_prompt(table, row, rule.prompt)


def set_generated(table: SamplingTable, row: int, rule: LogitsRule, generated: NDArray[np.int32]) -> None:
    """What the row's request, whose rule was just set, had generated before."""

    def sent(column: NDArray[np.integer], dtype: torch.dtype) -> Tensor:
        tensor = torch.from_numpy(column).to(dtype)
        pinned = tensor.pin_memory() if table.seed.is_cuda else tensor
        return pinned.to(table.seed.device, non_blocking=True)

    ids, times = np.unique(generated, return_counts=True)
    times = np.minimum(times, MOST_COUNTED)
    signed = np.where(np.isin(ids, rule.prompt), times + IN_PROMPT, times)
    table.counts[row].index_copy_(0, sent(ids, torch.int64), sent(signed, torch.int16))
    if rule.bad_words:
        newest = generated[::-1][:BAD_WORD_TOKENS].copy()
        table.said[row, : len(newest)].copy_(sent(newest, torch.int32))


def _set_bad_words(table: SamplingTable, row: int, words: Sequence[tuple[int, ...]]) -> None:
    if words:
        table.said[row].fill_(-2)
        tokens = torch.full(table.bad_tokens.shape[1:], -1, dtype=torch.int32, pin_memory=table.seed.is_cuda)
        for i, word in enumerate(words):
            tokens[: len(word), i] = torch.tensor(word[::-1])
        table.bad_tokens[row].copy_(tokens, non_blocking=True)


def _set_prompt(table: SamplingTable, row: int, prompt: Sequence[int]) -> None:
    if prompt:
        ids = torch.tensor(prompt)
        ids = ids.pin_memory() if table.seed.is_cuda else ids
        table.counts[row].index_fill_(0, ids.to(table.seed.device, non_blocking=True), IN_PROMPT)


def _check_lists(rule: LogitsRule, vocab: int) -> None:
    biased = [token for token, _ in rule.logit_bias]
    if len(set(biased)) < len(biased):
        raise ValueError("logit_bias names a token twice")
    if len(named := {*biased, *rule.muted}) > BIASED:
        raise ValueError(f"logit_bias and muted name {len(named)} tokens, more than {BIASED}")
    if len(rule.bad_words) > BAD_WORDS:
        raise ValueError(f"{len(rule.bad_words)} bad words are more than {BAD_WORDS}")
    if any(not 2 <= len(word) <= BAD_WORD_TOKENS for word in rule.bad_words):
        raise ValueError(f"a bad word has 2 to {BAD_WORD_TOKENS} tokens")
    strange = [token for token in (*named, *rule.prompt, *sum(rule.bad_words, ())) if not 0 <= token < vocab]
    if strange:
        raise ValueError(f"a rule names token {strange[0]}, and the vocabulary has {vocab}")


def _bias_of(rule: LogitsRule) -> list[tuple[int, float, float]]:
    """Tokens with what is added to their logits, and what as long as some are muted."""
    values, muted = dict(rule.logit_bias), set(rule.muted)
    named = [(token, value, float("-inf") if token in muted else value) for token, value in values.items()]
    if rule.only_biased:
        return named
    return named + [(token, 0.0, float("-inf")) for token in muted - values.keys()]


def write_rules(words: NDArray[np.int32], rows: Sequence[int], rules: Sequence[LogitsRule], vocab: int) -> None:
    """Into words [rules, RULE_WORDS or more]: row, seed in two words, six floats, top-k, no bias, when muting ends,
    whether only biased tokens may come, and how many bad words there are.
    """
    for i, (row, rule) in enumerate(zip(rows, rules, strict=True)):
        _RULE.pack_into(
            words[i], 0, row, rule.seed,
            max(rule.temperature, SMALLEST_TEMPERATURE) if rule.temperature > 0 else 0.0,
            rule.top_p, rule.min_p, rule.frequency_penalty, rule.presence_penalty, rule.repetition_penalty,
            rule.top_k if rule.top_k < vocab else 0, 0, rule.muted_until, rule.only_biased, len(rule.bad_words),
        )  # fmt: skip


def _write_biases(words: NDArray[np.int32], biases: Sequence[list[tuple[int, float, float]]], width: int) -> None:
    """How many tokens each rule names; behind it they, then their values, then the early ones."""
    floats = words.view(np.float32)
    words[:, 10] = [len(bias) for bias in biases]
    for i, bias in enumerate(biases):
        for j, (token, value, early) in enumerate(bias):
            words[i, RULE_WORDS + j] = token
            floats[i, RULE_WORDS + width + j] = value
            floats[i, RULE_WORDS + 2 * width + j] = early
