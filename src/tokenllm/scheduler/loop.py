"""The scheduler's loop: receive, plan, run, send. It owns nothing but the order of these."""

import time
from collections import deque
from collections.abc import Sequence

from tokenllm.counters import Page
from tokenllm.engine.batch import Plan
from tokenllm.engine.runner import Flight, Runner
from tokenllm.messages import Begin, GatewayLost, Inbound, Midway, Ready
from tokenllm.ring import Receiver, RingCorrupt, RingFull, Sender, wait_for_any
from tokenllm.scheduler.request import Request
from tokenllm.scheduler.scheduler import Scheduler

RING_B_RETRY_S = 0.001


class Loop:
    """Joins a scheduler and a runner to the rings. At most `runner.ahead + 1` steps are in flight."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        inboxes: Sequence[Receiver[Inbound]],
        outbox: Sender[Midway],
        page: Page,
        ready: Ready,
    ) -> None:
        self._scheduler, self._runner = scheduler, runner
        self._inboxes, self._outbox, self._page, self._ready = inboxes, outbox, page, ready
        self._flights: deque[tuple[Flight, tuple[Request, ...], float]] = deque()

    def serve(self) -> None:
        send_when_room(self._outbox, self._ready)
        while True:
            self._receive()
            planned = self._scheduler.plan()
            self._publish()
            if planned:
                self._launch(*planned)
            if len(self._flights) > self._runner.ahead or (self._flights and not planned):
                self._collect()
            if not planned and not self._flights:
                wait_for_any(self._inboxes, timeout_s=None)

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

    def _launch(self, plan: Plan, sampling: tuple[Request, ...]) -> None:
        began = time.monotonic()
        self._flights.append((self._runner.launch(plan), sampling, began))
        prompt_tokens = sum(piece.tokens for piece in plan.pieces if piece.ids is not None)
        self._page.add("tokenllm_prompt_tokens_computed_total", prompt_tokens)

    def _collect(self) -> None:
        flight, sampling, began = self._flights.popleft()
        step = self._scheduler.settle(sampling, self._runner.collect(flight))
        now = time.monotonic()
        self._page.add("tokenllm_steps_total")
        self._page.add("tokenllm_generation_tokens_total", sum(step.counts))
        self._page.observe("tokenllm_step_seconds", now - began)
        self._page.set("tokenllm_last_step_monotonic_seconds", now)
        if step.uids:
            send_when_room(self._outbox, step)

    def _publish(self) -> None:
        scheduler, page = self._scheduler, self._page
        page.set("tokenllm_kv_tokens_capacity", scheduler.slots.capacity)
        page.set("tokenllm_kv_tokens_free", scheduler.slots.free)
        page.set("tokenllm_kv_tokens_active", scheduler.slots.held)
        page.set("tokenllm_requests_running", len(scheduler.running))
        page.set("tokenllm_requests_waiting", len(scheduler.waiting))
        peak = scheduler.policy.predicted_peak(request.demand for request in scheduler.running)
        page.set("tokenllm_predicted_peak_tokens", peak)


def send_when_room(outbox: Sender[Midway], message: Midway) -> None:
    """A full ring B means that the detokenizer is behind: the whole engine waits for it, and nothing is lost."""
    while True:
        try:
            return outbox.send(message)
        except RingFull:
            time.sleep(RING_B_RETRY_S)
