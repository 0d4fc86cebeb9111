"""From logits to tokens without the host: no sort, no synchronisation, nothing allocated, so a CUDA graph holds it.

Meaning: `reference/sampling.py`; the decisions are made on the device, row by row. `_survey` reads the logits once,
one program per block of ids, and leaves each block's highest logit and mass, and for rows with filters the highest
logit of every small group. `_choose`, one program per row, finds the token: greedy from the blocks' maxima, a plain
draw in the one block that holds it. Every filter keeps the tokens from some logit up, so top-k and top-p are searches
for that logit; they read only the groups that may hold it, which the groups' maxima tell.
"""

from __future__ import annotations

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
CHOOSE_REGISTERS = 64  # two programs to a multiprocessor
BIASED = 512  # biased tokens of one request
RULE_WORDS = 10  # of a packed rule, before its bias: see `write_rules`
MOST_COUNTED = 32767  # counts are int16 and stay here

_SMALLEST = tl.constexpr(SMALLEST_TEMPERATURE)
_MOST_COUNTED = tl.constexpr(MOST_COUNTED)
_NOWHERE = tl.constexpr(2**31 - 1)
_WORDS = tl.constexpr(RULE_WORDS)


@dataclass(frozen=True)
class SamplingTable:
    """What the device knows of the requests, one entry per row; filled by `set_rules`, kept up by `sample_rows`."""

    seed: Tensor  # [rows] int64
    temperature: Tensor  # [rows] float32, as the four that follow
    top_p: Tensor
    min_p: Tensor
    frequency_penalty: Tensor
    presence_penalty: Tensor
    top_k: Tensor  # [rows] int32, 0 or less than the vocabulary
    biased: Tensor  # [rows] int32, how many of the next two hold
    bias_ids: Tensor  # [rows, BIASED] int32
    bias_values: Tensor  # [rows, BIASED] float32
    counts: Tensor  # [rows, vocab] int16: how often each token was generated
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
            top_k=column(torch.int32),
            biased=column(torch.int32),
            bias_ids=column(torch.int32, BIASED),
            bias_values=column(torch.float32, BIASED),
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
def _adjusts(row, frequency_penalty, presence_penalty, biased):
    penalized = (tl.load(frequency_penalty + row) != 0) | (tl.load(presence_penalty + row) != 0)
    return penalized | (tl.load(biased + row) > 0)


@triton.jit
def _filters(row, top_p, top_k, min_p):
    return (tl.load(top_p + row) < 1) | (tl.load(top_k + row) > 0) | (tl.load(min_p + row) > 0)


@triton.jit
def _per_temperature(row, temperature):
    return 1.0 / tl.maximum(tl.load(temperature + row), _SMALLEST)


# ---- the survey ----


@triton.jit
def _adjust(
    x, ids, row, mine, frequency_penalty, presence_penalty, biased, bias_ids, bias_values, counts,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Bias, then penalties; the result is also left in `mine`."""
    biases = tl.load(biased + row)
    if biases > 0:
        tl.store(mine + ids, x)
        tl.debug_barrier()
        at = tl.arange(0, BIASED)
        token = tl.load(bias_ids + row * BIASED + at, mask=at < biases, other=-1)
        here = (token >= tl.min(ids, 0)) & (token < tl.min(ids, 0) + BLOCK)
        value = tl.load(bias_values + row * BIASED + at, mask=here, other=0.0)
        tl.store(mine + token, tl.load(mine + token, mask=here, other=0.0) + value, mask=here)
        tl.debug_barrier()
        x = tl.load(mine + ids)
    count = tl.load(counts + row * VOCAB + ids, mask=ids < VOCAB, other=0).to(tl.float32)
    x = x - tl.load(frequency_penalty + row) * count
    x = tl.where(count > 0, x - tl.load(presence_penalty + row), x)
    tl.store(mine + ids, x)
    return x


# the columns of a batch may begin anywhere in their buffers, and must not be compiled for again
@triton.jit(do_not_specialize_on_alignment=["rows"])
def _survey(
    logits, logits_stride, rows,
    temperature, top_p, top_k, min_p, frequency_penalty, presence_penalty, biased, bias_ids, bias_values, counts,
    adjusted, highest, best, mass, group_highest,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, GROUP: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    block, batch_row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = tl.load(rows + batch_row).to(tl.int64)
    if row < 0:
        return
    ids = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + batch_row * logits_stride + ids, mask=ids < VOCAB, other=float("-inf")).to(tl.float32)
    if _adjusts(row, frequency_penalty, presence_penalty, biased):
        mine = adjusted + batch_row * BLOCKS * BLOCK
        x = _adjust(
            x, ids, row, mine, frequency_penalty, presence_penalty, biased, bias_ids, bias_values, counts,
            VOCAB, BLOCK, BIASED,
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
    seed, temperature, top_p, top_k, min_p, frequency_penalty, presence_penalty, biased, counts, last_token,
    adjusted, highest, best, mass, group_highest, listed, out,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, BLOCKS_PADDED: tl.constexpr,
    GROUP: tl.constexpr, PASS: tl.constexpr, GROUPS_PADDED: tl.constexpr, GRAIN: tl.constexpr,
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
        adjusts = _adjusts(row, frequency_penalty, presence_penalty, biased)
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
    tl.store(counted, tl.minimum(tl.load(counted).to(tl.int32) + 1, _MOST_COUNTED).to(tl.int16))


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
    rule = (table.temperature, table.top_p, table.top_k, table.min_p, table.frequency_penalty, table.presence_penalty)
    w = workspace
    _survey[(blocks, n)](
        logits, logits.stride(0), rows, *rule, table.biased, table.bias_ids, table.bias_values, table.counts,
        w.adjusted, w.highest, w.best, w.mass, w.group_highest,
        VOCAB=vocab, BLOCK=block, BLOCKS=blocks, GROUP=GROUP, BIASED=BIASED, num_warps=SURVEY_WARPS,
    )  # fmt: skip
    _choose[(n,)](
        logits, logits.stride(0), rows, positions, table.seed, *rule, table.biased, table.counts, table.last_token,
        w.adjusted, w.highest, w.best, w.mass, w.group_highest, w.listed, out,
        VOCAB=vocab, BLOCK=block, BLOCKS=blocks, BLOCKS_PADDED=triton.next_power_of_2(blocks),
        GROUP=GROUP, PASS=PASS, GROUPS_PADDED=triton.next_power_of_2(blocks * block // GROUP),
        GRAIN=_GRAIN[logits.dtype], num_warps=CHOOSE_WARPS, maxnreg=CHOOSE_REGISTERS,
    )  # fmt: skip


# ---- new requests ----


@triton.jit(do_not_specialize=["bias_width"])
def _unpack(
    packed, count, bias_width,
    seed, temperature, top_p, min_p, frequency_penalty, presence_penalty, top_k, biased, bias_ids, bias_values, counts,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) >= tl.load(count):
        return
    mine = packed + tl.program_id(1) * (_WORDS + 2 * bias_width)
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
        tl.store(top_k + row, tl.load(mine + 8))
        biases = tl.load(mine + 9)
        tl.store(biased + row, biases)
        at = tl.arange(0, BIASED)
        token = tl.load(mine + _WORDS + at, mask=at < biases, other=0)
        value = tl.load(mine + _WORDS + bias_width + at, mask=at < biases, other=0)
        tl.store(bias_ids + row * BIASED + at, token, mask=at < biases)
        tl.store(bias_values + row * BIASED + at, value.to(tl.float32, bitcast=True), mask=at < biases)


def take_rules(packed: Tensor, count: Tensor, most: int, table: SamplingTable, bias_width: int = 0) -> None:
    """Give rows of the table new requests, from the next `sample_rows` on; may be captured.

    packed [most, RULE_WORDS + 2 · bias_width] int32, what `write_rules` wrote; of it the first `count` [1] int32 count.
    """
    _unpack[(triton.cdiv(table.vocab, BLOCK), most)](
        packed, count, bias_width,
        table.seed, table.temperature, table.top_p, table.min_p, table.frequency_penalty, table.presence_penalty,
        table.top_k, table.biased, table.bias_ids, table.bias_values, table.counts,
        VOCAB=table.vocab, BLOCK=BLOCK, BIASED=BIASED,
    )  # fmt: skip


def set_rules(table: SamplingTable, rows: Sequence[int], rules: Sequence[LogitsRule]) -> None:
    """`take_rules` of rules that may hold a bias, which is too long to travel with every step: one copy of their own
    and one launch, no waiting.

    ValueError where a logit bias is longer than BIASED, names a token twice or one outside the vocabulary.
    """
    for rule in rules:
        _check_bias(rule.logit_bias, table.vocab)
    width = max((len(rule.logit_bias) for rule in rules), default=0)
    stride = RULE_WORDS + 2 * width
    packed = torch.empty(1 + len(rows) * stride, dtype=torch.int32, pin_memory=table.seed.is_cuda)
    packed[0] = len(rows)
    words = packed[1:].numpy().reshape(-1, stride)
    write_rules(words, rows, rules, table.vocab)
    _write_bias(words, rules, width)
    # the allocator of pinned memory keeps the buffer until the copy is done
    sent = packed.to(table.seed.device, non_blocking=True)
    take_rules(sent[1:], sent, len(rows), table, width)


def _check_bias(bias: tuple[tuple[int, float], ...], vocab: int) -> None:
    tokens = [token for token, _ in bias]
    if len(tokens) > BIASED:
        raise ValueError(f"logit_bias names {len(tokens)} tokens, more than {BIASED}")
    if len(set(tokens)) < len(tokens):
        raise ValueError("logit_bias names a token twice")
    if strange := [token for token in tokens if not 0 <= token < vocab]:
        raise ValueError(f"logit_bias names token {strange[0]}, and the vocabulary has {vocab}")


def write_rules(words: NDArray[np.int32], rows: Sequence[int], rules: Sequence[LogitsRule], vocab: int) -> None:
    """Into words [rules, RULE_WORDS or more]: row, seed in two words, five floats, top-k, and no bias."""
    words[:, 0] = rows
    words[:, 1:3] = np.array([rule.seed for rule in rules], np.uint64).view(np.int32).reshape(-1, 2)
    numbers = [
        (
            max(rule.temperature, SMALLEST_TEMPERATURE) if rule.temperature > 0 else 0.0,
            rule.top_p,
            rule.min_p,
            rule.frequency_penalty,
            rule.presence_penalty,
        )
        for rule in rules
    ]
    words[:, 3:8] = np.array(numbers, np.float32).reshape(-1, 5).view(np.int32)
    words[:, 8] = [rule.top_k if rule.top_k < vocab else 0 for rule in rules]
    words[:, 9] = 0


def _write_bias(words: NDArray[np.int32], rules: Sequence[LogitsRule], width: int) -> None:
    """How many tokens each rule biases; behind it they, then their values."""
    floats = words.view(np.float32)
    words[:, 9] = [len(rule.logit_bias) for rule in rules]
    for i, rule in enumerate(rules):
        for j, (token, value) in enumerate(rule.logit_bias):
            words[i, RULE_WORDS + j] = token
            floats[i, RULE_WORDS + width + j] = value
