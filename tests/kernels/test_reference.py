"""The reference kernels against naive float64 definitions, on random ragged shapes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenllm_kernels import (
    LogitsRule,
    attention,
    linear,
    linear_add,
    linear_silu_mul,
    philox_uniform,
    plan_attention,
    prepare_linear,
    rms_norm,
    rope_and_store,
    rope_table,
    sample,
    silu_mul,
    top_logprobs,
)

sequences = st.lists(st.tuples(st.integers(0, 70), st.one_of(st.just(1), st.integers(1, 40))), min_size=1, max_size=12)


def error_ratio(ours: Tensor, truth: Tensor) -> float:
    """Root mean square of the difference over that of the truth; a NaN fails every bound."""
    difference = (ours.double() - truth.double()).pow(2).mean().sqrt()
    return float(difference / truth.double().pow(2).mean().sqrt())


def naive_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One token, one sequence, float64: q [heads, dim], k and v [context, kv_heads, dim] → [heads · dim]."""
    group = q.shape[0] // k.shape[1]
    heads = []
    for head in range(q.shape[0]):
        keys, values = k[:, head // group].double(), v[:, head // group].double()
        weights = (keys @ q[head].double() / math.sqrt(q.shape[1])).softmax(0)
        heads.append(weights @ values)
    return torch.cat(heads)


@settings(deadline=None, max_examples=40)
@given(sequences, st.sampled_from([(9, 3, 64), (4, 4, 16), (8, 1, 32)]), st.integers(0, 2**31))
def test_attention_of_a_ragged_batch(shape: list[tuple[int, int]], heads: tuple[int, int, int], seed: int) -> None:
    q_heads, kv_heads, dim = heads
    torch.manual_seed(seed)
    starts, counts = [s for s, _ in shape], [c for _, c in shape]
    total = sum(starts) + sum(counts)
    rows = torch.randperm(len(shape) + 3)[: len(shape)].tolist()
    kv = torch.full((total + 1, kv_heads, 2, dim), math.nan)  # reading a slot nobody wrote shows
    kv[total] = 0
    index = torch.full((len(shape) + 3, 128), total, dtype=torch.int32)
    free = torch.randperm(total)
    for row, start, count in zip(rows, starts, counts, strict=True):
        mine, free = free[: start + count], free[start + count :]
        kv[mine] = torch.randn(len(mine), kv_heads, 2, dim)
        index[row, : len(mine)] = mine.int()
    q = torch.randn(sum(counts), q_heads, dim)

    out = attention(q, kv, plan_attention(index, rows, starts, counts, total, torch.float32))

    expected, at = torch.empty(sum(counts), q_heads * dim, dtype=torch.float64), 0
    for row, start, count in zip(rows, starts, counts, strict=True):
        for position in range(start, start + count):
            k, v = kv[index[row, : position + 1].long()].unbind(2)
            expected[at] = naive_attention(q[at], k, v)
            at += 1
    assert error_ratio(out, expected) < 1e-5


def test_very_different_lengths_are_not_padded_together() -> None:
    index = torch.zeros(3, 5000, dtype=torch.int32)
    plan = plan_attention(index, [0, 1, 2], [10, 4500, 12], [1, 1, 1], 0, torch.float32)
    assert [group.places.tolist() for group in plan.together] == [[0, 2], [1]]


@pytest.mark.parametrize("half_weights", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 33])
def test_linear(rows: int, half_weights: bool) -> None:
    x, w, b = torch.randn(rows, 96), torch.randn(160, 96), torch.randn(160)
    ours = linear(x, prepare_linear(w, b, half_weights=half_weights))
    stored = w.half() if half_weights else w
    assert error_ratio(ours, x.double() @ stored.double().T + b.double()) < 1e-5


def test_half_weights_refuse_what_float16_cannot_hold() -> None:
    with pytest.raises(ValueError, match="float32"):
        prepare_linear(torch.full((4, 4), 70000.0), half_weights=True)


def test_products_of_a_layer() -> None:
    x, gain, residual = torch.randn(5, 64), torch.randn(64), torch.randn(5, 24)
    w = torch.randn(24, 64)
    wide = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * gain
    assert error_ratio(rms_norm(x, gain, 1e-5), wide) < 1e-6
    assert error_ratio(linear(rms_norm(x, gain, 1e-5), prepare_linear(w)), wide @ w.double().T) < 1e-5
    gate, up = (wide @ w.double().T).chunk(2, -1)
    gated = linear_silu_mul(rms_norm(x, gain, 1e-5), prepare_linear(w))
    assert error_ratio(gated, gate / (1 + (-gate).exp()) * up) < 1e-5
    truth = residual.double() + x.double() @ w.double().T
    assert error_ratio(linear_add(x, prepare_linear(w), residual), truth) < 1e-5
    assert error_ratio(residual, truth) < 1e-5


def test_silu_mul() -> None:
    gate_up = torch.randn(5, 64)
    gate, up = gate_up.double().chunk(2, -1)
    assert error_ratio(silu_mul(gate_up.clone()), gate / (1 + (-gate).exp()) * up) < 1e-6


@pytest.mark.parametrize("normalise", [False, True])
def test_rope_and_store(normalise: bool) -> None:
    heads, kv_heads, dim, tokens = 4, 2, 16, 6
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim)
    positions, slots = torch.tensor([0, 1, 2, 9, 40, 41]), torch.tensor([5, 3, 0, 7, 1, 8])
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    kv = torch.full((10, kv_heads, 2, dim), math.nan)
    norm = (torch.randn(dim), torch.randn(dim), 1e-6) if normalise else None

    q = rope_and_store(qkv, rope_table(frequencies, 64, torch.float32)[positions], kv, slots, heads, norm)

    parts = qkv.double().view(tokens, -1, dim)
    for t in range(tokens):
        turn = torch.polar(torch.ones(dim // 2, dtype=torch.float64), positions[t] * frequencies)
        for head in range(heads + kv_heads):
            x = parts[t, head]
            if norm:
                x = x / (x.pow(2).mean() + 1e-6).sqrt() * norm[head >= heads].double()
            turned = torch.complex(x[: dim // 2], x[dim // 2 :]) * turn  # a pair is one number in the plane
            expected = torch.cat((turned.real, turned.imag))
            ours = q[t, head] if head < heads else kv[slots[t], head - heads, 0]
            assert error_ratio(ours, expected) < 1e-5
        assert torch.equal(kv[slots[t], :, 1].double(), parts[t, heads + kv_heads :])
    untouched = [slot for slot in range(10) if slot not in slots.tolist()]
    assert kv[untouched].isnan().all()


# ---- sampling ----


def draw(logits: Tensor, rule: LogitsRule, position: int = 0, counts: Tensor | None = None) -> int:
    return int(sample(logits[None], [rule], [position], [counts])[0])


def test_philox_known_answers() -> None:
    """The counters and keys of the reference implementation's own test vectors: zero, and all ones where they fit."""
    assert philox_uniform(0, 0) == ((0x6627E8D5 << 21) | (0xE169C58D >> 11)) / 2**53


def test_philox_is_uniform() -> None:
    drawn = torch.tensor([philox_uniform(seed, position) for seed in range(40) for position in range(100)])
    assert drawn.min() >= 0 and drawn.max() < 1
    expected = torch.full((10,), 400.0)
    chi_square = ((drawn.histc(10, 0, 1) - expected) ** 2 / expected).sum()
    assert chi_square < 27.9  # one in a thousand for nine degrees of freedom


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 300),
    st.floats(0.05, 3),
    st.integers(0, 20),
    st.floats(0.05, 1),
    st.integers(0, 2**63 - 1),
)
def test_a_drawn_token_is_one_that_may_be_drawn(
    vocab: int, temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(seed % 2**31)) * 4
    token = draw(logits, LogitsRule(seed, temperature, top_p, top_k))
    rank = int((logits > logits[token]).sum())
    p = (logits.double() / temperature).softmax(0)
    assert 0 <= token < vocab
    assert top_k == 0 or rank < top_k
    assert p[logits > logits[token]].sum() < top_p + 1e-9 or top_k > 0


def test_a_row_does_not_see_its_neighbours() -> None:
    logits = torch.randn(6, 500) * 3
    rules = [LogitsRule(seed, temperature=1.0, top_p=0.9, top_k=50) for seed in range(6)]
    together = sample(logits, rules, [7] * 6, [None] * 6).tolist()
    assert together == [draw(logits[i], rules[i], 7) for i in range(6)]
    assert together != sample(logits, rules, [8] * 6, [None] * 6).tolist()


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    drawn = [draw(logits, LogitsRule(seed=s)) for s in range(4000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / 4000
    assert (shares - logits.exp()).abs().max() < 0.03


def test_penalties() -> None:
    logits, counts = torch.tensor([2.0, 1.9, 0.0]), torch.tensor([3.0, 0.0, 0.0])
    assert draw(logits, LogitsRule(0, 0.0)) == 0
    assert draw(logits, LogitsRule(0, 0.0, presence_penalty=0.2), counts=counts) == 1
    assert draw(logits, LogitsRule(0, 0.0, frequency_penalty=0.02), counts=counts) == 0
    assert draw(logits, LogitsRule(0, 0.0, frequency_penalty=0.05), counts=counts) == 1


def test_a_row_that_is_not_a_number_is_told() -> None:
    logits = torch.zeros(3, 10)
    logits[0, 4] = math.nan
    logits[2] = -math.inf
    assert sample(
        logits, [LogitsRule(0, 0.0), LogitsRule(0, 0.0), LogitsRule(0, 1.0)], [0] * 3, [None] * 3
    ).tolist() == [
        -1,
        0,
        -1,
    ]


def test_top_logprobs_are_the_raw_models() -> None:
    logits = torch.randn(2, 50)
    chosen, values, ids = top_logprobs(logits, torch.tensor([3, 4]), 5)
    expected = logits.double().log_softmax(-1)
    assert error_ratio(chosen, expected[[0, 1], [3, 4]]) < 1e-6
    assert error_ratio(values, expected.sort(descending=True).values[:, :5]) < 1e-6
    assert torch.equal(ids[:, 0], logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-5, 1e-38, 1e-40, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = torch.randn(300)
    assert draw(logits, LogitsRule(3, temperature)) == logits.argmax()


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_a_flat_distribution_has_a_large_nucleus(top_p: float) -> None:
    """More likely tokens than are looked at first."""
    drawn = {draw(torch.zeros(5000), LogitsRule(seed, 1.0, top_p)) for seed in range(300)}
    assert 200 < len(drawn) <= 300
