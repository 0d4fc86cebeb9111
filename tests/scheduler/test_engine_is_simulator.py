"""On a clock that counts steps, the scheduler and the simulator do the same: as many steps, the same pauses of the same
requests, each token at the same step, the same peak of memory. So the simulator can be trusted.

Nothing is shared here, every request being its own tenant's or salt's: the simulator knows prefixes by the block, the
scheduler by the token.
"""

import zlib
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenllm.engine.batch import Sampled
from tokenllm.memory.token_memory import TokenMemory
from tokenllm.messages import Begin, Sampling, Submit
from tokenllm.routing.columns import Columns
from tokenllm.routing.first_come import FirstCome, Policy
from tokenllm.routing.lengths import Lengths
from tokenllm.routing.pace import Pace
from tokenllm.routing.router import Router
from tokenllm.routing.tokenllm import TokenLLM
from tokenllm.scheduler.request import APPLICATION_TOKENS, Request
from tokenllm.scheduler.scheduler import Planned, Scheduler
from tokenllm.simulate import mixes, policies
from tokenllm.simulate.flags import FIRST_COME_ORACLE, ORACLE, POLICIES
from tokenllm.simulate.limits import StepLimits
from tokenllm.simulate.machine import StepClock
from tokenllm.simulate.server import Server
from tokenllm.simulate.workload import Workload, of

EOS, WORD = 0, 1
RECKLESS, RECKLESS_SHORTEST = "reckless", "reckless shortest"


class Reckless(FirstCome):
    """Admits whoever comes: pauses have to make up for it."""

    def admits(self, running: Columns, candidates: Columns, room: float) -> int:
        return len(candidates)


class RecklessShortest(TokenLLM):
    """The same, in the order of the default."""

    def admits(self, running: Columns, candidates: Columns, room: float) -> int:
        return len(candidates)


@dataclass(frozen=True)
class House:
    """What both are given."""

    policy: str
    capacity: int
    rows: int
    limits: StepLimits
    pace: Pace | None  # None: the router has none, and a prompt is read at once

    def make(self, work: Workload) -> tuple[Policy, Router]:
        pace = self.pace or Pace(1.0, 0.0, 0.0, 0.01, 2.0)
        match self.policy:
            case "reckless":
                policy: Policy = Reckless()
            case "reckless shortest":
                policy = RecklessShortest(Lengths(), pace, self.capacity)
            case name:
                policy, _ = policies.make(name, work, pace, self.capacity, seed=3)
        return policy, Router(policy, replace(pace) if self.pace else None, self.rows)


@dataclass
class Account:
    """What happened; steps count from 0."""

    steps: int
    peak: int
    pauses: list[int]  # of each request
    first: list[int]  # after which step it had a token, -1: it was refused
    last: list[int]


class Watched(Scheduler):
    """Remembers who was paused."""

    def watch(self) -> Counter[int]:
        self.paused: Counter[int] = Counter()
        return self.paused

    def _pause(self, request: Request, row: int) -> None:
        self.paused[request.uid] += 1
        super()._pause(request, row)


class Driver:
    """A step takes a second, and a request says its last word when the workload has it."""

    def __init__(self, work: Workload, house: House) -> None:
        self._work, self._now, limits = work, 0, house.limits
        self.books = Watched(
            TokenMemory(house.capacity), house.make(work)[1], rows=house.rows, max_positions=house.capacity,
            prefill_chunk_tokens=limits.prefill_chunk_tokens, most_chunks=limits.most_chunks,
            most_context_tokens=limits.most_context_tokens, max_queued_requests=1 << 40, max_queued_tokens=1 << 60,
            eos_ids=frozenset({EOS}), filled=limits.filled, clock=lambda: float(self._now),
        )  # fmt: skip
        self.paused = self.books.watch()
        self.at: list[list[int]] = [[] for _ in range(len(work))]

    def run(self) -> Account:
        steps = peak = arrived = 0
        while True:
            while arrived < len(self._work) and self._work.arrival[arrived] <= self._now:
                self._submit(arrived)
                arrived += 1
            if planned := self.books.plan():
                peak, steps = max(peak, self.books.memory.active), steps + 1
                self._settle(planned)
            elif arrived < len(self._work):
                self._now = int(self._work.arrival[arrived])
            else:
                break
        assert not self.books.waiting and not self.books.rows.running, "nobody computes, and somebody wants to"
        counts = [self.paused[uid] for uid in range(len(self._work))]
        return Account(steps, peak, counts, *([at[end] if at else -1 for at in self.at] for end in (0, -1)))

    def _submit(self, uid: int) -> None:
        work = self._work
        ids, tenant = prompt_of(work, uid), str(work.tenant[uid])
        submit = Submit(
            uid, ids.tobytes(), int(work.max_tokens[uid]), Sampling(seed=0), tenant=tenant, cache_salt=str(uid),
            priority=int(work.priority[uid]),
        )  # fmt: skip
        (answer,) = self.books.accept(submit)
        assert isinstance(answer, Begin) == bool(len(ids) + work.max_tokens[uid] - 1 <= self.books.memory.capacity)

    def _settle(self, planned: Planned) -> None:
        self._now += 1
        uids = planned.uids.tolist()
        for uid in uids:
            self.at[uid].append(self._now)
        said = [EOS if len(self.at[uid]) == self._work.length[uid] else WORD for uid in uids]
        assert list(self.books.settle(planned, Sampled(np.array(said, np.int32))).uids) == uids


def prompt_of(work: Workload, uid: int) -> np.ndarray:
    return np.full(work.prompt[uid], 2 + work.group[uid], "<i4")


def in_the_engine(work: Workload, house: House) -> Account:
    return Driver(work, house).run()


def in_the_simulator(work: Workload, house: House) -> Account:
    policy, router = house.make(work)
    books = Server(told_apart(work), router, StepClock(), house.capacity, policy.kind, house.limits).run()
    first, last = (
        np.where(np.isnan(column), -1, work.arrival + column).astype(int).tolist()
        for column in (books.first_token_s, books.last_token_s)
    )
    return Account(books.steps, books.most_tokens, books.pauses.tolist(), first, last)


def told_apart(work: Workload) -> Workload:
    """Applications have the numbers that the scheduler gives them, by the beginnings of prompts."""
    groups = [
        zlib.crc32(prompt_of(work, uid)[:APPLICATION_TOKENS].tobytes()) if prompt >= APPLICATION_TOKENS else -1
        for uid, prompt in enumerate(work.prompt.tolist())
    ]
    return replace(work, group=np.array(groups, np.int64))


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    """Up to 40 requests of up to three tenants and four applications, some of which begin late."""
    one = st.tuples(
        st.integers(1, 60), st.integers(1, 60), st.integers(0, 60), st.sampled_from([0, 0, 0, 1, 2, 9, 40]),
        st.integers(0, 3), st.integers(0, 2), st.sampled_from([0, 0, 0, 5, -5]),
    )  # fmt: skip
    rows = np.array(draw(st.lists(one, min_size=1, max_size=40)), np.int64).T
    prompt, length, more, gaps, group, tenant, priority = rows
    seen: dict[int, int] = {}
    tenants = np.array([seen.setdefault(name, len(seen)) for name in tenant.tolist()], np.int64)
    arrival = (gaps.cumsum() - gaps[0]).astype(float)
    work = of("drawn", prompt, length, length + more, arrival, group)
    return replace(work, tenant=tenants, priority=priority)


def in_eights(decodes: int, prompt_tokens: int) -> int:
    """A runner to whom only some steps are good."""
    return max(1, prompt_tokens - prompt_tokens % 8)


limits = st.builds(
    StepLimits,
    prefill_chunk_tokens=st.sampled_from([1, 3, 16, 64, 1 << 40]),
    most_chunks=st.sampled_from([1, 2, 99]),
    most_context_tokens=st.sampled_from([150, 1 << 40]),
    filled=st.sampled_from([lambda decodes, tokens: tokens, in_eights]),
)
paces = st.builds(
    Pace,
    step_s=st.sampled_from([1e-3, 1.0]),
    per_held_s=st.sampled_from([0.0, 1e-2]),
    per_decode_s=st.sampled_from([0.0, 1e-2]),
    per_read_s=st.sampled_from([1e-3, 0.1]),
    target_s=st.just(2.0),
    least_chunk=st.sampled_from([1, 8]),
    most_chunk=st.sampled_from([8, 50, 8192]),
)
houses = st.builds(
    House,
    policy=st.sampled_from([*POLICIES, ORACLE, FIRST_COME_ORACLE, RECKLESS, RECKLESS_SHORTEST]),
    capacity=st.sampled_from([90, 130, 200, 400, 5000]),
    rows=st.sampled_from([1, 3, 8, 64]),
    limits=limits,
    pace=st.none() | paces,
)


@settings(max_examples=100, deadline=None)
@given(workloads(), houses)
def test_the_engine_does_what_the_simulator_says(work: Workload, house: House) -> None:
    assert in_the_engine(work, house) == in_the_simulator(work, house)


EVERY = (*POLICIES, ORACLE, FIRST_COME_ORACLE, RECKLESS, RECKLESS_SHORTEST)
CHUNKED = StepLimits(512, 8, 1 << 40), Pace(0.01, 1e-6, 1e-5, 1e-4, 0.04, 64, 512)
AT_ONCE = StepLimits(1 << 40, 1 << 40, 1 << 40), None


@pytest.mark.parametrize("policy", EVERY)
@pytest.mark.parametrize("chunks", [CHUNKED, AT_ONCE])
def test_also_with_many_and_long_ones(policy: str, chunks: tuple[StepLimits, Pace | None]) -> None:
    """A hundred requests of a chat, which arrive in the time in which half of them are served."""
    work = mixes.draw("chat", 7, 100)
    random = np.random.default_rng(7)
    work = replace(
        work,
        arrival=np.sort(random.integers(0, 1500, 100)).astype(float),
        group=random.integers(0, 3, 100),
        max_tokens=np.maximum(work.length, 1024),
    )
    house = House(policy, 6000, 32, *chunks)
    told, expected = in_the_engine(work, house), in_the_simulator(work, house)
    assert told == expected
    assert min(told.last) > 0
    if policy in (RECKLESS, RECKLESS_SHORTEST):
        assert sum(told.pauses) > 5
