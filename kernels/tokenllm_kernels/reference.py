"""Every kernel in plain torch. What a kernel means is said here and nowhere else: the Triton kernels are tested
against these functions, and on a CPU these functions are the engine.

Shapes: `tokens` is the ragged batch laid end to end; `slots` count tokens of KV memory; `kv` of one layer is
`[slots + 1, kv_heads, 2, head_dim]`, K and V of one token and head adjacent. Padding reads the last slot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# ---- linear ----


@dataclass(frozen=True)
class Linear:
    """A weight in the form in which its product is quickest. `kind` says which: plain, packed (float32) or half."""

    kind: str
    weight: Any
    bias: Tensor | None
    out_features: int


def prepare_linear(weight: Tensor, bias: Tensor | None = None, *, half_weights: bool = False) -> Linear:
    """Lay out `weight` [out, in] for `linear`.

    On a CPU float32 weights are reordered once for oneDNN, about three times quicker than row-major at small batches.
    `half_weights` stores them as float16 for FBGEMM, which multiplies them with float32 activations: half the bytes of
    a decode step, and exact enough (the perplexity of SmolLM2 does not move in five digits). Values beyond float16's
    range are refused, since FBGEMM would saturate them.
    """
    out_features = weight.shape[0]
    if weight.is_cuda or weight.dtype != torch.float32:
        return Linear("plain", weight, bias, out_features)
    if half_weights and "fbgemm" in torch.backends.quantized.supported_engines:
        return Linear("half", torch.ops.quantized.linear_prepack_fp16(in_half_range(weight), bias), None, out_features)
    if torch.backends.mkldnn.is_available():
        return Linear("packed", torch.ops.mkldnn._reorder_linear_weight(weight, 8), bias, out_features)
    return Linear("plain", weight, bias, out_features)


def in_half_range(weight: Tensor) -> Tensor:
    """The weight itself; a ValueError when float16 cannot hold it."""
    if weight.abs().max() > torch.finfo(torch.float16).max:
        raise ValueError("weights beyond the range of float16: serve them with --dtype float32")
    return weight


def linear(x: Tensor, w: Linear) -> Tensor:
    """x [tokens, in] @ weight.T + bias → [tokens, out]."""
    match w.kind:
        case "half":
            return torch.ops.quantized.linear_dynamic_fp16(x, w.weight)
        case "packed":
            return torch.ops.mkldnn._linear_pointwise(x, w.weight, w.bias, "none", [], "")
        case _:
            return functional.linear(x, w.weight, w.bias)


# ---- norms, activation, rope ----


def embed(ids: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of `table` [vocab, hidden] for `ids` [tokens] → [tokens, hidden] in `dtype`."""
    return table.index_select(0, ids).to(dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in float32 inside (Zhang and Sennrich, 2019)."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); the sum is the next residual."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of [tokens, 2 · width] → [tokens, width] (SwiGLU: Shazeer, 2020)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def rope_table(inverse_frequencies: Tensor, positions: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Cosines and signed sines for `rope_and_store`: [positions, 2, head_dim] from [head_dim / 2] frequencies."""
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), inverse_frequencies.double())
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), 1).to(dtype)


def _rotate(x: Tensor, table: Tensor) -> Tensor:
    """The rotation of RoPE on halves: (a, b) → (a·cos - b·sin, b·cos + a·sin) (Su et al., 2021)."""
    cos, sin = table[:, :1], table[:, 1:]  # [tokens, 1, head_dim]
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def rope_and_store(
    qkv: Tensor,
    table: Tensor,
    kv: Tensor,
    slots: Tensor,
    heads: int,
    qk_norm: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """Split the fused projection, (normalise and) rotate q and k, write k and v to their token slots.

    qkv [tokens, (heads + 2 · kv_heads) · head_dim]; table [tokens, 2, head_dim], the rows of `rope_table` at the
    tokens' positions; kv [slots + 1, kv_heads, 2, head_dim], written in place at `slots` [tokens]; qk_norm (q weight,
    k weight, eps) for families that normalise each head. Returns q [tokens, heads, head_dim].
    """
    kv_heads, head_dim = kv.shape[1], kv.shape[3]
    parts = qkv.view(qkv.shape[0], heads + 2 * kv_heads, head_dim)
    qk, v = parts[:, : heads + kv_heads], parts[:, heads + kv_heads :]
    if qk_norm:
        q_weight, k_weight, eps = qk_norm
        qk = torch.cat((rms_norm(qk[:, :heads], q_weight, eps), rms_norm(qk[:, heads:], k_weight, eps)), 1)
    rotated = _rotate(qk, table)
    kv.index_copy_(0, slots, torch.stack((rotated[:, heads:], v), 2).to(kv.dtype))
    return rotated[:, :heads]


# ---- attention ----


@dataclass(frozen=True)
class _Together:
    """Single-token sequences of similar length, padded to the longest: one call serves them all."""

    places: Tensor  # [sequences] rows of q
    slots: Tensor  # [sequences · longest]
    mask: Tensor | None  # [sequences, 1, 1, longest] to add, None when nothing is padded


@dataclass(frozen=True)
class _Chunk:
    """Several tokens of one sequence, which see all before them and themselves."""

    places: slice
    slots: Tensor  # [context]
    mask: Tensor  # [tokens, context] to add


@dataclass(frozen=True)
class Attention:
    """How the attention of one step is done; the same for all layers, so it is planned once a step."""

    together: tuple[_Together, ...]
    chunks: tuple[_Chunk, ...]


def plan_attention(
    index: Tensor,
    rows: Sequence[int],
    starts: Sequence[int],
    counts: Sequence[int],
    padding_slot: int,
    dtype: torch.dtype,
) -> Attention:
    """Plan the attention of a ragged batch over the token-granular KV pool.

    `index` [rows, positions] → slot; sequence i has `counts[i]` new tokens, laid end to end in the batch, at positions
    `starts[i]`… of row `rows[i]`; their slots are in `index` already. Returns what `attention` takes.
    """
    ends = [start + count for start, count in zip(starts, counts, strict=True)]
    places = [0]
    for count in counts:
        places.append(places[-1] + count)
    single = sorted((i for i, count in enumerate(counts) if count == 1), key=ends.__getitem__)
    together = [
        _pad_together([(places[i], rows[i], ends[i]) for i in sorted(group)], index, padding_slot, dtype)
        for group in _groups_of_similar_length(single, ends)
    ]
    chunks = [
        _Chunk(
            slice(places[i], places[i] + counts[i]),
            index[rows[i], : ends[i]].long(),
            _causal_mask(starts[i], counts[i], dtype),
        )
        for i in range(len(counts))
        if counts[i] > 1
    ]
    return Attention(tuple(together), tuple(chunks))


def _groups_of_similar_length(ordered: list[int], ends: Sequence[int]) -> list[list[int]]:
    """Cut sequences, shortest first, where padding to the next would read a quarter more than there is."""
    groups: list[list[int]] = []
    tokens = 0
    for i in ordered:
        tokens += ends[i]
        if not groups or (len(groups[-1]) + 1) * ends[i] > 1.25 * tokens + 256:
            groups.append([])
            tokens = ends[i]
        groups[-1].append(i)
    return groups


def _pad_together(group: list[tuple[int, int, int]], index: Tensor, padding_slot: int, dtype: torch.dtype) -> _Together:
    places, rows, lengths = (torch.tensor(column) for column in zip(*group, strict=True))
    longest = int(lengths.max())
    beyond = torch.arange(longest) >= lengths[:, None]  # [sequences, longest]
    slots = index[rows, :longest].long().masked_fill_(beyond, padding_slot)
    mask = None
    if int(lengths.min()) < longest:
        mask = torch.zeros(beyond.shape, dtype=dtype).masked_fill_(beyond, -math.inf)[:, None, None]
    return _Together(places, slots.flatten(), mask)


def _causal_mask(start: int, count: int, dtype: torch.dtype) -> Tensor:
    later = torch.arange(start + count) > torch.arange(start, start + count)[:, None]
    return torch.zeros(later.shape, dtype=dtype).masked_fill_(later, -math.inf)


def attention(q: Tensor, kv: Tensor, plan: Attention) -> Tensor:
    """softmax(q · Kᵀ / √head_dim) · V of each token over its own sequence up to itself.

    q [tokens, heads, head_dim]; kv [slots + 1, kv_heads, 2, head_dim]; returns [tokens, heads · head_dim].
    """
    tokens, heads, head_dim = q.shape
    if len(plan.together) == 1 and not plan.chunks:  # the whole batch, in its own order
        return _attend_together(q, kv, plan.together[0])
    out = q.new_empty(tokens, heads * head_dim)
    for group in plan.together:
        out[group.places] = _attend_together(q[group.places], kv, group)
    for chunk in plan.chunks:
        out[chunk.places] = _attend_chunk(q[chunk.places], kv, chunk)
    return out


def _attend_together(q: Tensor, kv: Tensor, group: _Together) -> Tensor:
    sequences, heads, head_dim = q.shape
    kv_heads = kv.shape[1]
    gathered = kv.index_select(0, group.slots).view(sequences, -1, kv_heads, 2, head_dim)
    k, v = gathered.transpose(1, 2).unbind(3)  # [sequences, kv_heads, longest, head_dim]
    # the query heads that share a kv head stand where a longer query would have its tokens: one pass over K and V
    packed = q.reshape(sequences, kv_heads, heads // kv_heads, head_dim)
    return functional.scaled_dot_product_attention(packed, k, v, attn_mask=group.mask).reshape(sequences, -1)


def _attend_chunk(q: Tensor, kv: Tensor, chunk: _Chunk) -> Tensor:
    k, v = kv.index_select(0, chunk.slots).transpose(0, 1).unbind(2)  # [kv_heads, context, head_dim]
    out = functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k[None], v[None], attn_mask=chunk.mask, enable_gqa=True
    )
    return out[0].transpose(0, 1).reshape(q.shape[0], -1)


# ---- sampling ----

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
