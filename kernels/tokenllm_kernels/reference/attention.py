"""Attention of a ragged batch over token-granular KV memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


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
