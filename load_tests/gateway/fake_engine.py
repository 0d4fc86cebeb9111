"""The scheduler's process with nothing to compute: all requests that run get a token in every step.

A request's `seed` says how many tokens per second it wants; from FREE on, as many as the rings take. All tokens are
words that begin with their only space, so that a reader counts tokens by counting spaces.
"""

import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tokenllm.config import SchedulerBirth
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
    Step,
    Submit,
    gateway_of,
)
from tokenllm.process import die_with, read_birth
from tokenllm.ring import Receiver, RingFull, Sender, wait_for_any
from tokenllm.text.tokenizer import load_decoder

FREE = 1_000_000
MODEL_LEN = 1 << 22
ID_SUPPLY = 1 << 16
FULL_S = 0.0005
WORD = re.compile(rb" [a-z]+")
ABORTED, LENGTH = 1 + FINISH_REASONS.index("abort"), 1 + FINISH_REASONS.index("length")


class FakeEngine:
    """All running requests advance together, so a step is the last one with other ids until somebody comes or goes."""

    def __init__(self, ready: Ready, words: list[int]) -> None:
        self._ready = ready
        self._ids = np.array(random.Random(7).choices(words, k=ID_SUPPLY), "<i4").tobytes()
        self._left: dict[int, int] = {}  # tokens of each uid, `_steps` steps ago
        self._steps = 0
        self._supplied = 0
        self.step_s = 0.0

    @property
    def running(self) -> bool:
        return bool(self._left)

    def accept(self, message: Inbound) -> Iterator[Midway]:
        match message:
            case Submit(uid=uid):
                self._settle()
                self._left[uid] = message.max_tokens
                self.step_s = 0.0 if message.sampling.seed >= FREE else 1 / message.sampling.seed
                yield Begin(uid, len(message.prompt) // 4)
            case Abort(uid=uid):
                yield from self._abort([uid] if uid in self._left else [])
            case GatewayLost(slot=slot, incarnation=incarnation):
                yield from self._abort([uid for uid in self._left if gateway_of(uid) == (slot, incarnation)])
                yield self._ready

    def _abort(self, uids: list[int]) -> Iterator[Midway]:
        self._settle()
        for uid in uids:
            del self._left[uid]
        none = (0,) * len(uids)
        if uids:
            yield Step(tuple(uids), none, b"", (ABORTED,) * len(uids), none)

    def _settle(self) -> None:
        self._left = {uid: left - self._steps for uid, left in self._left.items()}
        self._steps = 0

    def step(self) -> Step:
        if not self._steps:
            self._uids, self._ones, self._zeros = tuple(self._left), (1,) * len(self._left), (0,) * len(self._left)
            self._shortest = min(self._left.values())
        self._steps += 1
        uids, finished = self._uids, self._zeros
        if self._steps == self._shortest:
            self._settle()
            finished = tuple(STILL_RUNNING if self._left[uid] else LENGTH for uid in uids)
            self._left = {uid: left for uid, left in self._left.items() if left}
        return Step(uids, self._ones, self._next_ids(len(uids)), finished, self._zeros)

    def _next_ids(self, count: int) -> bytes:
        self._supplied = self._supplied + count if self._supplied + 2 * count <= ID_SUPPLY else 0
        return self._ids[4 * self._supplied : 4 * (self._supplied + count)]


def send(outbox: Sender[Midway], message: Midway) -> None:
    while True:
        try:
            return outbox.send(message)
        except RingFull:
            time.sleep(FULL_S)


def main() -> None:
    birth = read_birth(SchedulerBirth)
    die_with(birth.supervisor_pid)
    words = [id_ for id_, piece in load_decoder(Path(birth.model_path)).pieces.items() if WORD.fullmatch(piece)]
    ready = Ready(birth.generation, MODEL_LEN, MODEL_LEN)
    engine, page = FakeEngine(ready, words), Page(birth.page_fd)
    inboxes = [Receiver[Inbound](fds, Inbound) for fds in birth.inboxes]
    outbox = Sender[Midway](birth.outbox)
    send(outbox, ready)
    due = 0.0
    while True:
        for inbox in inboxes:
            for message in inbox.receive():
                for answer in engine.accept(message):
                    send(outbox, answer)
        now = time.monotonic()
        if not engine.running or now < due:
            wait_for_any(inboxes, due - now if engine.running else None)
        else:
            send(outbox, engine.step())
            page.set("tokenllm_last_step_monotonic_seconds", now)
            due = max(due, now - engine.step_s) + engine.step_s


if __name__ == "__main__":
    main()
