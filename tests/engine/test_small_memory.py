"""With the embedded model and hardly any memory everybody gets the tokens of a run with plenty, also where admission is
reckless and pauses have to make up for it; and nobody starves.

Another batch, or reading again what was decoded before, adds the same products in another order: where two tokens are
as good as equal, or a draw falls on the edge between two, either may be said. Whose ids differ from the run with plenty
is therefore judged token by token, by a plain reading of its own words.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

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
from tokenllm_kernels import attention, philox_uniform, plan_attention

ROWS, CONTEXT, CHUNK = 32, 512, 256
STEP_S = 0.05
NEAR = 1e-4  # between logits, or of a draw in [0, 1) from the edge: what float32 may round away


class Reckless(TokenLLM):
    """Admits whoever comes."""

    def admits(self, running: Columns, candidates: Columns, room: float) -> int:
        return len(candidates)


@pytest.fixture(scope="module")
def decoder(default_model: Path) -> Decoder:
    description, device = describe(default_model), torch.device("cpu")
    source = open_weights(default_model, description, device, dummy=False, dtype=torch.float32)
    return load_decoder(source, description, Precision(torch.float32, half_weights=True), device, CONTEXT)


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


@dataclass
class Run:
    """What was said to each, and at which steps."""

    said: list[list[int]]
    at: list[list[int]]
    pauses: int = 0
    paused: set[int] = field(default_factory=set)

    def longest_gaps(self) -> list[int]:
        """Of each, the steps between two of its tokens."""
        return [max(np.diff(steps), default=0) for steps in self.at]


def run(decoder: Decoder, slots: int, work: Sequence[Submit], policy: type[TokenLLM]) -> Run:
    """All are there at once. The books are checked at every step."""
    pace, memory = LearnedPace(CHUNK), TokenMemory(slots)
    runner = CpuRunner(decoder, slots, ROWS, CONTEXT)
    told, step = Run([[] for _ in work], [[] for _ in work]), 0
    books = Scheduler(
        memory, Router(policy(Lengths(), pace, slots), pace, ROWS), rows=ROWS, max_positions=CONTEXT,
        prefill_chunk_tokens=CHUNK, most_chunks=ROWS, most_context_tokens=1 << 20, max_queued_requests=len(work),
        max_queued_tokens=1 << 20, eos_ids=frozenset(), pace=pace, clock=lambda: STEP_S * step,
    )  # fmt: skip
    for submit in work:
        books.accept(submit)
    while planned := books.plan():
        memory.check(books.rows.held(row) for row in np.flatnonzero(books.rows.uids != NOBODY).tolist())
        sampled = books.settle(planned, runner.collect(runner.launch(planned.plan)))
        books.took(planned, STEP_S)
        memory.check(books.rows.held(row) for row in np.flatnonzero(books.rows.uids != NOBODY).tolist())
        for uid, id_ in zip(sampled.uids, np.frombuffer(sampled.ids, "<i4").tolist(), strict=True):
            told.said[uid].append(id_)
            told.at[uid].append(step)
        told.paused |= {request.uid for request in books.waiting.requests if request.was_paused}
        step += 1
    assert memory.active == 0
    told.pauses = books.pauses
    return told


@torch.inference_mode()
def read(decoder: Decoder, submit: Submit, said: Sequence[int]) -> Tensor:
    """The logits from which a run that does nothing else would have chosen each of these tokens."""
    prompt = np.frombuffer(submit.prompt, "<i4").astype(np.int64)
    ids = torch.from_numpy(np.append(prompt, said[:-1]).astype(np.int64))
    places = torch.arange(len(ids))
    plan = plan_attention(places[None].int(), [0], [0], [len(ids)], len(ids), decoder.dtype)
    x = decoder.hidden(ids, places, places, decoder.kv_memory(len(ids)), partial(attention, plan=plan))
    return decoder.logits(x[len(prompt) - 1 :]).float()


def farthest(decoder: Decoder, submit: Submit, said: Sequence[int]) -> float:
    """How far from being chosen the most doubtful of these tokens is: 0 for what a plain reading would say."""
    rule, first, logits = submit.sampling, len(submit.prompt) // 4, read(decoder, submit, said)
    counts, far = torch.zeros(logits.shape[1]), 0.0
    for place, token in enumerate(said):
        mine = logits[place] - rule.frequency_penalty * counts
        if rule.temperature:
            upto = (mine / rule.temperature).softmax(-1).double().cumsum(-1)
            draw, last = philox_uniform(rule.seed, first + place), float(upto[token])
            begin = float(upto[token - 1]) if token else 0.0
            far = max(far, begin - draw, draw - last)
        else:
            far = max(far, float(mine.max() - mine[token]))
        counts[token] += 1
    return far


def assert_as_good(decoder: Decoder, work: Sequence[Submit], run: Run, plenty: Run) -> None:
    """Nearly everybody has the very same ids; who differs was at an edge, and goes on as a plain reading does."""
    other = [uid for uid, ids in enumerate(run.said) if ids != plenty.said[uid]]
    for uid in other:
        assert len(run.said[uid]) == work[uid].max_tokens
        assert farthest(decoder, work[uid], run.said[uid]) < NEAR
        assert farthest(decoder, work[uid], plenty.said[uid]) < NEAR
    assert len(other) <= len(work) // 4


def assert_nobody_starved(work: Sequence[Submit], run: Run) -> None:
    """Who has begun never stands still for longer than two of the longest answers take, and nobody begins after all the
    others have ended."""
    longest = max(submit.max_tokens for submit in work)
    assert max(run.longest_gaps()) <= 2 * longest
    for uid, steps in enumerate(run.at):
        assert steps[0] <= 1 + max(other[-1] for place, other in enumerate(run.at) if place != uid)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("count", "tokens", "slots"), [(5, 12, 32), pytest.param(32, 200, 512, marks=pytest.mark.slow)]
)
def test_a_small_memory_says_what_a_large_one_says(decoder: Decoder, count: int, tokens: int, slots: int) -> None:
    work = submits(count, tokens)
    plenty = run(decoder, count * 2 * CONTEXT, work, TokenLLM)
    assert not plenty.pauses and [len(ids) for ids in plenty.said] == [submit.max_tokens for submit in work]
    careful, reckless = (run(decoder, slots, work, policy) for policy in (TokenLLM, Reckless))
    assert reckless.pauses and len(reckless.paused) > 1
    for small in (careful, reckless):
        assert_as_good(decoder, work, small, plenty)
        assert_nobody_starved(work, small)


@pytest.mark.parametrize("uid", range(3))
def test_a_wrong_token_is_no_rounding(decoder: Decoder, uid: int) -> None:
    """Greedy, sampled and penalized: what is said after a token was lost is not what a plain reading says."""
    work = submits(5, 12)
    said = run(decoder, 5 * CONTEXT, work[: uid + 1], TokenLLM).said[uid]
    assert farthest(decoder, work[uid], said) < NEAR / 10
    assert farthest(decoder, work[uid], said[:3] + said[4:]) > 10 * NEAR
