"""The scheduler's loop: receive, plan, run, send. It owns nothing but the order of these."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

from tokenllm.counters import Page
from tokenllm.engine.batch import Sampled
from tokenllm.engine.runner import Runner
from tokenllm.messages import Begin, GatewayLost, Inbound, Midway, Ready, Vector
from tokenllm.ring import Receiver, RingCorrupt, RingFull, Sender, wait_for_any
from tokenllm.scheduler.history import History
from tokenllm.scheduler.scheduler import Planned, Scheduler

Flight = TypeVar("Flight")

RING_B_RETRY_S = 0.001
PUBLISHED_EVERY_S = 0.25
BYTES_PER_ID = 4
VECTOR_PART_BYTES = 1 << 14  # the smallest ring takes a frame of twice as many


class Loop(Generic[Flight]):
    """Joins a scheduler and a runner to the rings. At most `runner.ahead + 1` steps are in flight."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner[Flight],
        inboxes: Sequence[Receiver[Inbound]],
        outbox: Sender[Midway],
        page: Page,
        ready: Ready,
        history: History | None = None,
    ) -> None:
        self._scheduler, self._runner = scheduler, runner
        self._inboxes, self._outbox, self._page, self._ready = inboxes, outbox, page, ready
        self._flights: deque[tuple[Flight, Planned, float]] = deque()
        self._compilations = self._pauses = 0  # that have been counted
        self._collected_s = 0.0  # when the last step was
        self._published_s = 0.0  # when all gauges were
        self._history = history

    def serve(self) -> None:
        send_when_room(self._outbox, self._ready)
        while True:
            busy = self.turn()
            until_save_s = self._history.save_when_due(busy) if self._history else None
            if not busy:
                wait_for_any(self._inboxes, until_save_s)

    def turn(self) -> bool:
        """Receive, plan, run, send. Whether there is anything left to do."""
        self._receive()
        planned = self._scheduler.plan()
        self._publish(resting=not planned)
        if planned:
            self._launch(planned)
        busy = bool(planned or self._flights)  # what ends in this turn may make room for somebody in the next
        if len(self._flights) > self._runner.ahead or (self._flights and not planned):
            self._collect()
        return busy

    def _receive(self) -> None:
        try:
            for inbox in self._inboxes:
                for message in inbox.receive():
                    self._accept(message)
        except RingCorrupt:
            self._page.add("tokenllm_ring_corrupt_total")
            raise

    def _accept(self, message: Inbound) -> None:
        for answer in self._scheduler.accept(message):
            send_when_room(self._outbox, answer)
            if isinstance(answer, Begin):
                self._page.add("tokenllm_prompt_tokens_total", answer.prompt_tokens)
        if isinstance(message, GatewayLost):
            send_when_room(self._outbox, self._ready)  # for its successor, who may not have heard it

    def _launch(self, planned: Planned) -> None:
        began = time.monotonic()
        plan = planned.plan
        self._flights.append((self._runner.launch(plan), planned, began))
        self._page.add("tokenllm_prompt_tokens_computed_total", plan.tokens - len(plan.decodes.rows))

    def _collect(self) -> None:
        flight, planned, began = self._flights.popleft()
        sampled = self._runner.collect(flight)
        step = self._scheduler.settle(planned, sampled)
        now = time.monotonic()
        self._scheduler.took(planned, now - max(began, self._collected_s))
        self._collected_s = now
        self._page.add("tokenllm_steps_total")
        self._page.add("tokenllm_generation_tokens_total", len(step.ids) // BYTES_PER_ID)
        self._page.observe("tokenllm_step_seconds", now - began)
        self._page.set("tokenllm_last_step_monotonic_seconds", now)
        for vector in _vectors(sampled):
            send_when_room(self._outbox, vector)
        if step.uids or step.prompt_logprobs:
            send_when_room(self._outbox, step)

    def _publish(self, resting: bool) -> None:
        """Who runs and waits, which gateways go by, always; the rest, which may be a little old, now and then."""
        scheduler, page, now = self._scheduler, self._page, time.monotonic()
        page.set("tokenllm_requests_running", scheduler.rows.running)
        page.set("tokenllm_requests_waiting", len(scheduler.waiting))
        if resting or now > self._published_s + PUBLISHED_EVERY_S:
            self._published_s = now
            page.set("tokenllm_retry_after_seconds", scheduler.retry_after_s if scheduler.waiting else 0)
            page.set("tokenllm_predicted_peak_tokens", scheduler.predicted_peak)
            self._publish_memory()
            self._count_rare()

    def _publish_memory(self) -> None:
        memory, page = self._scheduler.memory, self._page
        page.set("tokenllm_kv_tokens_capacity", memory.capacity)
        page.set("tokenllm_kv_tokens_free", memory.free)
        page.set("tokenllm_kv_tokens_cached", memory.cached)
        page.set("tokenllm_kv_tokens_active", memory.active)

    def _count_rare(self) -> None:
        compilations, self._compilations = self._compilations, self._runner.compilations
        self._page.add("tokenllm_kernel_compilations_total", self._compilations - compilations)
        pauses, self._pauses = self._pauses, self._scheduler.pauses
        self._page.add("tokenllm_preemptions_total", self._pauses - pauses)


def _vectors(sampled: Sampled) -> Iterator[Vector]:
    """Also of those who were aborted meanwhile: nobody listens for them any more."""
    for uid, vector in sampled.vectors.items():
        values = vector.astype("<f4").tobytes()
        for start in range(0, len(values), VECTOR_PART_BYTES):
            yield Vector(uid, values[start : start + VECTOR_PART_BYTES])


def send_when_room(outbox: Sender[Midway], message: Midway) -> None:
    """A full ring B means that the detokenizer is behind: the whole engine waits for it, and nothing is lost."""
    while True:
        try:
            return outbox.send(message)
        except RingFull:
            time.sleep(RING_B_RETRY_S)
