"""Sampling against its definition in float64: the reference, and the kernels, in Triton's interpreter or on a GPU."""

import math
import os
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import assume, currently_in_test_context, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokenllm_kernels import LogitsRule, philox_uniform, sample
from tokenllm_kernels.gpu import sampling as gpu

LARGE = torch.cuda.is_available() and os.environ.get("KERNEL_SIZES") != "small"
CLOSE = 1e-5  # of the mass: nearer than this to a token's end, float32 may well choose its neighbour
NEARLY_ONE = 16390493  # a seed whose number at position 0 is 1 - 1.8e-8, which float32 takes for 1
NEARLY_ZERO = 19781057


# ---- the definition ----


def adjusted(logits: Tensor, rule: LogitsRule, position: int, counts: Tensor) -> Tensor:
    logits = logits.clone()
    for token, value in rule.logit_bias:
        logits[token] += value
    others = [token for token in range(len(logits)) if token not in dict(rule.logit_bias)] if rule.only_biased else []
    logits[[*others, *(rule.muted if position < rule.muted_until else ())]] = -math.inf
    repeated = counts > 0
    repeated[list(rule.prompt)] = True
    penalty = torch.where(logits > 0, 1 / rule.repetition_penalty, rule.repetition_penalty)
    logits = torch.where(repeated, logits * penalty, logits)
    return (logits - rule.frequency_penalty * counts - rule.presence_penalty * (counts > 0)).double()


def expect_clear(clear: Tensor | bool) -> None:
    """Leave out the examples that a rounding could decide; the fixed ones are known to be clear."""
    if currently_in_test_context():
        assume(bool(clear))


def weights_kept(logits: Tensor, rule: LogitsRule) -> Tensor:
    """Float64 weights of the tokens that may be drawn, 0 of the others."""
    weights = ((logits - logits.max()) / rule.temperature).exp()
    if 0 < rule.top_k < len(logits):
        weights = weights.where(logits >= logits.sort(descending=True).values[rule.top_k - 1], 0.0)
    if rule.top_p < 1:
        values, level = logits.unique(return_inverse=True)
        mass = torch.zeros_like(values).index_add(0, level, weights)
        above = (mass.flip(0).cumsum(0).flip(0) - mass)[level] / weights.sum()
        expect_clear(((above - rule.top_p).abs() > 1e-6).all())
        weights = weights.where((above < rule.top_p) | (logits == logits.max()), 0.0)
    if rule.min_p > 0:
        least = logits.max() + rule.temperature * math.log(rule.min_p)
        expect_clear(rule.min_p == 1 or ((logits - least).abs() > 1e-5).all())
        weights = weights.where(logits >= least, 0.0)
    return weights


def may_be_chosen(token: int, logits: Tensor, rule: LogitsRule, position: int, counts: Tensor) -> bool:
    logits = adjusted(logits, rule, position, counts)
    if logits.max() == -math.inf:
        return token == -1
    if rule.temperature == 0:
        return token == int(logits.argmax())
    weights = weights_kept(logits, rule)
    upto = weights.cumsum(0) / weights.sum()
    u = philox_uniform(rule.seed, position)
    before = float(upto[token] - weights[token] / weights.sum())
    return bool(weights[token] > 0) and before - CLOSE <= u <= float(upto[token]) + CLOSE


def reference(logits: Tensor, rule: LogitsRule, position: int, counts: Tensor) -> int:
    return int(sample(logits[None].float(), [rule], [position], [counts.float()])[0])


@st.composite
def rules(draw: st.DrawFn, vocab: int) -> LogitsRule:
    some = st.booleans()
    token = st.integers(0, vocab - 1)
    bias = st.dictionaries(token, st.floats(-20, 20, width=32) | st.just(-math.inf), max_size=5)
    few = st.lists(token, max_size=5, unique=True).map(tuple)
    repetition_penalty = draw(st.floats(0.5, 2, width=32)) if draw(some) else 1.0
    return LogitsRule(
        seed=draw(st.integers(0, 2**64 - 1)),
        temperature=draw(st.sampled_from([0.0, 1e-5, 0.3, 1.0, 2.5])),
        top_p=draw(st.floats(0, 0.999)) if draw(some) else 1.0,
        top_k=draw(st.integers(1, vocab + 5)) if draw(some) else 0,
        min_p=draw(st.floats(0.001, 1)) if draw(some) else 0.0,
        frequency_penalty=draw(st.floats(-2, 2, width=32)) if draw(some) else 0.0,
        presence_penalty=draw(st.floats(-2, 2, width=32)) if draw(some) else 0.0,
        logit_bias=tuple(draw(bias).items()) if draw(some) else (),
        only_biased=draw(st.integers(0, 9)) == 0,
        muted=draw(few) if draw(some) else (),
        muted_until=draw(st.sampled_from([0, 12, 18])),  # of positions 11 and 17 to 20
        repetition_penalty=repetition_penalty,
        prompt=draw(few) if repetition_penalty != 1 else (),
    )


def random_logits(vocab: int, seed: int, scale: float, *, ties: bool, rows: int = 1) -> Tensor:
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale
    logits = logits.round() if ties else logits
    return logits.masked_fill(torch.arange(vocab) % 5 == 4, -math.inf)


scales = st.sampled_from([0.01, 1.0, 5.0])


@settings(deadline=None, max_examples=200)
@given(st.data(), st.sampled_from([2, 7, 100, 3000]), st.integers(0, 2**31), scales, st.booleans())
def test_the_reference_is_its_definition(data: st.DataObject, vocab: int, seed: int, scale: float, ties: bool) -> None:
    logits, rule = random_logits(vocab, seed, scale, ties=ties)[0], data.draw(rules(vocab))
    counts = torch.randint(0, 3, (vocab,), generator=torch.Generator().manual_seed(seed)).float()
    assert may_be_chosen(reference(logits, rule, 11, counts), logits, rule, 11, counts)


@pytest.mark.parametrize("filters", [{}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.3}])
def test_the_references_draws_follow_the_distribution(filters: dict[str, Any]) -> None:
    logits, draws = torch.tensor([0.1, 0.05, 0.25, 0.3, 0.1, 0.2]).log(), 3000
    expected = weights_kept(logits.double(), LogitsRule(0, **filters))
    drawn = [reference(logits, LogitsRule(seed, **filters), 3, torch.zeros(6)) for seed in range(draws)]
    found, expected = torch.bincount(torch.tensor(drawn), minlength=6), expected / expected.sum() * draws
    assert not found[expected == 0].any()
    chi_square = ((found - expected) ** 2 / expected)[expected > 0].sum()
    assert chi_square < 20.5  # one in a thousand for five degrees of freedom, rarer for fewer


# ---- the kernels ----


class Batch:
    """A table and a workspace, and the reference asked the same questions."""

    def __init__(self, device: torch.device, vocab: int, block: int = 64, rows: int = 8) -> None:
        self.device = device
        self.table = gpu.SamplingTable.empty(rows + 3, vocab, device)
        self.workspace = gpu.SamplingWorkspace.empty(rows, vocab, device, block)

    def choose(self, logits: Tensor, rows: list[int], positions: list[int]) -> list[int]:
        out = torch.full((len(rows),), 99, dtype=torch.int32, device=self.device)
        columns = torch.tensor([rows, positions], dtype=torch.int32, device=self.device)
        gpu.sample_rows(logits.to(self.device), columns[0], columns[1], self.table, out, self.workspace)
        return out.tolist()


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@settings(deadline=None, max_examples=300 if LARGE else 20)
@given(
    st.data(),
    st.sampled_from([1000, 7, 100] if LARGE else [250, 7]),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
    scales,
    st.booleans(),
    st.sampled_from([4, 256]),
)
def test_the_kernels_are_the_definition(
    device: torch.device,
    data: st.DataObject,
    vocab: int,
    dtype: torch.dtype,
    seed: int,
    scale: float,
    ties: bool,
    groups_at_once: int,
) -> None:
    batch, n = Batch(device, vocab), 3
    rows = data.draw(st.permutations(range(11)))[:n]
    asked = [data.draw(rules(vocab)) for _ in rows]
    gpu.set_rules(batch.table, rows, asked)
    counts = torch.randint(0, 3, (11, vocab), generator=torch.Generator().manual_seed(seed)).short()
    batch.table.counts.add_(counts.to(device))  # to which the signs of the prompts' tokens stay
    logits = random_logits(vocab, seed, scale, ties=ties, rows=n + 1).to(dtype)
    padding = data.draw(st.integers(0, n))
    placed = [*rows[:padding], -1, *rows[padding:]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "PASS", groups_at_once)
        tokens = batch.choose(logits, placed, [17, 18, 19, 20])

    assert tokens.pop(padding) == -1
    used = torch.cat([logits[:padding], logits[padding + 1 :]]).float()
    positions = [p for p in (17, 18, 19, 20) if p != 17 + padding]
    last = torch.zeros(11, dtype=torch.int32)
    for token, row, rule, mine, position in zip(tokens, rows, asked, used, positions, strict=True):
        assert may_be_chosen(token, mine, rule, position, counts[row].float()), (token, rule)
        counts[row, token] += token >= 0
        last[row] = max(token, 0)
        repeated = [token in rule.prompt for token in range(vocab)]
        assert (batch.table.counts[row] < 0).tolist() == repeated
    assert torch.equal(batch.table.counts.cpu() & gpu.MOST_COUNTED, counts)
    assert torch.equal(batch.table.last_token.cpu(), last)


KINDS = [
    LogitsRule(5, 0.0),
    LogitsRule(6, 1.0),
    LogitsRule(7, 1.0, top_k=40),
    LogitsRule(8, 1.0, top_p=0.9),
    LogitsRule(9, 0.8, top_p=0.95, top_k=300, min_p=0.01),
    LogitsRule(10, 1.0, min_p=0.2),
    LogitsRule(11, 1.0, top_p=0.6, logit_bias=((8192, 6.0),), presence_penalty=1.0),
]


@pytest.mark.parametrize("scale", [0.001, 3.0])  # of a flat distribution every group is listed
@pytest.mark.parametrize("vocab", [8193] + [151936] * LARGE)
def test_a_vocabulary_that_is_no_multiple_of_the_block(device: torch.device, vocab: int, scale: float) -> None:
    batch, rows = Batch(device, vocab, block=2048 if vocab == 8193 else gpu.BLOCK), list(range(len(KINDS)))
    gpu.set_rules(batch.table, rows, KINDS)
    logits = torch.randn(len(KINDS), vocab, generator=torch.Generator().manual_seed(vocab)) * scale
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "PASS", 16)  # so that a nucleus may lie beyond the groups looked at first
        tokens = batch.choose(logits, rows, [4] * len(rows))
    for token, mine, rule in zip(tokens, logits, KINDS, strict=True):
        assert may_be_chosen(token, mine, rule, 4, torch.zeros(vocab)), (token, rule)


@pytest.mark.parametrize("seed", [NEARLY_ONE, NEARLY_ZERO])
def test_the_ends_of_the_range(device: torch.device, seed: int) -> None:
    """Float32 takes the number for 0 or 1; the first and the last token of any weight are drawn all the same."""
    assert philox_uniform(seed, 0) in (0.9999999822141574, 1.0599960353907534e-08)
    batch, rows = Batch(device, 1000), [0, 1, 2, 3]
    asked = [replace(rule, seed=seed) for rule in (KINDS[1], LogitsRule(0, 1.0, top_k=900), KINDS[5], KINDS[3])]
    asked[3] = replace(asked[3], top_p=0.9999)
    gpu.set_rules(batch.table, rows, asked)
    logits = torch.zeros(4, 1000)
    logits[:, :3] = logits[:, 990:] = -math.inf
    assert batch.choose(logits, rows, [0] * 4) == [989 if seed == NEARLY_ONE else 3] * 4


@pytest.mark.parametrize("dtype", [*DTYPES, "biased"])
def test_neighbouring_numbers_are_told_apart(device: torch.device, dtype: torch.dtype | str) -> None:
    """Logits that rise with the id in the smallest steps their type has, on both sides of zero."""
    logits, bias, steps = torch.ones(1, 100, dtype=torch.bfloat16), (), torch.arange(100)
    if isinstance(dtype, str):
        bias = tuple((token, token * 2.0**-23) for token in range(100))
    else:
        logits = (1 + steps * torch.finfo(dtype).eps)[None].to(dtype)
        logits[:, :50] -= 2  # below zero the order of the bits is another
    asked = [LogitsRule(NEARLY_ZERO, 1000.0, top_k=k, logit_bias=bias) for k in (1, 2, 7, 48, 49, 50, 51, 99)]
    asked += [LogitsRule(NEARLY_ZERO, 1000.0, top_p=p, logit_bias=bias) for p in (0.0, 0.305, 0.985)]
    batch, rows = Batch(device, 100, rows=len(asked)), list(range(len(asked)))
    gpu.set_rules(batch.table, rows, asked)
    tokens = batch.choose(logits.expand(len(asked), 100).contiguous(), rows, [0] * len(asked))
    assert [100 - token for token in tokens] == [1, 2, 7, 48, 49, 50, 51, 99, 1, 31, 99]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_a_number_is_told(device: torch.device, bad: float) -> None:
    batch, rows = Batch(device, 100), [4, 0, 7, 2]
    gpu.set_rules(batch.table, rows, [LogitsRule(1, 0.0), LogitsRule(2, 1.0), KINDS[2], LogitsRule(3, 0.0)])
    logits = random_logits(100, 3, 2.0, ties=False, rows=4)
    alone = batch.choose(logits, rows, [0] * 4)
    batch.table.counts.zero_()
    logits[1, 70] = logits[0, 99] = bad
    logits[2] = -math.inf
    assert batch.choose(logits, rows, [0] * 4) == [-1, -1, -1, alone[3]]
    assert batch.table.last_token[rows].tolist() == [0, 0, 0, alone[3]]
    assert batch.table.counts.sum() == 1


def test_new_rules_forget_the_old_ones(device: torch.device) -> None:
    batch = Batch(device, 100)
    logits = random_logits(100, 1, 2.0, ties=False, rows=2)
    biased = LogitsRule(1, 0.0, frequency_penalty=2.0, logit_bias=((3, 90.0), (50, 80.0)))
    gpu.set_rules(batch.table, [6, 1], [LogitsRule(1, 0.0), biased])
    highest = int(logits[0].argmax())
    for _ in range(8):
        assert batch.choose(logits, [6, 1], [0, 0])[0] == highest
    assert batch.table.counts[[6, 1], [highest, 3]].tolist() == [8, 7]  # then the other bias is the higher one
    gpu.set_rules(batch.table, [1], [LogitsRule(1, 0.0)])
    assert batch.choose(logits, [6, 1], [0, 0]) == [highest, int(logits[1].argmax())]
    assert batch.table.counts[[6, 1]].sum(1).tolist() == [9, 1]


def test_counts_stay_within_their_type(device: torch.device) -> None:
    batch = Batch(device, 7)
    gpu.set_rules(batch.table, [0], [LogitsRule(1, 0.0)])
    batch.table.counts.fill_(32767)
    batch.choose(torch.zeros(1, 7), [0], [0])
    assert batch.table.counts[0, 0] == 32767


@pytest.mark.parametrize(
    ("bias", "said"),
    [
        (tuple((token, 1.0) for token in range(1025)), "1025 tokens, more than 1024"),
        (((3, 1.0), (3, 2.0)), "names a token twice"),
        (((1000, 1.0),), "token 1000, and the vocabulary has 1000"),
    ],
)
def test_a_bias_the_table_cannot_hold_is_refused(
    device: torch.device, bias: tuple[tuple[int, float], ...], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        gpu.set_rules(Batch(device, 1000).table, [0], [LogitsRule(0, logit_bias=bias)])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (((1, 2),) * 65, "65 bad words are more than 64"),
        (((1,),), "a bad word has 2 to 8 tokens"),
        ((tuple(range(9)),), "a bad word has 2 to 8 tokens"),
        (((1, 1000),), "token 1000, and the vocabulary has 1000"),
    ],
)
def test_bad_words_the_table_cannot_hold_are_refused(
    device: torch.device, words: tuple[tuple[int, ...], ...], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        gpu.set_rules(Batch(device, 1000).table, [0], [LogitsRule(0, bad_words=words)])


def test_the_longest_bias(device: torch.device) -> None:
    batch = Batch(device, 2000)
    bias = tuple((token, float(token)) for token in range(1999, 1999 - 1024, -1))
    gpu.set_rules(batch.table, [2], [LogitsRule(0, 0.0, logit_bias=bias)])
    logits = torch.zeros(1, 2000)
    logits[0, 1998] = 1.5
    assert batch.choose(logits, [2], [0]) == [1998]


@settings(deadline=None, max_examples=100 if LARGE else 15)
@given(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=8).map(tuple), min_size=1, max_size=64), st.data())
def test_a_bad_word_is_never_said(device: torch.device, words: list[tuple[int, ...]], data: st.DataObject) -> None:
    """Of three tokens, one likelier than the next, whichever ends no bad word is said: the kernels', the reference's
    and the definition's.
    """
    logits = torch.tensor([[3.0, 2.0, 1.0]]) if data.draw(st.booleans()) else torch.tensor([[1.0, 2.0, 2.5]])
    rule = LogitsRule(1, 0.0, bad_words=tuple(words))
    batch, said = Batch(device, 3), []
    gpu.set_rules(batch.table, [4], [rule])
    for position in range(12):
        text = [[*said, token] for token in logits[0].argsort(descending=True).tolist()]
        good = [one[-1] for one in text if not any(tuple(one[-len(word) :]) == word for word in words)]
        expected = good[0] if good else -1
        assert batch.choose(logits, [4], [position]) == [expected]
        assert sample(logits, [rule], [position], [None], [said]).tolist() == [expected]
        if not good:
            return
        said.append(expected)


@triton.jit
def uniforms(seeds, positions, out):
    i = tl.program_id(0)
    tl.store(out + i, gpu._uniform(tl.load(seeds + i), tl.load(positions + i)))


def test_the_random_numbers_are_the_references(device: torch.device) -> None:
    seeds = [0, 1, 2**32 - 1, 2**32, 2**62 + 12345, 2**63 - 1, NEARLY_ONE, NEARLY_ZERO]
    positions = [0, 1, 77, 2**31 - 1, 5, 131071, 0, 0]
    out = torch.zeros(len(seeds), dtype=torch.float64, device=device)
    columns = torch.tensor(seeds, device=device), torch.tensor(positions, dtype=torch.int32, device=device)
    uniforms[(len(seeds),)](*columns, out)
    assert out.tolist() == [philox_uniform(s, p) for s, p in zip(seeds, positions, strict=True)]


@pytest.mark.gpu
def test_a_graph_decides_anew_at_each_replay(device: torch.device) -> None:
    vocab, rows = 8193, list(range(len(KINDS)))
    eager, replayed = Batch(device, vocab), Batch(device, vocab)
    for batch in (eager, replayed):
        gpu.set_rules(batch.table, rows, KINDS)
    columns = torch.tensor([rows, [0] * len(rows)], dtype=torch.int32, device=device)
    logits = torch.zeros(len(rows), vocab, device=device, dtype=torch.bfloat16)
    out = torch.zeros(len(rows), dtype=torch.int32, device=device)
    fill = columns.clone().fill_(-1)
    gpu.sample_rows(logits, fill[0], fill[1], replayed.table, out, replayed.workspace)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gpu.sample_rows(logits, columns[0], columns[1], replayed.table, out, replayed.workspace)
    for position in range(20):
        logits.copy_(torch.randn(len(rows), vocab) * 3)
        columns[1].fill_(position)
        graph.replay()
        assert out.tolist() == eager.choose(logits, rows, [position] * len(rows))
    assert torch.equal(replayed.table.counts, eager.table.counts)


@pytest.mark.gpu  # takes more draws than the interpreter has time for
@pytest.mark.large
@pytest.mark.parametrize("rule", KINDS[1:6])
def test_the_kernels_draws_follow_the_distribution(device: torch.device, rule: LogitsRule) -> None:
    n, vocab = 16384, 100
    batch = Batch(device, vocab, rows=n)
    gpu.set_rules(batch.table, range(n), [replace(rule, seed=seed) for seed in range(n)])
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(1)) * 1.5
    tokens = torch.tensor(batch.choose(logits.expand(n, vocab).contiguous(), list(range(n)), [1] * n))
    expected = weights_kept(logits.double(), rule)
    found, expected = torch.bincount(tokens, minlength=vocab), expected / expected.sum() * n
    assert not found[expected == 0].any()
    chi_square = float(((found - expected) ** 2 / expected)[expected > 0].sum())
    freedom = int((expected > 0).sum()) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 8
