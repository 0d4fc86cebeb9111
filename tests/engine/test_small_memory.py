"""With the embedded model and hardly any memory everybody gets the tokens of a run with plenty, also where admission is
reckless and pauses have to make up for it.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from tokenllm.checkpoint.description import describe
from tokenllm.engine.runner import CpuRunner
from tokenllm.memory.token_memory import TokenMemory
from tokenllm.messages import Sampling, Submit
from tokenllm.models.decoder import Decoder
from tokenllm.models.weights import Precision, load_decoder, open_weights
from tokenllm.routing.columns import Columns
from tokenllm.routing.learned_pace import LearnedPace
from tokenllm.routing.lengths import Lengths
from tokenllm.routing.router import Router
from tokenllm.routing.tokenllm import TokenLLM
from tokenllm.scheduler.rows import NOBODY
from tokenllm.scheduler.scheduler import Scheduler

ROWS, CONTEXT, CHUNK = 32, 512, 256


class Reckless(TokenLLM):
    """Admits whoever comes."""

    def admits(self, running: Columns, candidates: Columns, room: float) -> int:
        return len(candidates)


@pytest.fixture(scope="module")
def decoder(default_model: Path) -> Decoder:
    description, device = describe(default_model), torch.device("cpu")
    source = open_weights(default_model, description, device, dummy=False, dtype=torch.float32)
    return load_decoder(source, description, Precision(torch.float32), device, CONTEXT)


def submits(count: int, tokens: int) -> list[Submit]:
    """Prompts and answers of about so many tokens; every third samples, every third is penalized."""
    random = np.random.default_rng(count)
    found = []
    for uid in range(count):
        prompt = random.integers(3, 49152, int(random.integers(tokens * 3 // 4, tokens * 5 // 4)), dtype=np.int32)
        rule = Sampling(seed=uid, temperature=0.8 * (uid % 3 == 1), frequency_penalty=0.6 * (uid % 3 == 2))
        most = int(random.integers(tokens * 3 // 4, tokens * 5 // 4))
        found.append(Submit(uid, prompt.tobytes(), most, rule, ignore_eos=True))
    return found


def told(decoder: Decoder, slots: int, work: Sequence[Submit], policy: type[TokenLLM]) -> tuple[list[list[int]], int]:
    """The ids of each, and how often somebody was paused."""
    pace, memory = LearnedPace(CHUNK), TokenMemory(slots)
    runner = CpuRunner(decoder, slots, ROWS, CONTEXT)
    books = Scheduler(
        memory, Router(policy(Lengths(), pace, slots), pace, ROWS), rows=ROWS, max_positions=CONTEXT,
        prefill_chunk_tokens=CHUNK, most_chunks=ROWS, most_context_tokens=1 << 20, max_queued_requests=len(work),
        max_queued_tokens=1 << 20, eos_ids=frozenset(), pace=pace,
    )  # fmt: skip
    said: list[list[int]] = [[] for _ in work]
    for submit in work:
        books.accept(submit)
    while planned := books.plan():
        step = books.settle(planned, runner.collect(runner.launch(planned.plan)))
        books.took(planned, 0.05)
        memory.check(books.rows.held(row) for row in np.flatnonzero(books.rows.uids != NOBODY).tolist())
        for uid, id_ in zip(step.uids, np.frombuffer(step.ids, "<i4").tolist(), strict=True):
            said[uid].append(id_)
    assert memory.active == 0
    return said, books.pauses


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("count", "tokens", "slots"), [(5, 12, 32), pytest.param(32, 200, 512, marks=pytest.mark.slow)]
)
def test_a_small_memory_says_what_a_large_one_says(decoder: Decoder, count: int, tokens: int, slots: int) -> None:
    work = submits(count, tokens)
    expected, pauses = told(decoder, count * 2 * CONTEXT, work, TokenLLM)
    assert pauses == 0 and [len(ids) for ids in expected] == [submit.max_tokens for submit in work]
    assert told(decoder, slots, work, TokenLLM)[0] == expected
    said, pauses = told(decoder, slots, work, Reckless)
    assert pauses and said == expected
