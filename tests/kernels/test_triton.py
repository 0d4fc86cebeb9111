"""Every Triton kernel against its definition in plain torch, computed in float64: on a GPU with real shapes, elsewhere
in Triton's interpreter with small ones (float32 and float16: the interpreter multiplies bfloat16 wrongly).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenllm_kernels import Linear, embed, linear, rms_norm, rope_and_store, rope_table, silu_mul

ON_GPU = torch.cuda.is_available()
LARGE = ON_GPU and os.environ.get("KERNEL_SIZES") != "small"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of ‖out - truth‖ / ‖truth‖
SIZE = 100 if LARGE else 1  # how much larger a GPU's cases are
random_cases = settings(
    max_examples=40 if LARGE else 12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def error(ours: Tensor, truth: Tensor) -> float:
    """‖ours - truth‖ / ‖truth‖; a NaN fails every bound."""
    ours, truth = ours.double().cpu(), truth.double().cpu()
    return float((ours - truth).norm() / truth.norm().clamp(min=1e-30))


def normal(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype)


# ---- layers ----


@pytest.mark.parametrize(("tokens", "hidden"), [(1, 64), (5, 96), (3, 576), (7 * SIZE, 2048 if LARGE else 160)])
def test_rms_norm(tokens: int, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
    from tokenllm_kernels.gpu import layers

    x, weight = normal(tokens, hidden, dtype=dtype, device=device), normal(hidden, dtype=dtype, device=device)
    assert error(layers.rms_norm(x, weight, 1e-5), rms_norm(x.double(), weight.double(), 1e-5)) < BOUND[dtype]


@pytest.mark.parametrize(("tokens", "width"), [(1, 8), (4, 1030), (9 * SIZE, 300)])
def test_silu_mul(tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    from tokenllm_kernels.gpu import layers

    gate_up = normal(tokens, 2 * width, dtype=dtype, device=device)
    assert error(layers.silu_mul(gate_up), silu_mul(gate_up.double())) < BOUND[dtype]


def test_embedding_stays_inside_its_table(dtype: torch.dtype, device: torch.device) -> None:
    from tokenllm_kernels.gpu import layers

    table, ids = normal(11, 1100, dtype=dtype, device=device), torch.tensor([3, 0, 10, -7, 2**30])
    assert layers.embed(ids.to(device), table, dtype).equal(embed(ids.clamp(0, 10).to(device), table, dtype))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "head_dim"), [(1, 4, 4, 16), (5, 9, 3, 64), (2, 32, 8, 128)])
def test_rope_and_store(
    tokens: int, heads: int, kv_heads: int, head_dim: int, norm: bool, dtype: torch.dtype, device: torch.device
) -> None:
    from tokenllm_kernels.gpu import layers

    tokens *= SIZE
    qkv = normal(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype, device=device)
    weights = normal(2, head_dim, dtype=dtype, device=device)
    qk_norm = (weights[0], weights[1], 1e-6) if norm else None
    table = rope_table(torch.rand(head_dim // 2), 4096, torch.float32)[torch.randperm(4096)[:tokens]].to(device)
    slots = torch.randperm(tokens * 2)[:tokens].to(device)
    kv = torch.full((tokens * 2 + 1, kv_heads, 2, head_dim), torch.nan, dtype=dtype, device=device)
    wide = kv.double()
    wide_norm = (weights[0].double(), weights[1].double(), 1e-6) if norm else None
    truth = rope_and_store(qkv.double(), table.double(), wide, slots, heads, wide_norm)
    q = layers.rope_and_store(qkv, table, kv, slots, heads, qk_norm)
    assert error(q, truth) < BOUND[dtype]
    assert error(kv[slots], wide[slots]) < BOUND[dtype]
    untouched = torch.ones(len(kv), dtype=torch.bool, device=device).index_fill_(0, slots, False)
    assert kv[untouched].isnan().all()


# ---- products ----


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("tokens", [1, 5, 33])
def test_few_tokens(tokens: int, splits: int, gated: bool, dtype: torch.dtype, device: torch.device) -> None:
    from tokenllm_kernels.gpu.linear import Tiles, few_tokens

    features, depth = (1000, 2048) if LARGE else (40, 160)
    x = normal(tokens, depth, dtype=dtype, device=device)
    weight = normal(features * (1 + gated), depth, dtype=dtype, device=device) / depth**0.5
    bias = None if gated else normal(features, dtype=dtype, device=device)
    before = normal(tokens, features, dtype=dtype, device=device, seed=1)
    wide = linear(x.double(), Linear("plain", weight.double(), None if bias is None else bias.double(), features))
    truth = silu_mul(wide) if gated else wide
    tiles = Tiles(block_n=32, block_k=32, splits=splits, warps=4, stages=2)
    for _ in range(2):  # the second finds what the first left in the workspace
        assert error(few_tokens(x, weight, tiles, bias=bias, gated=gated), truth) < BOUND[dtype]
        out = torch.full_like(before, torch.nan)
        few_tokens(x, weight, tiles, bias=bias, gated=gated, out=out)
        assert error(out, truth) < BOUND[dtype]
        added = few_tokens(x, weight, tiles, bias=bias, gated=gated, add_to=before.clone())
        assert error(added, truth + before.double()) < BOUND[dtype]


# ---- attention ----


@dataclass(frozen=True)
class Pool:
    """KV memory of a batch: sequences lie in slots and rows of no order, and all that is not theirs is NaN."""

    kv: Tensor
    index: Tensor
    rows: list[int]
    lengths: list[int]

    @classmethod
    def of(
        cls, lengths: Sequence[int], kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> "Pool":
        slots, rows = sum(lengths) + 3, len(lengths) + 2
        order = torch.randperm(slots)
        index = torch.full((rows, max(lengths) + 3), slots, dtype=torch.int32)
        mine = torch.randperm(rows)[: len(lengths)].tolist()
        taken = 0
        for row, length in zip(mine, lengths, strict=True):
            index[row, :length] = order[taken : taken + length].int()
            taken += length
        kv = torch.randn(slots + 1, kv_heads, 2, head_dim).to(device, dtype)
        kv[order[taken:].to(device)] = torch.nan
        kv[slots] = torch.nan
        return cls(kv, index.to(device), mine, list(lengths))

    def attention(self, i: int, q: Tensor, seen: int) -> Tensor:
        """The truth for q [heads, head_dim] of sequence i, which sees its first `seen` tokens."""
        slots = self.index[self.rows[i], :seen].long()
        k, v = self.kv[slots].double().repeat_interleave(q.shape[0] // self.kv.shape[1], 1).unbind(2)
        scores = torch.einsum("hd,nhd->hn", q.double(), k) / q.shape[1] ** 0.5
        return torch.einsum("hn,nhd->hd", scores.softmax(-1), v)


HEADS = [(4, 4, 16), (9, 3, 64), (32, 8, 128)] if LARGE else [(2, 2, 16), (6, 2, 16), (5, 1, 16)]
LONGEST = 3000 if LARGE else 90


@random_cases
@given(
    lengths=st.lists(st.integers(1, LONGEST), min_size=1, max_size=20 if LARGE else 5),
    heads=st.sampled_from(HEADS),
    programs=st.integers(1, 300 if LARGE else 9),
    dtype=st.sampled_from(DTYPES),
)
def test_decode_attention(
    lengths: list[int], heads: tuple[int, int, int], programs: int, dtype: torch.dtype, device: torch.device
) -> None:
    check_decode(lengths, *heads, programs, dtype, device)


def check_decode(
    lengths: list[int], heads: int, kv_heads: int, head_dim: int, programs: int, dtype: torch.dtype,
    device: torch.device,
) -> None:  # fmt: skip
    from tokenllm_kernels.gpu.decode_attention import DecodePlan, DecodeTiling, decode_attention, plan_decode

    pool, padded = Pool.of(lengths, kv_heads, head_dim, dtype, device), len(lengths) + 2
    q = normal(padded, heads + 2 * kv_heads, head_dim, dtype=dtype, device=device)[:, :heads]
    block_n = DecodeTiling.of(dtype, head_dim, device).block_n if LARGE else 16
    tiling = DecodeTiling(block_n, 4, 3, programs)
    plan = DecodePlan.empty(padded, heads, kv_heads, head_dim, tiling, device)
    plan.lengths[: len(lengths)] = torch.tensor(lengths, dtype=torch.int32)
    plan.rows[: len(lengths)] = torch.tensor(pool.rows, dtype=torch.int32)
    plan.partial.fill_(torch.nan)
    plan.extremes.fill_(torch.nan)
    for _ in range(2):  # the second finds what the first left behind
        out = torch.full((padded, heads, head_dim), torch.nan, dtype=dtype, device=device)
        plan_decode(plan, padded, kv_heads)
        decode_attention(q, pool.kv, pool.index, plan, out)
        truth = torch.stack([pool.attention(i, q[i], length) for i, length in enumerate(lengths)])
        assert error(out[: len(lengths)], truth) < BOUND[dtype]
        assert out[len(lengths) :].isnan().all()
        assert not plan.arrived.any()


@random_cases
@given(
    groups=st.lists(
        st.tuples(
            st.integers(1, LONGEST),  # tokens that all share
            st.lists(st.integers(1, 40), min_size=1, max_size=40 if LARGE else 6),  # tokens of each one's own
        ),
        min_size=1,
        max_size=4,
    ),
    heads=st.sampled_from(HEADS),
    programs=st.integers(1, 300 if LARGE else 9),
    dtype=st.sampled_from(DTYPES),
    shuffle=st.randoms(use_true_random=False),
)
def test_decode_attention_of_shared_prefixes(
    groups: list[tuple[int, list[int]]], heads: tuple[int, int, int], programs: int, dtype: torch.dtype,
    shuffle: Random, device: torch.device,
) -> None:  # fmt: skip
    check_shared(groups, *heads, programs, dtype, shuffle, device)


def check_shared(
    groups: list[tuple[int, list[int]]], heads: int, kv_heads: int, head_dim: int, programs: int, dtype: torch.dtype,
    shuffle: Random, device: torch.device,
) -> None:  # fmt: skip
    """A group of one has nothing to share, and is done as any other sequence."""
    from tokenllm_kernels.gpu.decode_attention import DecodePlan, DecodeTiling, decode_attention, plan_decode
    from tokenllm_kernels.gpu.shared_prefix import PrefixLayout, PrefixPartials, prefix_attention, write_prefixes

    sequences = [(group, shared + own) for group, (shared, owns) in enumerate(groups) for own in owns]
    shuffle.shuffle(sequences)
    lengths = [length for _, length in sequences]
    pool, padded = Pool.of(lengths, kv_heads, head_dim, dtype, device), len(lengths) + 2
    found = []
    for group, (shared, owns) in enumerate(groups):
        members = np.array([i for i, (theirs, _) in enumerate(sequences) if theirs == group], np.int32)
        rows = [pool.rows[i] for i in members]
        pool.index[rows, :shared] = pool.index[rows[0], :shared]
        if len(owns) > 1:
            found.append((rows[0], shared, members))
    layout = PrefixLayout.of(padded, heads, kv_heads)
    words = torch.zeros(layout.words, dtype=torch.int32)
    partials = PrefixPartials.empty(words.to(device), layout, heads, head_dim)
    write_prefixes(words.numpy(), layout, found, partials.splits(found, kv_heads) if found else 1)
    partials.words.copy_(words)
    partials.values.fill_(torch.nan)
    partials.extremes.fill_(torch.nan)
    q = normal(padded, heads + 2 * kv_heads, head_dim, dtype=dtype, device=device)[:, :heads]
    block_n = DecodeTiling.of(dtype, head_dim, device).block_n if LARGE else 16
    plan = DecodePlan.empty(padded, heads, kv_heads, head_dim, DecodeTiling(block_n, 4, 3, programs), device)
    plan.lengths[: len(lengths)] = torch.tensor(lengths, dtype=torch.int32)
    plan.rows[: len(lengths)] = torch.tensor(pool.rows, dtype=torch.int32)
    out = torch.full((padded, heads, head_dim), torch.nan, dtype=dtype, device=device)
    plan_decode(plan, padded, kv_heads, partials)
    prefix_attention(q, pool.kv, pool.index, partials)
    decode_attention(q, pool.kv, pool.index, plan, out, partials)
    truth = torch.stack([pool.attention(i, q[i], length) for i, length in enumerate(lengths)])
    assert error(out[: len(lengths)], truth) < BOUND[dtype]
    assert out[len(lengths) :].isnan().all()
    assert not plan.arrived.any()


@random_cases
@given(
    sequences=st.lists(st.tuples(st.integers(0, LONGEST), st.integers(1, 40)), min_size=1, max_size=4),
    heads=st.sampled_from(HEADS),
    dtype=st.sampled_from(DTYPES),
    decodes=st.integers(0, 3),
)
def test_prefill_attention(
    sequences: list[tuple[int, int]], heads: tuple[int, int, int], dtype: torch.dtype, decodes: int,
    device: torch.device,
) -> None:  # fmt: skip
    check_prefill(sequences, *heads, decodes, dtype, device)


def check_prefill(
    sequences: list[tuple[int, int]], heads: int, kv_heads: int, head_dim: int, decodes: int, dtype: torch.dtype,
    device: torch.device,
) -> None:  # fmt: skip
    from tokenllm_kernels.gpu.prefill_attention import ChunkTable, prefill_attention

    pool = Pool.of([prefix + count for prefix, count in sequences], kv_heads, head_dim, dtype, device)
    total = sum(count for _, count in sequences)
    q = normal(decodes + total + 5, heads + 2 * kv_heads, head_dim, dtype=dtype, device=device)[:, :heads]
    columns = torch.zeros(4, 32, dtype=torch.int32)
    start, truth = decodes, []
    for i, (prefix, count) in enumerate(sequences):
        columns[:, i] = torch.tensor([pool.rows[i], start, count, prefix + count])
        truth += [pool.attention(i, q[start + j], prefix + j + 1) for j in range(count)]
        start += count
    out = torch.full((len(q), heads, head_dim), torch.nan, dtype=dtype, device=device)
    prefill_attention(q, pool.kv, pool.index, ChunkTable(*columns.to(device)), total, out)
    assert error(out[decodes:start], torch.stack(truth)) < BOUND[dtype]
    assert out[:decodes].isnan().all()
    assert out[start:].isnan().all()


LONG_DECODES = [[32768], [1] * 512, [32768] + [7] * 63, list(range(1, 1024, 8))]
SHORT_DECODES = [[150], [1] * 20, [150] + [7] * 6, list(range(1, 40, 8))]
LONG_PREFILLS = [[(0, 1500)], [(8000, 300), (0, 1), (5, 700)], [(0, 33)] * 30]
SHORT_PREFILLS = [[(0, 100)], [(80, 30), (0, 1), (5, 70)], [(0, 3)] * 10]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("lengths", LONG_DECODES if LARGE else SHORT_DECODES, ids=str)
def test_decode_attention_of_uneven_batches(lengths: list[int], head_dim: int, device: torch.device) -> None:
    programs, dtype = (264, torch.bfloat16) if LARGE else (8, torch.float16)
    check_decode(lengths, *HEADS[-1][:2], head_dim, programs, dtype, device)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("sequences", LONG_PREFILLS if LARGE else SHORT_PREFILLS, ids=str)
def test_prefill_attention_of_uneven_chunks(
    sequences: list[tuple[int, int]], head_dim: int, device: torch.device
) -> None:
    check_prefill(sequences, *HEADS[-1][:2], head_dim, 3, torch.bfloat16 if LARGE else torch.float16, device)
