"""Attention a tile of K and V at a time: what decode, shared prefixes and prefill without Gluon have in common.

A running softmax is (maximum, sum of weights, weighted values) of the scores so far, in powers of two (Milakov and
Gimelshein, 2018; Dao et al., 2022).
"""

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634  # scores are scaled by it


@triton.jit
def load_tile(kv, slot, head, kv_heads, HEAD_DIM: tl.constexpr):
    """K [HEAD_DIM, tokens] and V [tokens, HEAD_DIM] of one kv head; slot [tokens] int32."""
    d = tl.arange(0, HEAD_DIM)
    place = kv + slot.to(tl.int64) * (kv_heads * 2 * HEAD_DIM) + head * 2 * HEAD_DIM
    return tl.load(place[None, :] + d[:, None]), tl.load(place[:, None] + (HEAD_DIM + d)[None, :])


@triton.jit
def take_in(scores, v, highest, weight, values, PRECISION: tl.constexpr):
    """The running softmax with one more tile; scores [queries, tokens], -inf for what is not seen."""
    higher = tl.maximum(highest, tl.max(scores, 1))
    p = tl.exp2(scores - higher[:, None])
    kept = tl.exp2(highest - higher)
    weight = weight * kept + tl.sum(p, 1)
    values = tl.dot(p.to(v.dtype), v, values * kept[:, None], input_precision=PRECISION)
    return higher, weight, values
