"""A scheduler without a model: it speaks the rings as the real one does, and is ready in a fraction of a second.

The next id is a function of the seed and the ids before it, so that a text is the same whatever happens around it.
FAKE_LOAD_S and FAKE_STEP_S in the environment say how long it loads and how long a step takes on average.
"""

import os
import random
import time
from zlib import crc32

import numpy as np

from tokenllm.config import CPU_RUNNING, SchedulerBirth, ServeConfig
from tokenllm.counters import Page
from tokenllm.messages import (
    FINISH_REASONS,
    STILL_RUNNING,
    Abort,
    Begin,
    GatewayLost,
    Inbound,
    Midway,
    Ready,
    Refused,
    Step,
    Submit,
    TokenLogprob,
    gateway_of,
)
from tokenllm.process import die_with, read_birth
from tokenllm.ring import Receiver, RingFull, Sender, wait_for_any

CAPACITY_TOKENS, MODEL_LEN = 8192, 1024
EOS_ID, FIRST_ID, LAST_ID = 0, 4, 400  # ids of the tiny model in conftest.py
FINISHED = {reason: 1 + place for place, reason in enumerate(FINISH_REASONS)}


class Request:
    def __init__(self, submit: Submit) -> None:
        self.uid = submit.uid
        self.submit = submit
        self.prompt_tokens = len(submit.prompt) // 4
        self.generated = 0
        self._state = crc32(submit.prompt, submit.sampling.seed & 0xFFFFFFFF)

    @property
    def most_tokens(self) -> int:
        return self.prompt_tokens + self.submit.max_tokens

    def next_id(self) -> int:
        self.generated += 1
        self._state = crc32(self._state.to_bytes(4, "little"))
        if self._state % 61 == 0 and not self.submit.ignore_eos:
            return EOS_ID
        return FIRST_ID + self._state % (LAST_ID - FIRST_ID)

    def finished(self, newest: int) -> int:
        if newest == EOS_ID:
            return FINISHED["stop"]
        return FINISHED["length"] if self.generated == self.submit.max_tokens else STILL_RUNNING

    def logprob(self, newest: int) -> TokenLogprob:
        top = tuple((FIRST_ID + i, -1.0 - i) for i in range(self.submit.sampling.logprobs or 0))
        return TokenLogprob(newest, -0.5, top)


class FakeScheduler:
    def __init__(self, config: ServeConfig, generation: int) -> None:
        self.capacity = config.max_total_tokens or CAPACITY_TOKENS
        self.ready = Ready(generation, self.capacity, MODEL_LEN)
        self._most_running = config.max_running_requests or CPU_RUNNING
        self._most_waiting = config.max_queued_requests
        self.running: dict[int, Request] = {}
        self.waiting: dict[int, Request] = {}

    @property
    def active_tokens(self) -> int:
        return sum(request.prompt_tokens + request.generated for request in self.running.values())

    def accept(self, message: Inbound) -> list[Midway]:
        match message:
            case Submit():
                return [self._enqueue(Request(message))]
            case Abort(uid=uid):
                return self._abort([uid] if uid in self.running or uid in self.waiting else [])
            case GatewayLost(slot=slot, incarnation=incarnation):
                known = [*self.running, *self.waiting]
                lost = [uid for uid in known if gateway_of(uid) == (slot, incarnation)]
                return [*self._abort(lost), self.ready]

    def _enqueue(self, request: Request) -> Midway:
        if request.most_tokens > self.capacity:
            word = f"{request.most_tokens} tokens do not fit into {self.capacity}"
            return Refused(request.uid, 400, "context_length_exceeded", word)
        if len(self.waiting) >= self._most_waiting:
            return Refused(request.uid, 429, "queue_full", f"{len(self.waiting)} requests wait")
        self.waiting[request.uid] = request
        return Begin(request.uid, request.prompt_tokens, request.submit.telling)

    def _abort(self, uids: list[int]) -> list[Midway]:
        for uid in uids:
            self.running.pop(uid, None)
            self.waiting.pop(uid, None)
        n = len(uids)
        return [Step(tuple(uids), (0,) * n, b"", (FINISHED["abort"],) * n, (0,) * n)] if uids else []

    def step(self) -> Step:
        self._admit()
        requests = tuple(self.running.values())
        ids = [request.next_id() for request in requests]
        finished = tuple(request.finished(newest) for request, newest in zip(requests, ids, strict=True))
        for request, how in zip(requests, finished, strict=True):
            if how != STILL_RUNNING:
                del self.running[request.uid]
        wanted = [pair for pair in zip(requests, ids, strict=True) if pair[0].submit.sampling.logprobs is not None]
        return Step(
            uids=tuple(request.uid for request in requests),
            counts=(1,) * len(ids),
            ids=np.array(ids, "<i4").tobytes(),
            finished=finished,
            cached_tokens=(0,) * len(ids),
            logprobs={request.uid: (request.logprob(newest),) for request, newest in wanted},
        )

    def _admit(self) -> None:
        """First come, first served, and room for all that each may become."""
        free = self.capacity - sum(request.most_tokens for request in self.running.values())
        for request in list(self.waiting.values()):
            free -= request.most_tokens
            if free < 0 or len(self.running) == self._most_running:
                return
            self.running[request.uid] = self.waiting.pop(request.uid)


def publish(scheduler: FakeScheduler, page: Page) -> None:
    page.set("tokenllm_kv_tokens_capacity", scheduler.capacity)
    page.set("tokenllm_kv_tokens_active", scheduler.active_tokens)
    page.set("tokenllm_kv_tokens_free", scheduler.capacity - scheduler.active_tokens)
    page.set("tokenllm_requests_running", len(scheduler.running))
    page.set("tokenllm_requests_waiting", len(scheduler.waiting))
    page.set("tokenllm_last_step_monotonic_seconds", time.monotonic())


def send(outbox: Sender[Midway], message: Midway) -> None:
    while True:
        try:
            return outbox.send(message)
        except RingFull:
            time.sleep(0.001)


def main() -> None:
    birth = read_birth(SchedulerBirth)
    die_with(birth.supervisor_pid)
    time.sleep(float(os.environ.get("FAKE_LOAD_S", "0")))
    step_s = float(os.environ.get("FAKE_STEP_S", "0.002"))
    pace = random.Random(birth.generation)
    scheduler, page = FakeScheduler(birth.config, birth.generation), Page(birth.page_fd)
    inboxes = [Receiver[Inbound](fds, Inbound) for fds in birth.inboxes]
    outbox = Sender[Midway](birth.outbox)
    publish(scheduler, page)
    send(outbox, scheduler.ready)
    while True:
        for inbox in inboxes:
            for message in inbox.receive():
                for answer in scheduler.accept(message):
                    send(outbox, answer)
        if scheduler.running or scheduler.waiting:
            time.sleep(pace.uniform(0, 2 * step_s))
            step = scheduler.step()
            publish(scheduler, page)
            page.add("tokenllm_steps_total")
            page.add("tokenllm_generation_tokens_total", len(step.uids))
            send(outbox, step)
        else:
            publish(scheduler, page)
            wait_for_any(inboxes, timeout_s=None)


if __name__ == "__main__":
    main()
