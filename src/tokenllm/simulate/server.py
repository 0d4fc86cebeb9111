"""The simulated server: arrivals, the router's decisions, steps, and the books of who got which token when.

Runs the router that the scheduler runs, and as the scheduler does: it asks for a decision when the scheduler would,
and carries it out in the same order (tests/scheduler/test_engine_is_simulator.py). In between the clock jumps over many
steps at once.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from tokenllm.routing.columns import Columns, Floats, Ints
from tokenllm.routing.router import Router
from tokenllm.simulate.limits import UNLIMITED, StepLimits
from tokenllm.simulate.prefixes import Prefixes
from tokenllm.simulate.workload import BLOCK_TOKENS, Workload

LOOKS = 32  # waiting requests whose prefix is looked for again at a decision, at most, as in the scheduler:
FRUITLESS_LOOKS = 2  # of these that find what was known end it


class Clock(Protocol):
    """What a step takes: a machine's seconds, or one for each step."""

    def decode_s(self, decodes: int, held: int) -> float: ...
    def decode_steps_s(self, decodes: int, held: int, steps: int) -> Floats: ...
    def prefill_s(self, tokens: np.ndarray, before: np.ndarray) -> float: ...


@dataclass
class Books:
    """What happened, by request and over time."""

    first_token_s: Floats  # after arrival; nan: refused
    last_token_s: Floats
    longest_gap_s: Floats
    pauses: Ints
    recomputed: Ints
    steps: int = 0
    most_tokens: int = 0
    seconds: float = 0.0
    decisions: int = 0
    # from when, for how long, tokens in use, requests that ran, that waited
    timeline: list[tuple[float, float, int, int, int]] = field(default_factory=list)


class Server:
    """One run. Tokens in use are those of running requests; what the prefix cache keeps beside them counts as free."""

    def __init__(
        self,
        workload: Workload,
        router: Router,
        clock: Clock,
        capacity: int,
        kind_of: Callable[[int, int], int],
        limits: StepLimits = UNLIMITED,
    ) -> None:
        count = len(workload)
        self._work, self._router, self._clock, self.capacity = workload, router, clock, capacity
        self._limits = limits
        self._cache = Prefixes(workload.blocks, workload.prompt, BLOCK_TOKENS)
        self._prefixes = self._cache if workload.blocks else None  # nothing to look for where nothing is shared
        self._kind_of = kind_of
        self._kinds = np.zeros(count, np.int64)
        self._generated = np.zeros(count, np.int64)
        self._unread = workload.prompt.copy()
        self._private = np.zeros(count, np.int64)  # tokens held outside the prefix cache
        self._running: Ints = np.zeros(0, np.int64)
        self._waiting: Ints = np.zeros(0, np.int64)
        self._found = np.zeros((count, 2), np.int64)  # tokens of each in the cache, and locked, when last looked up
        self._reads = np.ones(count, bool)  # since its admission it has not got a token
        self._changed = True  # since the last decision somebody came, went, or got a first token
        self._arrived = self._looked = self._left = 0
        self._now = 0.0
        nan = np.full(count, np.nan)
        self.books = Books(nan, nan.copy(), np.zeros(count), np.zeros(count, np.int64), np.zeros(count, np.int64))
        self._previous = np.full(count, np.nan)  # when each got its newest token

    def run(self) -> Books:
        self._refuse()
        while True:
            self._receive()
            if not len(self._running) and not len(self._waiting):
                if self._arrived == len(self._work):
                    break
                self._now = max(self._now, float(self._work.arrival[self._arrived]))
            elif self._must_decide():
                self._decide()
            else:
                self._jump()
        self.books.seconds = self._now
        return self.books

    @property
    def _used(self) -> int:
        return int(self._private[self._running].sum()) + self._cache.locked_tokens

    def _refuse(self) -> None:
        """Who cannot fit alone never waits."""
        self._refused = self._work.prompt + self._work.max_tokens - 1 > self.capacity

    def _receive(self) -> None:
        until = int(np.searchsorted(self._work.arrival, self._now, "right"))
        if until > self._arrived:
            new = np.arange(self._arrived, until)
            new = new[~self._refused[new]]
            self._arrived = until
            for request in new.tolist():
                self._look_up(request)
                self._kinds[request] = self._kind_of(
                    int(self._work.group[request]), int(self._work.max_tokens[request])
                )
            self._waiting = np.concatenate((self._waiting, new))
            self._changed |= len(new) > 0

    def _look_up(self, request: int) -> bool:
        """Whether what is found is not what was known."""
        hit, locked = self._prefixes.hit(request)[1:] if self._prefixes else (0, 0)
        known, self._found[request] = self._found[request].tolist(), (hit + self._cache.tail[request], locked)
        return known != self._found[request].tolist()

    def _columns(self, who: Ints, shared: Ints, unread: Ints) -> Columns:
        work = self._work
        return Columns(
            uid=who,
            prompt=work.prompt[who],
            generated=self._generated[who],
            max_tokens=work.max_tokens[who],
            unread=unread,
            shared=shared,
            arrival=work.arrival[who],
            kind=self._kinds[who],
            tenant=work.tenant[who],
            priority=work.priority[who],
        )

    def _running_columns(self) -> Columns:
        who = self._running
        unread = self._unread[who]
        if not self._prefixes:
            return self._columns(who, np.zeros(len(who), np.int64), unread)
        held = self._work.prompt[who] + self._generated[who] - unread
        return self._columns(who, held - self._private[who] - self._prefixes.sole[who], unread)

    def _waiting_columns(self) -> Columns:
        who = self._waiting
        self._look_again()
        found, locked = self._found[who].T
        return self._columns(who, locked, np.maximum(1, self._work.prompt[who] + self._generated[who] - found))

    def _look_again(self) -> None:
        """Some of those who wait, each time others; the next ones too while that is worth it."""
        count, fruitless = len(self._waiting), 0
        for place in range(self._looked, self._looked + min(LOOKS, count)):
            fruitless += not self._look_up(int(self._waiting[place % count]))
            self._looked = (place + 1) % count
            if fruitless == FRUITLESS_LOOKS:
                break

    def _must_decide(self) -> bool:
        """Otherwise the batch goes on as it is."""
        retries = self._router.policy.retries and len(self._waiting) > 0
        goes_on = self._router.needs_no_decision(len(self._running), self.capacity - self._used)
        return self._changed or retries or not goes_on or bool(self._reads[self._running].any())

    def _decide(self) -> None:
        """Ask the router, and do what it says. It takes no time if nobody computes then, because all are paused."""
        running, waiting = self._running_columns(), self._waiting_columns()
        decision = self._router.decide(self._now, running, waiting, self.capacity - self._used)
        self.books.decisions += 1
        self._changed = bool(len(decision.pause) or len(decision.admit))
        self._pause(decision.pause)
        streams = self._running[~self._reads[self._running]]
        seconds = self._clock.decode_s(len(streams), int(self._held(streams).sum()))
        self._compute(streams, np.ones(len(streams), np.int64))
        self._admit(decision.admit)
        to_read = decision.tokens - len(streams)
        readers, tokens = self._chunks(self._limits.prompt_tokens(to_read, len(streams)))
        if len(readers):
            seconds += self._clock.prefill_s(tokens, self._held(readers))
            self._compute(readers, tokens)
        if len(streams) or len(readers):
            self._end_step(seconds)
        elif not len(decision.pause):
            raise AssertionError(f"{len(self._running)} run, {len(self._waiting)} wait, and nobody computes")

    def _held(self, who: Ints) -> Ints:
        return self._work.prompt[who] + self._generated[who] - self._unread[who]

    def _pause(self, places: Ints) -> None:
        """Those in the middle of a prompt too."""
        if not len(places):
            return
        who = self._running[places]
        for request in who.tolist():
            self.books.pauses[request] += 1
            self._leave(request)
            self._look_up(request)
        self._waiting = np.concatenate((self._waiting, who))
        self._running = np.delete(self._running, places)

    def _leave(self, request: int) -> None:
        """As in the prefix tree, what it has computed stays until the room is wanted: the first to leave goes first."""
        self._left += 1
        if self._prefixes:
            self._prefixes.release(request, self._left)
        if not self._prefixes or not self._reads[request]:
            self._cache.leave(request, int(self._private[request]), self._left)
        self._private[request] = 0

    def _admit(self, places: Ints) -> None:
        who = self._waiting[places]
        for request in who.tolist():
            self._find(request)
            if self.books.pauses[request]:
                self.books.recomputed[request] += self._unread[request] - 1  # the last would be computed anyway
        self._reads[who] = True
        self._running = np.concatenate((self._running, who))
        self._waiting = np.delete(self._waiting, places)

    def _find(self, request: int) -> None:
        """What is in memory of its tokens is its own from now on; the rest it has to compute."""
        behind, hit = self._cache.come_back(request), 0
        if self._prefixes:
            hit = self._prefixes.lock_hit(request)
            behind *= self._prefixes.holds_all(request)  # without what comes before them they are worth nothing
        self._private[request] = behind
        # the last token of a prompt is computed whatever is cached: its logits are wanted
        self._unread[request] = max(1, int(self._work.prompt[request] + self._generated[request]) - hit - behind)

    def _chunks(self, budget: int) -> tuple[Ints, Ints]:
        """Who reads, and how many tokens each: in the policy's order, as many as the limits and the room allow."""
        readers = self._running[self._reads[self._running]]
        readers = readers[self._router.policy.reading_order(self._unread[readers])]
        tokens = self._limits.chunks(
            self._held(readers), self._unread[readers], min(budget, self.capacity - self._used)
        )
        return readers[tokens > 0], tokens[tokens > 0]

    def _compute(self, who: Ints, tokens: Ints) -> None:
        self._private[who] += tokens
        self._unread[who] -= tokens
        self._make_room()

    def _end_step(self, seconds: float) -> None:
        self._note(seconds, 1)
        self._now += seconds
        self._sample(self._running[self._unread[self._running] == 0])

    def _make_room(self) -> None:
        used = self._used
        self.books.most_tokens = max(self.books.most_tokens, used)
        if used > self.capacity:
            raise AssertionError(f"{used} tokens in a memory of {self.capacity}: the router overcommitted a step")
        self._cache.evict(used + self._cache.kept_tokens - self.capacity)

    def _note(self, seconds: float, steps: int) -> None:
        self.books.steps += steps
        self.books.timeline.append((self._now, seconds, self._used, len(self._running), len(self._waiting)))

    def _sample(self, who: Ints) -> None:
        """These got a token just now."""
        if not len(who):
            return
        fresh = who[self._reads[who]]
        if len(fresh):
            self._publish(fresh)
        gaps = self._now - self._previous[who]
        self.books.longest_gap_s[who] = np.fmax(self.books.longest_gap_s[who], gaps)
        self._previous[who] = self._now
        self._generated[who] += 1
        self._unread[who] = 1
        self._finish(who[self._generated[who] == self._work.length[who]])

    def _publish(self, who: Ints) -> None:
        """Their prompts have been read: from now on everybody may share them."""
        self._reads[who], self._changed = False, True
        first = who[np.isnan(self.books.first_token_s[who])]
        self.books.first_token_s[first] = self._now - self._work.arrival[first]
        if self._prefixes:
            for request in who.tolist():
                total = int(self._work.prompt[request] + self._generated[request])
                self._private[request] = max(0, total - self._prefixes.insert(request))

    def _finish(self, who: Ints) -> None:
        if not len(who):
            return
        self._changed = True
        for request in who.tolist():
            self._leave(request)
            self._router.finished(int(self._kinds[request]), int(self._work.length[request]))
        self.books.last_token_s[who] = self._now - self._work.arrival[who]
        self._running = self._running[~np.isin(self._running, who)]

    def _jump(self) -> None:
        """Steps in which everybody who runs decodes and nobody comes or goes, until one of them has its last token."""
        who, free = self._running, self.capacity - self._used
        steps = min(int((self._work.length[who] - self._generated[who]).min()), free // len(who))
        held = int((self._work.prompt[who] + self._generated[who] - 1).sum())
        seconds = self._clock.decode_steps_s(len(who), held, steps)
        ends = self._now + seconds.cumsum()
        if self._arrived < len(self._work):
            steps = min(steps, 1 + int(np.searchsorted(ends, self._work.arrival[self._arrived])))
        self._advance(who, steps, float(seconds[:steps].max()), float(ends[steps - 1] - self._now))

    def _advance(self, who: Ints, steps: int, gap: float, seconds: float) -> None:
        waited = self._now - self._previous[who]  # who was held before has its gap end with the first of these steps
        self.books.longest_gap_s[who] = np.fmax(self.books.longest_gap_s[who], waited + gap)
        self._generated[who] += steps
        self._private[who] += steps
        self._make_room()
        self._note(seconds, steps)
        self._now += seconds
        self._previous[who] = self._now
        self._finish(who[self._generated[who] == self._work.length[who]])
