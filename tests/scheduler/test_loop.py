"""The loop never sleeps while there is something to do, however far steps run ahead."""

from typing import Any

import numpy as np
import pytest

from tokenllm.counters import Page, create_page
from tokenllm.engine.batch import Plan, Sampled
from tokenllm.memory.token_memory import TokenMemory
from tokenllm.messages import FINISH_REASONS, Begin, Message, Sampling, Step, Submit, Vector
from tokenllm.routing.conservative import WorstCase
from tokenllm.routing.router import Router
from tokenllm.scheduler.loop import Loop
from tokenllm.scheduler.scheduler import Scheduler

VECTOR = np.arange(9000, dtype=np.float32)


class FakeRunner:
    most_chunks = 8
    most_context_tokens = 999
    compilations = 0

    def __init__(self, ahead: int) -> None:
        self.ahead = ahead

    def launch(self, plan: Plan) -> Plan:
        return plan

    def collect(self, flight: Plan) -> Sampled:
        vectors = {pooled.uid: VECTOR for _, _, pooled in flight.pooled() if pooled.ends}
        return Sampled(np.full(len(flight.sampling_rows), 5, np.int32), vectors=vectors)


class FakeRing:
    """Gives its messages at once, keeps what it is sent."""

    def __init__(self, messages: list[Message]) -> None:
        self.messages, self.sent = messages, []

    def receive(self) -> list[Message]:
        messages, self.messages = self.messages, []
        return messages

    def send(self, message: Message) -> None:
        self.sent.append(message)


class FakePage:
    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("capacity", [6, 12, 100])
def test_nobody_waits_when_it_sleeps(ahead: int, capacity: int) -> None:
    prompt = np.arange(4, dtype="<i4").tobytes()
    ring = FakeRing([Submit(uid, prompt, 3, Sampling(seed=0), ignore_eos=True) for uid in range(5)])
    books = Scheduler(
        TokenMemory(capacity), Router(WorstCase(), None, 4), rows=4, max_positions=6, prefill_chunk_tokens=8,
        most_chunks=8, most_context_tokens=999, max_queued_requests=9, max_queued_tokens=99, eos_ids=frozenset(),
    )  # fmt: skip
    loop = Loop(books, FakeRunner(ahead), [ring], ring, FakePage(), None)  # type: ignore[arg-type]
    turns = 0
    while loop.turn():
        turns += 1
        assert turns < 99
    assert not books.waiting
    assert not books.rows.running
    told = [token for message in ring.sent if isinstance(message, Step) for token in message.counts]
    assert sum(told) == 15


def test_when_to_come_back_is_published_while_somebody_waits_and_all_is_told_at_rest() -> None:
    prompt = np.arange(4, dtype="<i4").tobytes()
    ring = FakeRing([Submit(uid, prompt, 3, Sampling(seed=0), ignore_eos=True) for uid in range(5)])
    books = Scheduler(
        TokenMemory(6), Router(WorstCase(), None, 4), rows=4, max_positions=6, prefill_chunk_tokens=8, most_chunks=8,
        most_context_tokens=999, max_queued_requests=9, max_queued_tokens=99, eos_ids=frozenset(),
    )  # fmt: skip
    page = Page(create_page())
    runner = FakeRunner(0)
    runner.compilations, books.pauses = 2, 3
    loop = Loop(books, runner, [ring], ring, page, None)  # type: ignore[arg-type]
    loop.turn()
    assert books.waiting and page.get("tokenllm_retry_after_seconds") == 1
    while loop.turn():
        pass
    assert page.get("tokenllm_retry_after_seconds") == 0
    gauges = {name: page.get(f"tokenllm_kv_tokens_{name}") for name in ("active", "free", "cached")}
    assert gauges == {"active": 0, "free": books.memory.free, "cached": books.memory.cached}
    assert page.get("tokenllm_kernel_compilations_total") == 2 and page.get("tokenllm_preemptions_total") == 3
    assert page.get("tokenllm_kv_tokens_capacity") == 6 and page.get("tokenllm_requests_running") == 0


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_vector_comes_in_parts_that_fit_any_ring_and_before_the_last_word(ahead: int) -> None:
    prompt = np.arange(4, dtype="<i4").tobytes()
    ring = FakeRing([Submit(7, prompt, 99, Sampling(seed=0), pooling="mean")])
    books = Scheduler(
        TokenMemory(8), Router(WorstCase(), None, 4), rows=4, max_positions=6, prefill_chunk_tokens=3,
        most_chunks=8, most_context_tokens=999, max_queued_requests=9, max_queued_tokens=99, eos_ids=frozenset(),
    )  # fmt: skip
    loop = Loop(books, FakeRunner(ahead), [ring], ring, FakePage(), None)  # type: ignore[arg-type]
    while loop.turn():
        pass
    begin, *parts, last_word = ring.sent
    assert isinstance(begin, Begin) and isinstance(last_word, Step)
    assert last_word == Step((7,), (0,), b"", (1 + FINISH_REASONS.index("stop"),), (0,))
    values = [part.values for part in parts if isinstance(part, Vector) and part.uid == 7]
    assert len(values) == len(parts) == 3 and all(len(value) <= 1 << 14 for value in values)
    assert np.array_equal(np.frombuffer(b"".join(values), "<f4"), VECTOR)
    assert not books.memory.active and not books.rows.running
