"""The CUDA runner says what the CPU runner says, whatever comes and goes in its batch. Where there is no GPU, Triton's
interpreter plays it: everything but the capture of graphs is the same.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace as but

from tokenllm.engine import cuda_runner
from tokenllm.engine.cuda_runner import CudaRunner
from tokenllm.engine.cuda_start import limits_of
from tokenllm.engine.device_step import DeviceStep
from tokenllm.engine.graphs import Graphs
from tokenllm.engine.runner import CpuRunner
from tokenllm.memory.token_memory import TokenMemory
from tokenllm.messages import Sampling, Step, Submit
from tokenllm.models.decoder import Decoder, Layer
from tokenllm.routing.columns import Columns
from tokenllm.routing.conservative import WorstCase
from tokenllm.routing.first_come import FirstCome, Policy
from tokenllm.routing.router import Router
from tokenllm.scheduler import prefixes, rows
from tokenllm.scheduler.scheduler import Scheduler
from tokenllm_kernels import Linear, kernels_for, prepare_linear, rope_table

ROWS, CONTEXT, SLOTS, CHUNK, VOCAB = 5, 64, 200, 16, 101
if torch.cuda.is_available():
    torch.cuda.set_stream(torch.cuda.Stream())  # graphs are never captured on the default one
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _sent_in_many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of so small a model are longer than one part, too."""
    monkeypatch.setattr(cuda_runner, "SENT_AT_ONCE", 16)


def tiny_decoder(*, qk_norm: bool, heads: int, kv_heads: int) -> Decoder:
    """Random weights, large enough that tokens are not near-ties."""
    hidden, width, head_dim, generator = 32, 48, 16, torch.Generator().manual_seed(heads)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    def layer() -> Layer:
        return Layer(
            input_norm=1 + random(hidden),
            qkv=prepare_linear(
                random((heads + 2 * kv_heads) * head_dim, hidden), random((heads + 2 * kv_heads) * head_dim)
            ),
            qk_norm=(1 + random(head_dim), 1 + random(head_dim), 1e-6) if qk_norm else None,
            o=prepare_linear(random(hidden, heads * head_dim)),
            post_norm=1 + random(hidden),
            gate_up=prepare_linear(random(2 * width, hidden)),
            down=prepare_linear(random(hidden, width)),
        )

    embedding = random(VOCAB, hidden)
    rope = rope_table(100.0 ** -torch.linspace(0, 1, head_dim // 2), CONTEXT, torch.float32)
    layers = tuple(layer() for _ in range(2))
    return Decoder(
        embedding, layers, 1 + random(hidden), prepare_linear(random(VOCAB, hidden)), rope, heads, kv_heads, head_dim,
        1e-5, torch.float32, kernels_for(torch.device("cpu")),
    )  # fmt: skip


def on_gpu(decoder: Decoder) -> Decoder:
    """The same weights where Triton computes."""
    from tokenllm_kernels import gpu

    def moved(value: Any) -> Any:
        match value:
            case torch.Tensor():
                return value.to(DEVICE)
            case Linear():
                plain = value.weight if value.kind == "plain" else value.weight.to_dense()
                bias = None if value.bias is None else value.bias.to(DEVICE)
                return Linear("plain", plain.to(DEVICE), bias, value.out_features)
            case Layer():
                return Layer(**{name: moved(field) for name, field in vars(value).items()})
            case tuple():
                return tuple(moved(item) for item in value)
        return value

    fields = {name: moved(field) for name, field in vars(decoder).items()}
    return Decoder(**fields | {"kernels": gpu})


LISTS: dict[int, dict[str, Any]] = {  # what some of them say of tokens
    1: {"logit_bias": ((5, 3.0), (6, -1.0), (7, float("-inf"))), "prompt_logprobs": 1},
    2: {"bad_words": tuple((token, token) for token in range(60)), "repetition_penalty": 1.3},
    3: {"logit_bias": tuple((token, 0.0) for token in range(0, 60, 2)), "only_biased": True},
    4: {"muted": tuple(range(40)), "min_tokens": 3, "repetition_penalty": 0.8, "min_p": 0.1},
    5: {"prompt_logprobs": 2, "repetition_penalty": 1.1, "bad_words": ((1, 2, 3),)},
    6: {"prompt_logprobs": 0},
}


def submits(longest: int = 8) -> list[tuple[int, Submit]]:
    """Prompts of all lengths, which come at different steps and sample in different ways."""
    random = np.random.default_rng(1)
    found = []
    for uid in range(8):
        prompt = random.integers(0, VOCAB, int(random.integers(1, 40)), dtype=np.int32)
        if uid > 4:  # as much as they share with the first is computed once
            prompt = np.concatenate((np.frombuffer(found[0][1].prompt, np.int32), prompt[: uid - 4]))
        rule = Sampling(
            seed=uid,
            temperature=0.9 * (uid % 3 == 1),
            top_k=7 * (uid % 2),
            top_p=0.9 if uid % 4 == 1 else 1.0,
            frequency_penalty=0.7 * (uid % 3 == 2),
            logprobs=2,
            **LISTS.get(uid, {}),
        )
        most = int(random.integers(1, longest + 1))
        found.append((uid * 2 % 7, Submit(uid, prompt.tobytes(), most, rule, ignore_eos=True)))
    return found


def who_want_vectors(longest: int = 8) -> list[tuple[int, Submit]]:
    """The same prompts; of every three one wants the mean, one the last, and one generates beside them."""
    plain = Sampling(seed=0, temperature=0.0, logprobs=2)
    asked = enumerate(submits(longest))
    return [(since, but(one, pooling=("mean", "last", None)[uid % 3], sampling=plain)) for uid, (since, one) in asked]


class Reckless(FirstCome):
    """Admits whoever comes: pauses have to make up for it."""

    def admits(self, running: Columns, candidates: Columns, room: float) -> int:
        return len(candidates)


def told(
    runner: CpuRunner | CudaRunner,
    policy: Policy | None = None,
    slots: int = SLOTS,
    longest: int = 8,
    asked: Callable[[int], list[tuple[int, Submit]]] = submits,
) -> dict[int, list[Any]]:
    """What each request was told, the books kept and steps run ahead as the server does."""
    memory = TokenMemory(slots)
    books = Scheduler(
        memory, Router(policy or WorstCase(), None, ROWS), rows=ROWS, max_positions=CONTEXT, prefill_chunk_tokens=CHUNK,
        most_chunks=runner.most_chunks, most_context_tokens=runner.most_context_tokens,
        max_queued_requests=99, max_queued_tokens=999, eos_ids=frozenset(),
    )  # fmt: skip
    flights: deque[Any] = deque()
    said: dict[int, list[Any]] = {}
    for step in range(200):
        for since, submit in asked(longest):
            if since == step:
                books.accept(submit)
        planned = books.plan()
        if planned:
            flights.append((planned, runner.launch(planned.plan)))
        if len(flights) > runner.ahead or (flights and not planned):
            planned, flight = flights.popleft()
            sampled = runner.collect(flight)
            enter(books.settle(planned, sampled), said)
            said.update((uid, vector.tolist()) for uid, vector in sampled.vectors.items())
    assert memory.active == 0 and bool(books.pauses) == bool(policy)
    return said


def enter(step: Step, said: dict[int, list[Any]]) -> None:
    for uid, tokens in (*step.prompt_logprobs.items(), *step.logprobs.items()):
        said.setdefault(uid, []).extend(tokens)


@pytest.mark.parametrize(("qk_norm", "heads", "kv_heads"), [(False, 4, 2), (True, 3, 1)])
def test_it_says_what_the_cpu_says(qk_norm: bool, heads: int, kv_heads: int) -> None:
    decoder = tiny_decoder(qk_norm=qk_norm, heads=heads, kv_heads=kv_heads)
    expected = told(CpuRunner(decoder, SLOTS, ROWS, CONTEXT))
    step = DeviceStep(on_gpu(decoder), limits_of(ROWS, CHUNK, CONTEXT))
    runner = CudaRunner(step, step.decoder.kv_memory(SLOTS), lambda doing: iter)
    said = told(runner)
    assert said.keys() == expected.keys()
    for uid, tokens in expected.items():
        assert [t.token for t in said[uid]] == [t.token for t in tokens], f"request {uid}"
        assert np.allclose([t.logprob for t in said[uid]], [t.logprob for t in tokens], atol=1e-4)


def test_vectors_are_the_same_for_whoever_computes_them_and_after_a_pause() -> None:
    decoder = tiny_decoder(qk_norm=False, heads=4, kv_heads=2)
    expected = told(CpuRunner(decoder, SLOTS, ROWS, CONTEXT), longest=10, asked=who_want_vectors)
    step = DeviceStep(on_gpu(decoder), limits_of(ROWS, CHUNK, CONTEXT))
    cuda = CudaRunner(step, step.decoder.kv_memory(SLOTS), lambda doing: iter)
    for runner in (CpuRunner(decoder, SLOTS, ROWS, CONTEXT), cuda):
        said = told(runner, Reckless(), slots=50, longest=10, asked=who_want_vectors)
        assert said.keys() == expected.keys()
        for uid in (0, 1, 3, 4, 6, 7):
            assert len(said[uid]) == 32 and np.allclose(said[uid], expected[uid], atol=1e-4), f"request {uid}"
        for uid in (2, 5):
            assert [t.token for t in said[uid]] == [t.token for t in expected[uid]], f"request {uid}"


def test_what_requests_share_may_be_read_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here prefixes are short: any that two decodes share is read so."""
    monkeypatch.setattr(prefixes, "LEAST_SAVED", 1)
    monkeypatch.setattr(prefixes, "PROBES", [1, 2, 4])
    monkeypatch.setattr(rows, "PROBES", [1, 2, 4])
    sent: list[int] = []
    send = CudaRunner._send_prefixes

    def noting(self: CudaRunner, shared: tuple[Any, ...], words: torch.Tensor) -> None:
        sent.append(sum(len(prefix.members) for prefix in shared))
        send(self, shared, words)

    monkeypatch.setattr(CudaRunner, "_send_prefixes", noting)
    test_it_says_what_the_cpu_says(False, 4, 2)
    assert max(sent) >= 2 and 0 in sent


def test_a_step_reads_as_much_as_fills_a_graph() -> None:
    graphs = Graphs.__new__(Graphs)
    graphs._mixed_sizes = [64, 128, 256]
    asked = {(0, 64): 64, (30, 50): 34, (60, 70): 68, (100, 20): 20, (100, 56): 28, (100, 57): 57, (0, 40): 40}
    assert {case: graphs.filled(*case) for case in asked} == asked


def test_who_is_paused_is_told_the_same() -> None:
    """Penalties count what was generated before the pause, and logprobs are those of an undisturbed run."""
    decoder = tiny_decoder(qk_norm=False, heads=4, kv_heads=2)
    expected = told(CpuRunner(decoder, SLOTS, ROWS, CONTEXT), longest=10)
    step = DeviceStep(on_gpu(decoder), limits_of(ROWS, CHUNK, CONTEXT))
    cuda = CudaRunner(step, step.decoder.kv_memory(SLOTS), lambda doing: iter)
    for runner in (CpuRunner(decoder, SLOTS, ROWS, CONTEXT), cuda):
        said = told(runner, Reckless(), slots=50, longest=10)
        assert said.keys() == expected.keys()
        for uid, tokens in expected.items():
            assert [t.token for t in said[uid]] == [t.token for t in tokens], f"request {uid}"
            assert np.allclose([t.logprob for t in said[uid]], [t.logprob for t in tokens], atol=1e-4)


def test_a_row_of_no_numbers_is_told_apart() -> None:
    decoder = tiny_decoder(qk_norm=False, heads=4, kv_heads=2)
    broken = decoder.embedding.clone()
    broken[7] = torch.nan
    step = DeviceStep(on_gpu(replace(decoder, embedding=broken)), limits_of(ROWS, CHUNK, CONTEXT))
    runner = CudaRunner(step, step.decoder.kv_memory(SLOTS), lambda doing: iter)
    books = Scheduler(
        TokenMemory(SLOTS), Router(WorstCase(), None, ROWS), rows=ROWS, max_positions=CONTEXT,
        prefill_chunk_tokens=CHUNK, most_chunks=9, most_context_tokens=runner.most_context_tokens,
        max_queued_requests=9, max_queued_tokens=99, eos_ids=frozenset(),
    )  # fmt: skip
    for uid, ids in enumerate(([1, 7, 2], [4, 3, 2])):
        books.accept(Submit(uid, np.array(ids, np.int32).tobytes(), 3, Sampling(seed=0, temperature=0.0)))
    planned = books.plan()
    assert planned
    tokens = runner.collect(runner.launch(planned.plan)).tokens.tolist()
    assert tokens[0] == -1
    assert 0 <= tokens[1] < VOCAB
