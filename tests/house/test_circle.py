"""The law of the circle: every request ends exactly once, whatever clients, scheduler, detokenizer and gateways do.

A storm of seeded requests, departures and kills goes over a real server with the fake scheduler. Clients keep a
ledger of what must and what may have been counted; afterwards the server's counters have to agree with it, and
nothing may be left: no tokens, no processes, no descriptors, nothing in /dev/shm.
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from house import REAL, House, eventually

CAPACITY = 600  # tokens: less than the context, so that the scheduler has something to refuse
GATEWAYS = 2
PATIENCE_S = 40.0  # longer than any request may take, kills and reloads included
PROMPTS = ("the quick brown fox", "räven 狐 🦊", "jumps over the lazy dog " * 4, "x")
STOPS = (None, None, "e", ["th", "ö"])
UNCOUNTED = ("loading", "draining", "invalid_value")  # error codes of requests that entered no ring


class Ended(NamedTuple):
    """How one HTTP request ended for its client, and how many uids the server has to have, or may have counted."""

    how: str
    least: int
    most: int
    completed: int = 0  # choices whose finish reason the client has seen


class Client:
    """Plays one request after another and remembers all texts: the same request always gets the same one."""

    def __init__(self, url: str, rng: random.Random, same_texts: bool) -> None:
        self._http = httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, limits=httpx.Limits(max_connections=None))
        self._rng = rng
        self._same_texts = same_texts  # a real model's may differ at near-ties of its numbers
        self._texts: dict[tuple, str] = {}

    async def close(self) -> None:
        await self._http.aclose()

    async def play(self) -> Ended:
        act = self._rng.choices((self.stream, self.whole, self.leave, self.vanish, self.refused, self.invalid), WEIGHTS)
        return await act[0]()

    def _body(self, **more: object) -> dict:
        rng = self._rng
        n = rng.choice((1, 1, 1, 2, 3))
        return {
            "model": "tiny",
            "prompt": rng.choice(PROMPTS),
            "max_tokens": rng.choice((1, 7, 40, 120)),
            "seed": rng.randrange(4),
            "n": n,
            "stop": rng.choice(STOPS),
            **more,
        }

    async def stream(self, leave_after: int | None = None) -> Ended:
        body = self._body(stream=True)
        n, texts, finished = body["n"], [""] * body["n"], 0
        seen = 0
        try:
            async with self._http.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    return _failed(json.loads(await response.aread()), n)
                async for event in _events(response):
                    if "error" in event:
                        return self._cut(body, texts, Ended("error event", n, n, finished))
                    for choice in event["choices"]:
                        texts[choice["index"]] += choice["text"]
                        finished += choice["finish_reason"] is not None
                    seen += 1
                    if seen == leave_after:
                        return self._cut(body, texts, Ended("left", n, n, finished))
        except httpx.TransportError as error:
            return Ended(f"connection lost: {type(error).__name__}", 0, n)
        assert finished == n, "each choice has one finish reason before [DONE]"
        return self._complete(body, texts)

    async def whole(self) -> Ended:
        body = self._body()
        try:
            response = await self._http.post("/v1/completions", json=body)
        except httpx.TransportError as error:
            return Ended(f"connection lost: {type(error).__name__}", 0, body["n"])
        if response.status_code != 200:
            return _failed(response.json(), body["n"])
        choices = response.json()["choices"]
        assert all(choice["finish_reason"] in ("stop", "length") for choice in choices)
        return self._complete(body, [choice["text"] for choice in choices])

    async def leave(self) -> Ended:
        return await self.stream(leave_after=self._rng.randrange(1, 20))

    async def vanish(self) -> Ended:
        body = self._body(max_tokens=200)
        try:
            async with asyncio.timeout(self._rng.uniform(0, 0.3)):
                response = await self._http.post("/v1/completions", json=body)
        except (TimeoutError, httpx.TransportError):
            return Ended("vanished", 0, body["n"])
        return (
            _failed(response.json(), body["n"]) if response.status_code != 200 else Ended("whole", body["n"], body["n"])
        )

    async def refused(self) -> Ended:
        body = self._body(prompt=[5] * 500, max_tokens=200)
        try:
            response = await self._http.post("/v1/completions", json=body)
        except httpx.TransportError as error:
            return Ended(f"connection lost: {type(error).__name__}", 0, body["n"])
        if response.status_code == 200:  # the real scheduler's context is as short as its memory: nothing to refuse
            return Ended("whole", body["n"], body["n"])
        return _failed(response.json(), body["n"])

    async def invalid(self) -> Ended:
        try:
            response = await self._http.post("/v1/completions", json=self._body(max_tokens=-1))
        except httpx.TransportError as error:
            return Ended(f"connection lost: {type(error).__name__}", 0, 0)
        assert response.status_code == 400
        return Ended("invalid", 0, 0)

    def _complete(self, body: dict, texts: list[str]) -> Ended:
        for key, text in zip(_keys(body), texts, strict=True):
            known = self._texts.setdefault(key, text)
            assert known == text or not self._same_texts, "a text does not depend on what goes on around it"
        return Ended("complete", len(texts), len(texts), len(texts))

    def _cut(self, body: dict, texts: list[str], ended: Ended) -> Ended:
        for key, text in zip(_keys(body), texts, strict=True):
            known = self._texts.get(key, text)
            assert known.startswith(text) or not self._same_texts, "what was said before the end was right"
        return ended


WEIGHTS = (6, 4, 4, 2, 1, 1)


def _keys(body: dict) -> list[tuple]:
    return [(body["prompt"], body["seed"] + i, body["max_tokens"], str(body["stop"])) for i in range(body["n"])]


def _failed(answer: dict, n: int) -> Ended:
    code = answer["error"]["code"]
    if code in UNCOUNTED:
        return Ended(code, 0, 0)
    return Ended(code, 0 if code == "queue_full" else n, n)


async def _events(response: httpx.Response) -> AsyncIterator[dict]:
    """The events of a stream; an error or [DONE] is the last of them."""
    ended = False
    async for line in response.aiter_lines():
        if not line.startswith("data: "):
            continue
        assert not ended, f"nothing follows the end of a stream, but {line}"
        if line == "data: [DONE]":
            ended = True
            continue
        event = json.loads(line.removeprefix("data: "))
        yield event
    assert ended, "a stream ends with an error or [DONE]"


async def storm(house: House, rng: random.Random, requests: int, kills: Sequence[str], same_texts: bool) -> list[Ended]:
    """Requests from sixteen clients at once, until all kills have been made good and there were enough of them."""
    client, ended = Client(house.url, rng, same_texts), []

    async def player(killing: asyncio.Task[None]) -> None:
        while len(ended) < requests or not killing.done():
            ended.append(await client.play())
            if ended[-1].how == "loading":
                await asyncio.sleep(0.2)

    async def killer() -> None:
        for role in kills:
            await asyncio.sleep(rng.uniform(0.2, 0.8))
            await asyncio.to_thread(kill_and_see_it_replaced, house, role, rng)

    try:
        async with asyncio.TaskGroup() as group:
            killing = group.create_task(killer())
            for _ in range(16):
                group.create_task(player(killing))
    finally:
        await client.close()
    return ended


def kill_and_see_it_replaced(house: House, role: str, rng: random.Random) -> None:
    generation = house.members("scheduler") + house.members("detokenizer")
    victim = rng.choice(house.members(role))
    victim.kill()
    gone = [victim] if role == "gateway" else generation
    eventually(f"{role} is replaced", lambda: is_whole(house) and not any(old in house.family() for old in gone))
    house.wait_ready()


def is_whole(house: House) -> bool:
    return [len(house.members(role)) for role in ("gateway", "scheduler", "detokenizer")] == [GATEWAYS, 1, 1]


def is_idle(house: House) -> bool:
    numbers = house.metrics()
    busy = ("requests_running", "requests_waiting", "kv_tokens_active")
    free, cached, capacity = (numbers[f"tokenllm_kv_tokens_{name}"] for name in ("free", "cached", "capacity"))
    return not any(numbers[f"tokenllm_{name}"] for name in busy) and free + cached == capacity


def descriptors(house: House) -> tuple[int, int]:
    """Of the supervisor, and of the gateways, which have connections besides."""
    return house.ps.num_fds(), sum(gateway.num_fds() for gateway in house.members("gateway"))


@pytest.fixture(scope="module")
def house(start_once: Callable[..., House]) -> Iterator[House]:
    house = start_once(max_total_tokens=CAPACITY, gateway_processes=GATEWAYS).wait_greeted()
    supervisors, gateways = descriptors(house)
    yield house
    eventually("no connection is left over", lambda: descriptors(house)[1] <= gateways)
    assert descriptors(house)[0] == supervisors


def check_a_storm(house: House, seed: int, requests: int, kills: Sequence[str] = (), same_texts: bool = True) -> None:
    rng = random.Random(seed)
    eventually("idleness", lambda: is_idle(house))
    before = house.metrics()

    ended = asyncio.run(storm(house, rng, requests, kills, same_texts))

    eventually("all tokens are free again", lambda: is_idle(house), within_s=5)
    after = house.metrics()
    counted = sum(after[name] - before[name] for name in after if name.startswith(FINISHED))
    ways = Counter(one.how for one in ended)
    assert sum(one.least for one in ended) <= counted <= sum(one.most for one in ended), ways
    if "scheduler" in kills or "detokenizer" in kills:
        assert ways["error event"] or ways["engine_error"], ways
    if not kills:
        assert ways.keys() <= {"complete", "left", "vanished", "invalid", "context_length_exceeded", "whole"}
    assert after[RESTARTS] - before[RESTARTS] == len(kills)
    mapped = {line.path for process in house.family() for line in process.memory_maps()}
    assert not [path for path in mapped if path.startswith("/dev/shm/")], "no name that a death could leave there"
    eventually("no process is left over", lambda: len(house.family()) == GATEWAYS + 2)


FINISHED, RESTARTS = "tokenllm_requests_finished_total", "tokenllm_restarts_total"
ROLES = ("scheduler", "detokenizer", "gateway")


def test_every_request_ends_once_without_kills(house: House) -> None:
    check_a_storm(house, seed=1, requests=200)


@pytest.mark.parametrize("seed", [2, 3])
def test_every_request_ends_once_with_kills(house: House, seed: int) -> None:
    kills = list(ROLES)
    random.Random(seed).shuffle(kills)
    check_a_storm(house, seed, requests=300, kills=kills)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 120))
def test_every_request_ends_once_in_a_long_storm(house: House, seed: int) -> None:
    kills = random.Random(seed).choices(ROLES, k=6)
    check_a_storm(house, seed, requests=600, kills=kills)


@pytest.fixture(scope="module")
def real_house(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    flags = ["--port", "0", "--served-model-name", "tiny", "--gateway-processes", str(GATEWAYS)]
    log = tmp_path_factory.mktemp("real") / "log"
    house = House([*REAL, str(default_model), *flags, "--max-total-tokens", "4096"], log)
    try:
        yield house.wait_greeted()
    finally:
        house.raze()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_every_request_ends_once_with_the_real_model(real_house: House, seed: int) -> None:
    """A kill of any process while the model generates."""
    kill = random.Random(seed).choice(ROLES)
    check_a_storm(real_house, seed, requests=40, kills=[kill], same_texts=False)
