"""Laws of the scheduler with a model whose next token is a hash of everything before: whatever is submitted, aborted or
lost in whatever order, every uid ends once, its ids are those of an undisturbed run, and no token slot is wasted.
"""

import zlib
from collections import deque
from collections.abc import Iterable

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tokenllm.engine.batch import Plan, Sampled
from tokenllm.memory.token_slots import TokenSlots
from tokenllm.messages import (
    FINISH_REASONS,
    Abort,
    Begin,
    GatewayLost,
    Refused,
    Sampling,
    Step,
    Submit,
    make_uid,
)
from tokenllm.routing.policy import Conservative
from tokenllm.scheduler.scheduler import Scheduler

EOS, BROKEN, VOCAB = 0, 1, 40  # a hash of BROKEN stands for a NaN
CAPACITY, ROWS = 120, 5


def next_token(ids: Iterable[int]) -> int:
    return zlib.crc32(bytes(ids)) % VOCAB


def undisturbed(submit: Submit) -> tuple[list[int], str]:
    """What a request gives when it is alone in the world."""
    ids, out = list(np.frombuffer(submit.prompt, "<i4")), []
    while len(out) < submit.max_tokens:
        token = next_token(ids + out)
        if token == BROKEN:
            return out, "error"
        out.append(token)
        if token == EOS and not submit.ignore_eos:
            return out, "stop"
    return out, "length"


class FakeRunner:
    """Token slots that hold token ids, read back through an index table as attention would."""

    def __init__(self, ahead: int) -> None:
        self.ahead = ahead
        self._memory = np.full(CAPACITY, -1)
        self._index = np.full((ROWS, CAPACITY), -1)
        self._last = np.full(ROWS, -1)

    def launch(self, plan: Plan) -> list[int]:
        tokens = []
        for piece in plan.pieces:
            ids = self._last[piece.row : piece.row + 1] if piece.ids is None else piece.ids
            self._memory[piece.slots] = ids
            self._index[piece.row, piece.start : piece.end] = piece.slots
            if piece.samples:
                seen = self._memory[self._index[piece.row, : piece.end]]
                tokens.append(next_token(seen.astype(np.uint8)))
                self._last[piece.row] = tokens[-1]
        return tokens

    def collect(self, flight: list[int]) -> tuple[Sampled, ...]:
        return tuple(Sampled(-1 if token == BROKEN else token) for token in flight)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(ahead=st.sampled_from([0, 1]), chunk=st.integers(1, 30))
    def start(self, ahead: int, chunk: int) -> None:
        self.scheduler = Scheduler(
            TokenSlots(CAPACITY),
            Conservative(CAPACITY),
            rows=ROWS,
            prefill_chunk_tokens=chunk,
            max_queued_requests=4,
            max_queued_tokens=200,
            eos_ids=frozenset({EOS}),
        )
        self.runner, self.flights = FakeRunner(ahead), deque()
        self.submits: dict[int, Submit] = {}
        self.ids: dict[int, list[int]] = {}
        self.ends: dict[int, list[str]] = {}
        self.unwanted: set[int] = set()

    @rule(
        prompt=st.lists(st.integers(2, VOCAB - 1), max_size=50),
        max_tokens=st.integers(1, 90),
        gateway=st.integers(0, 2),
        ignore_eos=st.booleans(),
    )
    def submit(self, prompt: list[int], max_tokens: int, gateway: int, ignore_eos: bool) -> None:
        uid = make_uid(gateway, 1, len(self.submits))
        rules = Sampling(seed=0, temperature=0.0)
        submit = Submit(uid, np.array(prompt, "<i4").tobytes(), max_tokens, rules, ignore_eos=ignore_eos)
        self.submits[uid], self.ids[uid], self.ends[uid] = submit, [], []
        self.hear(self.scheduler.accept(submit))

    @rule(choice=st.integers(0, 200))
    def abort(self, choice: int) -> None:
        uid = make_uid(choice % 3, 1, choice % (len(self.submits) + 2))  # sometimes one that never was, or is over
        self.unwanted.add(uid)
        self.hear(self.scheduler.accept(Abort(uid)))

    @rule(gateway=st.integers(0, 2))
    def lose_gateway(self, gateway: int) -> None:
        self.unwanted |= {uid for uid in self.submits if uid >> 56 == gateway}
        self.hear(self.scheduler.accept(GatewayLost(gateway, 1)))
        assert all(self.ends[uid] for uid in self.submits if uid >> 56 == gateway)

    @rule(times=st.integers(1, 12))
    def step(self, times: int) -> None:
        for _ in range(times):
            planned = self.scheduler.plan()
            if planned:
                plan, sampling = planned
                self.flights.append((self.runner.launch(plan), sampling))
            if len(self.flights) > self.runner.ahead or (self.flights and not planned):
                flight, sampling = self.flights.popleft()
                self.hear([self.scheduler.settle(sampling, self.runner.collect(flight))])

    def hear(self, messages: Iterable[Begin | Refused | Step]) -> None:
        for message in messages:
            match message:
                case Refused(uid=uid):
                    self.ends[uid].append("refused")
                case Step():
                    ids = deque(np.frombuffer(message.ids, "<i4").tolist())
                    for uid, count, code in zip(message.uids, message.counts, message.finished, strict=True):
                        assert not self.ends[uid], "a word after the last word"
                        self.ids[uid] += [ids.popleft() for _ in range(count)]
                        self.ends[uid] += [FINISH_REASONS[code - 1]] if code else []
                    assert not ids

    @invariant()
    def no_slot_is_wasted_or_shared(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        slots, running = self.scheduler.slots, self.scheduler.running
        held = np.concatenate([request.held_slots for request in running] or [np.empty(0, np.int32)])
        assert slots.free + len(held) == slots.capacity
        assert len(np.unique(held)) == len(held)
        assert self.scheduler.waiting_tokens == sum(len(request.prompt) for request in self.scheduler.waiting)

    @invariant()
    def what_was_said_is_what_an_undisturbed_run_says(self) -> None:
        for uid, ends in getattr(self, "ends", {}).items():
            ids, reason = undisturbed(self.submits[uid])
            assert len(ends) <= 1
            assert self.ids[uid] == ids[: len(self.ids[uid])]
            if ends in (["stop"], ["length"], ["error"]):
                assert (self.ids[uid], ends[0]) == (ids, reason)
            if ends == ["abort"]:
                assert uid in self.unwanted

    def teardown(self) -> None:
        if hasattr(self, "scheduler"):
            while self.scheduler.waiting or self.scheduler.running or self.flights:
                self.step(1)
            assert all(len(ends) == 1 for ends in self.ends.values()), "a request without a last word"
            assert self.scheduler.slots.held == 0


TestSchedulerLaws = SchedulerMachine.TestCase
TestSchedulerLaws.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def scheduler(**limits: int) -> Scheduler:
    usual = dict(rows=2, prefill_chunk_tokens=16, max_queued_requests=2, max_queued_tokens=30)
    return Scheduler(TokenSlots(100), Conservative(100), **usual | limits, eos_ids=frozenset({EOS}))


def request(uid: int, prompt: int = 10, max_tokens: int = 5) -> Submit:
    return Submit(uid, np.full(prompt, 7, "<i4").tobytes(), max_tokens, Sampling(seed=0))


def test_what_can_never_fit_is_refused_at_once() -> None:
    (answer,) = scheduler().accept(request(1, prompt=60, max_tokens=42))
    assert answer == Refused(
        1, 400, "context_length_exceeded", "prompt and max_tokens need 101 tokens of KV memory, the server has 100"
    )


def test_a_full_queue_refuses_by_requests_and_by_tokens() -> None:
    books = scheduler()  # two rows, a queue of two
    assert [type(books.accept(request(uid, prompt=10))[0]) for uid in range(5)] == [Begin] * 4 + [Refused]
    books = scheduler(max_queued_requests=9)  # 30 tokens may wait
    assert [type(books.accept(request(uid, prompt=20))[0]) for uid in range(4)] == [Begin] * 3 + [Refused]


def test_without_a_queue_what_can_start_is_taken() -> None:
    books = scheduler(max_queued_requests=0)
    assert [type(books.accept(request(uid))[0]) for uid in range(3)] == [Begin, Begin, Refused]


def test_an_empty_prompt_is_refused() -> None:
    (answer,) = scheduler().accept(request(1, prompt=0))
    assert answer == Refused(1, 400, "invalid_value", "the prompt is empty")


def test_a_long_prompt_does_not_hold_up_running_streams() -> None:
    """Chunked prefill: who is decoding gets a token at every step while another's prompt is read."""
    books, runner = scheduler(rows=2), FakeRunner(0)
    books.accept(request(1, prompt=3, max_tokens=30))
    plan, sampling = books.plan()
    books.settle(sampling, runner.collect(runner.launch(plan)))
    books.accept(request(2, prompt=50, max_tokens=2))
    for chunk in (16, 16, 16, 2):
        plan, sampling = books.plan()
        assert [piece.tokens for piece in plan.pieces] == [1, chunk]
        books.settle(sampling, runner.collect(runner.launch(plan)))
