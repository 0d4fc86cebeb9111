"""What comes back for one HTTP request: the deltas of its choices, and what they add up to."""

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from math import inf
from typing import Literal, NamedTuple

import msgspec

from tokenllm.gateway.alarm import Alarm
from tokenllm.messages import Delta, Finish, TokenText
from tokenllm_schemas.errors import ApiError
from tokenllm_schemas.responses import Usage


class Head(NamedTuple):
    """What an answer and all its chunks have in common."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class Reply:
    """What the choices of one HTTP request have been told, and their reader has not taken yet."""

    def __init__(self, uids: Sequence[int], arrived_s: float = 0.0, patience_s: float = inf) -> None:
        self.uids = uids
        self._patience_s = patience_s  # how long its client waits for something to be written
        self._waits_since_s = arrived_s
        self.open = len(uids)  # choices whose last word has not been taken
        self._deltas: list[tuple[int, Delta]] = []
        self._error: ApiError | None = None
        self._reader: asyncio.Future[None] | None = None  # waits
        self._alarm = Alarm(self._wake)

    def put(self, index: int, delta: Delta) -> None:
        self._deltas.append((index, delta))
        if self._reader:
            self._wake()

    def fail(self, error: ApiError) -> None:
        """The last word of one choice, and with it of the whole reply."""
        self._error = error
        self._wake()

    def close(self) -> None:
        """Nobody will ask any more."""
        self._alarm.stop()

    def _wake(self) -> None:
        reader, self._reader = self._reader, None
        if reader and not reader.done():
            reader.set_result(None)

    def written(self) -> None:
        """Its client has been sent something, and waits anew."""
        self._waits_since_s = time.monotonic()

    async def deltas(self, silence_s: float = inf) -> list[tuple[int, Delta]]:
        """All that waits, each with the index of its choice; nothing if that is how long nobody said anything.

        Raises the error that ended the reply, after what had come before it, or that its client waits no longer.
        """
        patient_until_s = self._waits_since_s + self._patience_s
        if not self._deltas and not self._error:
            self._reader = asyncio.get_running_loop().create_future()
            self._alarm.set(min(time.monotonic() + silence_s, patient_until_s))
            await self._reader
        deltas, self._deltas = self._deltas, []
        if self._error and not deltas:
            raise self._error
        if time.monotonic() >= patient_until_s:
            raise ApiError(408, f"no answer within the {self._patience_s:g} s that the client waits", "timeout")
        for _, delta in deltas:
            if delta.finish:
                self.open -= 1
        return deltas


class Said(msgspec.Struct, frozen=True):
    """What one choice said, in one piece."""

    index: int
    text: str
    logprobs: tuple[TokenText, ...]
    finish: Finish | None
    vector: bytes = b""  # little-endian float32


def joined(deltas: Iterable[tuple[int, Delta]]) -> list[Said]:
    """What each choice said, in order of their first words."""
    by_choice: defaultdict[int, list[Delta]] = defaultdict(list)
    for index, delta in deltas:
        by_choice[index].append(delta)
    return [_said(index, its) for index, its in by_choice.items()]


def _said(index: int, deltas: list[Delta]) -> Said:
    logprobs = tuple(logprob for delta in deltas for logprob in delta.logprobs)
    text, vector = "".join(delta.text for delta in deltas), b"".join(delta.vector for delta in deltas)
    return Said(index, text, logprobs, deltas[-1].finish, vector)


async def whole(reply: Reply) -> list[Said]:
    """All that the choices say, in the order of their indices."""
    deltas = []
    while reply.open:
        deltas += await reply.deltas()
    return sorted(joined(deltas), key=lambda said: said.index)


def client_reason(finish: Finish | None) -> Literal["stop", "length"]:
    assert finish and finish.reason in ("stop", "length"), "the circuit turns the other reasons into errors"
    return finish.reason


def total_usage(finishes: Mapping[int, Finish], choices_each: int) -> Usage:
    """Of all choices, by their index. Those of one prompt share it, so it counts once."""
    firsts = [finish for index, finish in finishes.items() if index % choices_each == 0]
    return Usage.of(
        prompt_tokens=sum(finish.prompt_tokens for finish in firsts),
        cached_tokens=sum(finish.cached_tokens for finish in firsts),
        completion_tokens=sum(finish.completion_tokens for finish in finishes.values()),
    )
