"""Laws of the scheduler with a model whose next token is a hash of everything before: whatever is submitted, paused,
aborted or lost in whatever order, every uid ends once, its ids are those of an undisturbed run, and no token slot is
wasted.
"""

import zlib
from collections import deque
from collections.abc import Iterable
from itertools import count

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from msgspec.structs import replace

from tokenllm.engine.batch import Chunk, Logprob, Plan, Sampled, SharedPrefix
from tokenllm.memory.token_memory import TokenMemory
from tokenllm.messages import (
    FINISH_REASONS,
    STILL_RUNNING,
    Abort,
    Begin,
    GatewayLost,
    Pooling,
    Refused,
    Sampling,
    Step,
    Submit,
    TokenLogprob,
    make_uid,
)
from tokenllm.routing.columns import Columns
from tokenllm.routing.conservative import WorstCase
from tokenllm.routing.first_come import FirstCome
from tokenllm.routing.learned_pace import LearnedPace
from tokenllm.routing.lengths import Lengths
from tokenllm.routing.policy import make_policy
from tokenllm.routing.router import Router
from tokenllm.routing.tokenllm import TokenLLM
from tokenllm.scheduler import prefixes, rows
from tokenllm.scheduler.backlog import Backlog
from tokenllm.scheduler.queue import Queue
from tokenllm.scheduler.request import Request
from tokenllm.scheduler.rows import NOBODY
from tokenllm.scheduler.scheduler import FINISHED, Planned, Scheduler

EOS, BROKEN, VOCAB = 0, 1, 40  # a hash of BROKEN stands for a NaN
CAPACITY, ROWS = 120, 5
ALIKE = st.integers(0, 50).map(lambda length: [5 + i % 7 for i in range(length)])  # each begins all longer ones


def next_token(ids: Iterable[int], generated: Iterable[int]) -> int:
    """What was generated counts twice, as penalties have it."""
    return zlib.crc32(bytes(ids) + b"|" + bytes(generated)) % VOCAB


def vector_of(submit: Submit) -> list[float]:
    """How many tokens were pooled, and what their ids add up to, or that it is no number."""
    ids = np.frombuffer(submit.prompt, "<i4")[0 if submit.pooling == "mean" else -1 :]
    return [len(ids), float(ids.sum()) if ids.sum() % 5 else np.nan]


def undisturbed(submit: Submit) -> tuple[list[int], str]:
    """What a request gives when it is alone in the world."""
    ids, out = list(np.frombuffer(submit.prompt, "<i4")), []
    if submit.pooling:
        return [], "stop" if np.isfinite(vector_of(submit)).all() else "error"
    while len(out) < submit.max_tokens:
        token = next_token(ids + out, out)
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
        self.index = np.full((ROWS, CAPACITY), -1)
        self._memory = np.full(CAPACITY, -1)
        self._last = np.full(ROWS, -1)
        self._generated: dict[int, list[int]] = {}  # by row
        self._pooled: dict[int, list[int]] = {}  # by row

    def launch(self, plan: Plan) -> Sampled:
        one_by_one = zip(plan.decodes.rows, plan.decodes.positions, plan.decodes.slots, strict=True)
        tokens = [self._decode(*one) for one in one_by_one]
        tokens += [token for chunk in plan.chunks if (token := self._read(chunk)) is not None]
        self._last[plan.sampling_rows] = tokens
        asked = {place: logprob_of(token) for place, token in enumerate(tokens) if token % 3 == 0}
        tokens = np.array([-1 if token == BROKEN else token for token in tokens], np.int32)
        return Sampled(tokens, asked, vectors=dict(self._pool(plan)))

    def _pool(self, plan: Plan) -> Iterable[tuple[int, np.ndarray]]:
        ids = np.concatenate([np.zeros(len(plan.decodes.rows), int), *(chunk.ids for chunk in plan.chunks)])
        for places, row, pooled in plan.pooled():
            before = [] if pooled.begins else self._pooled.pop(row)
            self._pooled[row] = [*before, *ids[places].tolist()]
            if pooled.ends:
                whole = self._pooled.pop(row)
                yield pooled.uid, np.array([len(whole), sum(whole) if sum(whole) % 5 else np.nan], np.float32)

    def collect(self, flight: Sampled) -> Sampled:
        return flight

    def _decode(self, row: int, position: int, slot: int) -> int:
        self._memory[slot], self.index[row, position] = self._last[row], slot
        return self._following(row, position + 1)

    def _read(self, chunk: Chunk) -> int | None:
        self.index[chunk.row, : len(chunk.prefix)] = chunk.prefix
        self._memory[chunk.slots], self.index[chunk.row, chunk.start : chunk.end] = chunk.ids, chunk.slots
        if chunk.samples:
            self._generated[chunk.row] = chunk.generated.tolist()
        return self._following(chunk.row, chunk.end) if chunk.samples else None

    def _following(self, row: int, end: int) -> int:
        generated = self._generated[row]
        generated.append(next_token(self._memory[self.index[row, :end]].astype(np.uint8), generated))
        return generated[-1]


def logprob_of(token: int) -> Logprob:
    return Logprob(-float(token), ((token, -float(token)),))


class Reckless(FirstCome):
    """Admits whoever comes: pauses have to make up for it."""

    def admits(self, running: Columns, candidates: Columns, room: float) -> int:
        return len(candidates)


class RecklessShortest(TokenLLM):
    """The same, in the order of the default."""

    def admits(self, running: Columns, candidates: Columns, room: float) -> int:
        return len(candidates)


def router_of(name: str, rows: int, chunk: int) -> tuple[Router, LearnedPace | None]:
    pace = LearnedPace(chunk)
    match name:
        case "careful":
            return Router(WorstCase(), None, rows), None
        case "reckless":
            return Router(Reckless(), None, rows), None
        case "reckless shortest":
            return Router(RecklessShortest(Lengths(), pace, CAPACITY), pace, rows), pace
    return Router(make_policy(name, pace, CAPACITY, Lengths()), pace, rows), pace  # type: ignore[arg-type]


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        ahead=st.sampled_from([0, 1]),
        chunk=st.integers(1, 30),
        rows=st.sampled_from([1, 2, ROWS]),
        policy=st.sampled_from(["careful", "reckless", "reckless shortest", "tokenllm", "lightllm", "past-future"]),
        most_chunks=st.sampled_from([1, 2, 99]),
        most_context=st.sampled_from([CAPACITY, 1 << 20]),
    )
    def start(self, ahead: int, chunk: int, rows: int, policy: str, most_chunks: int, most_context: int) -> None:
        self.policy, ticks = policy, count()
        router, pace = router_of(policy, rows, chunk)
        self.scheduler = Scheduler(
            TokenMemory(CAPACITY),
            router,
            rows=rows,
            max_positions=CAPACITY,
            prefill_chunk_tokens=chunk,
            most_chunks=most_chunks,
            most_context_tokens=most_context,
            max_queued_requests=4,
            max_queued_tokens=200,
            eos_ids=frozenset({EOS}),
            pace=pace,
            clock=lambda: next(ticks) / 10,
        )
        self.most_chunks, self.most_context = most_chunks, most_context
        self.runner, self.flights = FakeRunner(ahead), deque[tuple[Sampled, Planned]]()
        self.chunk = chunk
        self.submits: dict[int, Submit] = {}
        self.ids: dict[int, list[int]] = {}
        self.ends: dict[int, list[str]] = {}
        self.vectors: set[int] = set()  # whose were told
        self.unwanted: set[int] = set()

    @rule(
        prompt=st.lists(st.integers(2, VOCAB - 1), max_size=50) | st.lists(st.integers(2, 3), max_size=50) | ALIKE,
        max_tokens=st.integers(1, 90),
        gateway=st.integers(0, 2),
        ignore_eos=st.booleans(),
        tenant=st.sampled_from(["", "", "another"]),
        priority=st.sampled_from([0, 0, -5, 1 << 40]),
        pooling=st.sampled_from([None, None, "mean", "last"]),
    )
    def submit(
        self,
        prompt: list[int],
        max_tokens: int,
        gateway: int,
        ignore_eos: bool,
        tenant: str,
        priority: int,
        pooling: Pooling | None,
    ) -> None:
        uid = make_uid(gateway, 1, len(self.submits))
        rules = Sampling(seed=0, temperature=0.0)
        ids = np.array(prompt, "<i4").tobytes()
        submit = Submit(
            uid, ids, max_tokens, rules, ignore_eos=ignore_eos, tenant=tenant, priority=priority, pooling=pooling
        )
        self.submits[uid], self.ids[uid], self.ends[uid] = submit, [], []
        self.hear(self.scheduler.accept(submit))

    @rule(choice=st.integers(0, 200))
    def abort(self, choice: int) -> None:
        uid = make_uid(choice % 3, 1, choice % (len(self.submits) + 2))  # sometimes one that never was, or is over
        self.unwanted.add(uid)
        self.hear(self.scheduler.accept(Abort(uid)))

    @precondition(lambda self: any(request.was_paused for request in self.scheduler.waiting.requests))
    @rule()
    def abort_one_that_is_paused(self) -> None:
        request = next(request for request in self.scheduler.waiting.requests if request.was_paused)
        self.unwanted.add(request.uid)
        self.hear(self.scheduler.accept(Abort(request.uid)))
        assert self.ends[request.uid] == ["abort"]

    @rule(gateway=st.integers(0, 2))
    def lose_gateway(self, gateway: int) -> None:
        self.unwanted |= {uid for uid in self.submits if uid >> 56 == gateway}
        self.hear(self.scheduler.accept(GatewayLost(gateway, 1)))
        assert all(self.ends[uid] for uid in self.submits if uid >> 56 == gateway)

    @rule(times=st.integers(1, 12))
    def step(self, times: int) -> None:
        for _ in range(times):
            planned = self.scheduler.plan()
            self.check_books()
            if planned:
                self.check_plan(planned)
                self.flights.append((self.runner.launch(planned.plan), planned))
            if len(self.flights) > self.runner.ahead or (self.flights and not planned):
                flight, settled = self.flights.popleft()
                self.hear([self.scheduler.settle(settled, self.runner.collect(flight))])
                self.hear_vectors(flight)
                self.scheduler.took(settled, 0.01)

    def hear_vectors(self, flight: Sampled) -> None:
        """Who is told a vector ends with the same step, if it has not been aborted."""
        for uid, vector in flight.vectors.items():
            assert uid not in self.vectors and self.ends[uid]
            self.vectors.add(uid)
            assert np.array_equal(vector, vector_of(self.submits[uid]), equal_nan=True)

    def check_plan(self, planned: Planned) -> None:
        """Rows decode in their own order, who samples is somebody, prompts keep to the budget, all to their slots."""
        plan = planned.plan
        assert plan.tokens and len(planned.uids) == len(plan.sampling_rows) == len(set(plan.sampling_rows.tolist()))
        assert (np.diff(plan.decodes.rows) > 0).all() and set(planned.uids.tolist()) <= set(self.submits)
        assert sum(chunk.tokens for chunk in plan.chunks) <= self.chunk
        assert sum(chunk.end for chunk in plan.chunks) <= self.most_context and len(plan.chunks) <= self.most_chunks
        for row in self.taken_rows():
            submit = self.submits[int(self.scheduler.rows.uids[row])]
            assert len(self.scheduler.rows.held(row)) < len(submit.prompt) // 4 + submit.max_tokens

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
                        given = self.ids[uid][-count:] if count else []
                        wanted = [
                            TokenLogprob(id_, -float(id_), ((id_, -float(id_)),)) for id_ in given if id_ % 3 == 0
                        ]
                        assert list(message.logprobs.get(uid, ())) == wanted
                    assert not ids
                    assert message.logprobs.keys() <= set(message.uids)

    @invariant()
    def no_slot_is_wasted_or_shared(self) -> None:
        if hasattr(self, "scheduler"):
            self.check_books()

    def check_books(self) -> None:
        memory, rows = self.scheduler.memory, [self.scheduler.rows.held(row) for row in self.taken_rows()]
        assert all(len(np.unique(row)) == len(row) for row in rows)
        memory.check(rows)
        waiting = self.scheduler.waiting
        assert waiting.prompt_tokens == sum(len(request.prompt) for request in waiting.requests)
        assert waiting.columns().uid.tolist() == [request.uid for request in waiting.requests]

    @invariant()
    def the_books_agree_with_what_plans_said(self) -> None:
        for row in self.taken_rows() if hasattr(self, "scheduler") else ():
            held, uid = self.scheduler.rows.held(row), int(self.scheduler.rows.uids[row])
            adopted = self.scheduler._requests[uid].adopted  # what its next chunk will tell
            assert adopted or (self.runner.index[row, : len(held)] == held).all()

    @invariant()
    def what_rows_share_is_known_as_soon_as_anybody_asks(self) -> None:
        for row in self.taken_rows() if hasattr(self, "scheduler") else ():
            self.scheduler._see_who_shares()
            request = self.scheduler._requests[int(self.scheduler.rows.uids[row])]
            sole = self.scheduler.memory.prefixes.sole(request.node)
            assert self.scheduler.rows.shared[row] == request.shared_tokens - sole

    @invariant()
    def rows_go_to_those_who_live_and_the_first_come_first(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        living = [uid for uid, ends in self.ends.items() if not ends]
        running = self.scheduler.rows.uids[self.taken_rows()].tolist()
        assert len(running) == self.scheduler.rows.running
        waiting = [request.uid for request in self.scheduler.waiting.requests]
        assert sorted(running + waiting) == sorted(living)
        if self.policy == "careful":
            assert living[len(living) - len(waiting) :] == waiting and not self.scheduler.pauses

    def taken_rows(self) -> list[int]:
        return np.flatnonzero(self.scheduler.rows.uids != NOBODY).tolist()

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
            elif ends != ["refused"] and self.submits[uid].pooling:
                assert bool(ends) == (uid in self.vectors)

    def teardown(self) -> None:
        if hasattr(self, "scheduler"):
            patience = sum(CAPACITY + submit.max_tokens for submit in self.submits.values())
            while self.scheduler.waiting or self.scheduler.rows.running or self.flights:
                self.step(1)
                patience -= 1
                assert patience >= 0, "steps without end"
            assert all(len(ends) == 1 for ends in self.ends.values()), "a request without a last word"
            assert self.scheduler.memory.active == 0


TestSchedulerLaws = SchedulerMachine.TestCase
TestSchedulerLaws.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


class SharingMachine(SchedulerMachine):
    """What a device was told of shared prefixes, which it is only told again when the plan names others."""

    told: tuple[SharedPrefix, ...] = ()

    @rule(length=st.integers(3, 20), max_tokens=st.integers(5, 30), steps=st.integers(0, 3))
    def submit_alike(self, length: int, max_tokens: int, steps: int) -> None:
        self.submit([2 + i % 7 for i in range(length)], max_tokens, 0, True, "", 0, None)
        self.step(steps)

    def check_plan(self, planned: Planned) -> None:
        super().check_plan(planned)
        decodes = planned.plan.decodes
        if decodes.prefixes is not self.told:
            self.told = decodes.prefixes
        members = [place for group in self.told for place in group.members.tolist()]
        assert len(set(members)) == len(members)
        for group in self.told:
            theirs = decodes.rows[group.members]
            held = [self.scheduler.rows.held(row)[: group.tokens].tolist() for row in (group.row, *theirs)]
            assert len(theirs) > 1 and group.row in theirs and all(slots == held[0] for slots in held)
            assert (decodes.positions[group.members] >= group.tokens).all()


def test_what_is_shared_is_true_of_the_rows_of_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here prefixes are short: any that two decodes share counts."""
    monkeypatch.setattr(prefixes, "LEAST_SAVED", 1)
    for module in (prefixes, rows):
        monkeypatch.setattr(module, "PROBES", [1, 2, 4, 8, 16, 32])
    run_state_machine_as_test(SharingMachine, settings=settings(max_examples=40, stateful_step_count=40, deadline=None))


def scheduler(eos_ids: frozenset[int] = frozenset({EOS}), **limits: int) -> Scheduler:
    usual = dict(
        rows=2,
        max_positions=100,
        prefill_chunk_tokens=16,
        most_chunks=99,
        most_context_tokens=9999,
        max_queued_requests=2,
        max_queued_tokens=30,
    )
    limits = usual | limits
    return Scheduler(TokenMemory(100), Router(WorstCase(), None, limits["rows"]), **limits, eos_ids=eos_ids)


def request(uid: int, prompt: int = 10, max_tokens: int = 5) -> Submit:
    return Submit(uid, np.full(prompt, 7 + uid, "<i4").tobytes(), max_tokens, Sampling(seed=0))


def test_what_can_never_fit_is_refused_at_once() -> None:
    (answer,) = scheduler().accept(request(1, prompt=60, max_tokens=42))
    assert answer == Refused(
        1, 400, "context_length_exceeded", "prompt and max_tokens need 101 tokens of KV memory, a request may have 100"
    )


def test_a_full_queue_refuses_by_requests_and_by_tokens() -> None:
    books = scheduler()  # two rows, a queue of two
    assert [type(books.accept(request(uid, prompt=10))[0]) for uid in range(5)] == [Begin] * 4 + [Refused]
    books = scheduler(max_queued_requests=9)  # 30 tokens may wait
    assert [answer_after_a_plan(books, request(uid, prompt=20)) for uid in range(4)] == [Begin] * 3 + [Refused]


def answer_after_a_plan(books: Scheduler, submit: Submit) -> type:
    (answer,) = books.accept(submit)
    books.plan()
    return type(answer)


def test_without_a_queue_what_can_start_is_taken() -> None:
    books = scheduler(max_queued_requests=0)
    assert [type(books.accept(request(uid))[0]) for uid in range(3)] == [Begin, Begin, Refused]
    books.plan()
    assert isinstance(books.accept(request(4))[0], Refused)


def test_an_empty_prompt_is_refused() -> None:
    (answer,) = scheduler().accept(request(1, prompt=0))
    assert answer == Refused(1, 400, "invalid_value", "the prompt is empty")


def test_a_long_prompt_does_not_hold_up_running_streams() -> None:
    """Chunked prefill: who is decoding gets a token at every step while another's prompt is read."""
    books, runner = scheduler(rows=2), FakeRunner(0)
    books.accept(request(1, prompt=4, max_tokens=30))
    step_of(books, runner)
    books.accept(request(2, prompt=50, max_tokens=2))
    for chunk in (15, 15, 15, 5):
        planned = books.plan()
        assert len(planned.plan.decodes.rows) == 1 and [one.tokens for one in planned.plan.chunks] == [chunk]
        books.settle(planned, runner.collect(runner.launch(planned.plan)))


def step_of(books: Scheduler, runner: FakeRunner) -> Step:
    planned = books.plan()
    return books.settle(planned, runner.collect(runner.launch(planned.plan)))


def sampled(*tokens: int) -> Sampled:
    return Sampled(np.array(tokens, np.int32))


def test_who_would_not_fit_into_a_row_is_refused() -> None:
    (answer,) = scheduler(max_positions=50).accept(request(1, prompt=50, max_tokens=2))
    assert answer.code == "context_length_exceeded"


def test_a_row_that_changes_hands_in_flight_keeps_the_old_tokens_from_the_new_tenant() -> None:
    """One step ahead: what was launched for the first tenant arrives when the second one already computes."""
    books = scheduler(rows=1)
    books.accept(request(1, max_tokens=9))
    books.accept(request(2, max_tokens=2))
    first, ahead = books.plan(), books.plan()
    assert books.settle(first, sampled(EOS)).finished == (FINISHED["stop"],)
    second = books.plan()
    assert second.plan.sampling_rows.tolist() == ahead.plan.sampling_rows.tolist() == [0]
    assert books.settle(ahead, sampled(7)).uids == ()
    assert books.settle(second, sampled(8)) == Step((2,), (1,), np.array([8], "<i4").tobytes(), (0,), (0,))
    assert books.settle(books.plan(), sampled(9)).finished == (FINISHED["length"],)
    assert books.memory.active == 0 and books.plan() is None


def test_who_is_aborted_in_flight_is_told_nothing_more_while_others_are() -> None:
    books = scheduler(rows=2)
    books.accept(request(1)), books.accept(request(2))
    books.plan()  # 16 tokens: the first prompt, and part of the second
    planned = books.plan()
    assert [one.row for one in planned.plan.chunks] == [1] and planned.uids.tolist() == [1, 2]
    (last_word,) = books.accept(Abort(1))
    assert last_word.finished == (FINISHED["abort"],)
    step = books.settle(planned, Sampled(np.array([5, -1], np.int32), {0: logprob_of(5), 1: logprob_of(0)}))
    assert step == Step((2,), (0,), b"", (FINISHED["error"],), (0,))
    assert books.memory.active == 0


def test_a_full_queue_stays_full_for_those_who_would_fit_beside_its_head() -> None:
    books = scheduler(max_queued_requests=1)
    assert answer_after_a_plan(books, request(1, prompt=40, max_tokens=20)) is Begin
    assert answer_after_a_plan(books, request(2, prompt=40, max_tokens=20)) is Begin  # waits for memory
    assert answer_after_a_plan(books, request(3, prompt=1, max_tokens=1)) is Refused


@pytest.mark.parametrize("eos_ids", [frozenset(), frozenset({2}), frozenset({0, 5, 39})])
def test_every_eos_id_ends_and_no_other(eos_ids: frozenset[int]) -> None:
    for token in (-1, 0, 1, 2, 3, 5, 38, 39, 40, 2**31 - 1):
        books = scheduler(eos_ids=eos_ids)
        books.accept(request(1))
        expected = FINISHED["error"] if token < 0 else FINISHED["stop"] if token in eos_ids else STILL_RUNNING
        assert books.settle(books.plan(), sampled(token)).finished == (expected,)


def test_the_predicted_peak_is_the_policys() -> None:
    books = scheduler(rows=3)
    for uid, (prompt, most) in enumerate([(10, 5), (20, 7), (7, 3)]):
        books.accept(request(uid, prompt, most))
    books.plan()
    assert books.predicted_peak == 10 + 4 + 20 + 6 + 7 + 2
    books.accept(Abort(1))
    books.plan()
    assert books.predicted_peak == 10 + 4 + 7 + 2
    for uid in (0, 2):
        books.accept(Abort(uid))
    assert books.plan() is None and books.predicted_peak == 0


def read(books: Scheduler, runner: FakeRunner) -> tuple[int, dict[int, int]]:
    """Run all that was submitted to its end: prompt tokens computed, and what each was told was cached."""
    computed, cached = 0, {}
    while planned := books.plan():
        computed += sum(chunk.tokens for chunk in planned.plan.chunks)
        step = books.settle(planned, runner.collect(runner.launch(planned.plan)))
        cached |= dict(zip(step.uids, step.cached_tokens, strict=True))
    return computed, cached


def twins(count: int, prompt: int, **realm: str) -> list[Submit]:
    ids = np.arange(2, 2 + prompt, dtype="<i4") % VOCAB
    return [Submit(uid, ids.tobytes(), 2, Sampling(seed=0), ignore_eos=True, **realm) for uid in range(count)]


def test_prompts_that_arrive_together_are_computed_once() -> None:
    """P tokens for the first, and for each twin the last one alone, whose successor is asked for."""
    books = scheduler(rows=5, prefill_chunk_tokens=7, max_queued_requests=9, max_queued_tokens=999)
    for submit in twins(5, prompt=18):
        books.accept(submit)
    computed, cached = read(books, FakeRunner(0))
    assert computed == 18 + 4
    assert cached == {0: 0} | dict.fromkeys(range(1, 5), 17)
    books.accept(twins(1, prompt=18)[0])
    assert read(books, FakeRunner(0)) == (1, {0: 17})


@pytest.mark.parametrize("realm", [{"tenant": "another"}, {"cache_salt": "another"}])
def test_nobody_sees_what_another_tenant_had_computed(realm: dict[str, str]) -> None:
    books, runner = scheduler(), FakeRunner(0)
    books.accept(twins(1, prompt=18)[0])
    read(books, runner)
    books.accept(twins(1, prompt=18, **realm)[0])
    assert read(books, runner) == (18, {0: 0})


def test_what_is_cached_gives_way() -> None:
    """Memory that the tree alone holds is as good as free, and forgotten oldest first."""
    books, runner = scheduler(), FakeRunner(0)
    for uid in range(12):
        books.accept(request(uid, prompt=30))
        read(books, runner)
    assert books.memory.active == 0
    assert books.memory.free + books.memory.cached == books.memory.capacity
    books.accept(request(11, prompt=30))
    assert read(books, runner)[0] == 1
    books.accept(request(0, prompt=30))
    assert read(books, runner)[0] == 30


def test_what_is_not_a_number_is_not_kept_for_others() -> None:
    books = scheduler()
    books.accept(request(1, prompt=10, max_tokens=9))
    books.settle(books.plan(), sampled(8))
    books.settle(books.plan(), sampled(9))
    assert books.settle(books.plan(), sampled(-1)).finished == (FINISHED["error"],)
    assert (books.memory.active, books.memory.cached) == (0, 10)


def test_sixty_four_twins_cost_one_prompt_and_a_token_each() -> None:
    """However many are admitted in one decision, and in however many steps their prompt is read."""
    for chunk, policy in ((16, "careful"), (512, "careful"), (100, "tokenllm"), (4096, "tokenllm")):
        router, pace = router_of(policy, 64, chunk)
        books = Scheduler(
            TokenMemory(9999), router, rows=64, max_positions=999, prefill_chunk_tokens=chunk, most_chunks=64,
            most_context_tokens=1 << 20, max_queued_requests=99, max_queued_tokens=99_999, eos_ids=frozenset(),
            pace=pace,
        )  # fmt: skip
        for submit in twins(64, prompt=400):
            books.accept(submit)
        computed, cached = read(books, EchoRunner())
        assert computed == 400 + 63
        assert sorted(cached.values()) == [0] + [399] * 63


class EchoRunner:
    """Says 7, whatever it reads."""

    def launch(self, plan: Plan) -> Sampled:
        return Sampled(np.full(len(plan.sampling_rows), 7, np.int32))

    def collect(self, flight: Sampled) -> Sampled:
        return flight


def test_who_began_before_it_could_adopts_what_another_has_read_since() -> None:
    """The second's rest is shorter than the first's, so it reads first; what they share is still computed once."""
    router, pace = router_of("tokenllm", 4, 16)
    books = Scheduler(
        TokenMemory(999), router, rows=4, max_positions=999, prefill_chunk_tokens=16, most_chunks=9,
        most_context_tokens=9999, max_queued_requests=9, max_queued_tokens=9999, eos_ids=frozenset(), pace=pace,
    )  # fmt: skip
    ids = np.arange(2, 92, dtype="<i4")
    books.accept(Submit(1, ids.tobytes(), 2, Sampling(seed=0)))
    first = books.plan()
    assert first and first.plan.tokens == 16
    books.accept(Submit(2, np.append(ids[:70], 99).astype("<i4").tobytes(), 2, Sampling(seed=0)))
    assert 16 + read(books, EchoRunner())[0] == 90 + 1


def paused_books(**limits: int) -> tuple[Scheduler, FakeRunner]:
    """A memory of 40 tokens, into which three of 10 + 20 tokens are let at once."""
    usual = dict(rows=3, max_positions=40, prefill_chunk_tokens=99, most_chunks=9, most_context_tokens=999)
    usual |= dict(max_queued_requests=9, max_queued_tokens=999)
    books = Scheduler(TokenMemory(40), Router(Reckless(), None, 3), **usual | limits, eos_ids=frozenset())
    return books, FakeRunner(0)


def submit_of(uid: int, prompt: int = 10, max_tokens: int = 20) -> Submit:
    """One that gets all its tokens."""
    random = np.random.default_rng(uid)
    while True:
        ids = random.integers(2, VOCAB, prompt, dtype=np.int32)
        submit = Submit(uid, ids.tobytes(), max_tokens, Sampling(seed=0, temperature=0.0), ignore_eos=True)
        if undisturbed(submit)[1] == "length":
            return submit


def test_who_is_paused_goes_on_as_if_nothing_had_been() -> None:
    books, runner = paused_books()
    submits = {uid: submit_of(uid) for uid in range(1, 4)}
    said: dict[int, list[int]] = {uid: [] for uid in submits}
    for submit in submits.values():
        books.accept(submit)
    while planned := books.plan():
        step = books.settle(planned, runner.collect(runner.launch(planned.plan)))
        for uid, id_ in zip(step.uids, np.frombuffer(step.ids, "<i4").tolist(), strict=True):
            said[uid].append(id_)
        assert set(step.cached_tokens) == {0}, "what it had computed itself is no hit"
    assert books.pauses
    assert said == {uid: undisturbed(submit)[0] for uid, submit in submits.items()}


def test_a_token_in_flight_of_one_that_is_paused_and_comes_back_is_told_once() -> None:
    """It comes back to the same row while a step that was launched before its pause is still to be settled."""
    books, runner = paused_books(rows=1)
    submit = submit_of(1)
    books.accept(submit)
    books.settle(first := books.plan(), runner.launch(first.plan))
    ahead = books.plan()
    sampled_before = runner.launch(ahead.plan)
    request = books._requests[1]
    books._pause(request, 0)
    again = books.plan()
    assert [(one.row, one.start, one.ids.tolist()) for one in again.plan.chunks] == [
        (0, 10, [undisturbed(submit)[0][0]])
    ]
    assert books.settle(ahead, sampled_before).uids == ()
    step = books.settle(again, runner.launch(again.plan))
    assert np.frombuffer(step.ids, "<i4").tolist() == undisturbed(submit)[0][1:2]


def test_a_resumed_text_longer_than_a_step_may_read_is_read_in_parts() -> None:
    books, runner = paused_books(prefill_chunk_tokens=5)
    submits = [submit_of(1, prompt=5, max_tokens=30), submit_of(2, prompt=5, max_tokens=30)]
    for submit in submits:
        books.accept(submit)
    said: dict[int, list[int]] = {1: [], 2: []}
    while planned := books.plan():
        step = books.settle(planned, runner.launch(planned.plan))
        for uid, id_ in zip(step.uids, np.frombuffer(step.ids, "<i4").tolist(), strict=True):
            said[uid].append(id_)
    assert books.pauses and said == {submit.uid: undisturbed(submit)[0] for submit in submits}


def test_a_higher_priority_goes_first() -> None:
    router, pace = router_of("tokenllm", 1, 16)
    books = Scheduler(
        TokenMemory(100), router, rows=1, max_positions=100, prefill_chunk_tokens=16, most_chunks=9,
        most_context_tokens=999, max_queued_requests=9, max_queued_tokens=999, eos_ids=frozenset(), pace=pace,
    )  # fmt: skip
    for uid, priority in enumerate((0, 3, -1, 3)):
        books.accept(replace(request(uid, max_tokens=1), priority=priority))
    order: list[int] = []
    while planned := books.plan():
        order += books.settle(planned, sampled(7)).uids
    assert order == [1, 3, 0, 2]


def test_a_refusal_says_when_to_come_back() -> None:
    """A queue of so much service, served at the rate of the last minute."""
    pace = LearnedPace(16)
    backlog = Backlog(pace, 100)
    one = columns_of(request(1, prompt=100, max_tokens=50))
    assert backlog.retry_after_s(one) == 1, "nobody knows yet"
    backlog.admitted(0.0, one)
    assert backlog.retry_after_s(one) == 60, "one a minute"
    for second in range(1, 120):
        backlog.admitted(float(second), one)
    assert backlog.retry_after_s(one) == 2  # the window is just filling
    assert 6 <= backlog.retry_after_s(one.then(one).then(one).then(one).then(one)) <= 7
    books = scheduler(rows=1, max_queued_requests=0)
    assert [answer_after_a_plan(books, request(uid)) for uid in range(2)] == [Begin, Refused]
    assert books.accept(request(5))[0].retry_after_s == 1


def columns_of(submit: Submit) -> Columns:
    queue = Queue()
    queue.add(Request(submit, 0.0), len(submit.prompt) // 4, 0)
    return queue.columns()


def test_who_is_paused_before_its_first_token_is_known_leaves_its_prompt_to_the_tree() -> None:
    books, runner = paused_books()
    submit = submit_of(1)
    books.accept(submit)
    first = books.plan()
    flight = runner.launch(first.plan)
    books._pause(books._requests[1], int(first.plan.sampling_rows[0]))
    books.memory.check([])
    assert (books.memory.active, books.memory.cached) == (0, 10)
    assert books.settle(first, flight).uids == ()
    assert read(books, runner) == (1, {1: 0})


def test_whose_vector_is_on_its_way_may_be_aborted() -> None:
    books, runner = scheduler(), FakeRunner(0)
    for uid in (1, 2):
        books.accept(replace(request(uid, prompt=8), pooling="mean"))
    planned = books.plan()
    flight = runner.launch(planned.plan)
    books.accept(Abort(1))
    assert set(flight.vectors) == {1, 2}
    assert books.settle(planned, flight) == Step((2,), (0,), b"", (FINISHED["stop"],), (0,))
    assert books.memory.active == 0 and books.plan() is None


def test_what_is_averaged_is_computed_anew_and_then_shared() -> None:
    """The last token's vector needs but itself; of who asks for the mean others may still take what they can."""
    books, runner = scheduler(prefill_chunk_tokens=99), FakeRunner(0)
    computed = {}
    for uid, pooling in enumerate(("mean", "mean", "last", None)):
        books.accept(replace(request(0, max_tokens=1), uid=uid, pooling=pooling))
        planned = books.plan()
        computed[uid] = planned.plan.tokens
        books.settle(planned, runner.collect(runner.launch(planned.plan)))
    assert computed == {0: 10, 1: 10, 2: 1, 3: 1}


def test_who_was_admitted_on_old_news_and_leaves_no_room_gives_way_at_once() -> None:
    """It was to share what another held, who has left since: with it, nobody can read on, and nothing else happens."""
    books, runner = paused_books(prefill_chunk_tokens=20)
    books.router.policy.reading_order = lambda unread: unread.argsort(kind="stable")
    long, shared = submit_of(1, prompt=35, max_tokens=2), submit_of(2, prompt=10, max_tokens=2)
    late = replace(shared, uid=3, prompt=shared.prompt + b"\3\0\0\0", max_tokens=1)
    for submit in (long, shared):
        books.accept(submit)
        step_of(books, runner)
    books.accept(late)
    books.accept(Abort(shared.uid))
    books._look_again = lambda: None  # it is the turn of others, of whom many wait
    ended = 0
    while ended < 2:
        ended += sum(code > 0 for code in step_of(books, runner).finished)
