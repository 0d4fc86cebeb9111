"""A store of responses is a bounded map with a time limit, whichever gateway asks."""

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tokenllm.gateway.response_store import Bounds, ResponseStore, Stored, create_store

SMALL = Bounds(age_s=10.0, rows=4, bytes=100, row_bytes=60)
IDS = st.sampled_from([f"resp_{number}" for number in range(8)])
TENANTS = st.sampled_from(["", "one", "another"])
GATEWAYS = st.integers(0, 1)


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class TwoGatewaysOneStore(RuleBasedStateMachine):
    """Against a list of what was kept, in order."""

    folders: Iterator[Path]

    def __init__(self) -> None:
        super().__init__()
        self.path = next(self.folders) / "responses"
        create_store(self.path)
        self.clock = Clock()
        self.doors = [ResponseStore(self.path, SMALL, self.clock) for _ in range(2)]
        self.kept: list[tuple[str, str, float, Stored]] = []

    def teardown(self) -> None:
        for door in self.doors:
            door.close()

    def living(self) -> list[tuple[str, str, float, Stored]]:
        return [one for one in self.kept if self.clock.now_s < one[2] + SMALL.age_s]

    @rule(gateway=GATEWAYS, tenant=TENANTS, answer=st.binary(max_size=50), items=st.binary(max_size=50))
    def keep(self, gateway: int, tenant: str, answer: bytes, items: bytes) -> None:
        id = f"resp_{len(self.kept) % 8}"
        if any(one[0] == id for one in self.living()):
            return
        stored = Stored(answer, items)
        fits = asyncio.run(self.doors[gateway].keep(id, tenant, stored))
        assert fits == (len(answer) + len(items) <= SMALL.row_bytes)
        if fits:
            self.kept = [*self.living(), (id, tenant, self.clock.now_s, stored)][-SMALL.rows :]
            while sum(len(one[3].answer) + len(one[3].items) for one in self.kept) > SMALL.bytes:
                self.kept.pop(0)

    @rule(gateway=GATEWAYS, id=IDS, tenant=TENANTS)
    def find(self, gateway: int, id: str, tenant: str) -> None:
        expected = [one[3] for one in self.living() if one[:2] == (id, tenant)]
        assert asyncio.run(self.doors[gateway].find(id, tenant)) == (expected[0] if expected else None)

    @precondition(lambda self: self.kept)
    @rule(gateway=GATEWAYS, data=st.data())
    def find_one_that_was_kept(self, gateway: int, data: st.DataObject) -> None:
        id, tenant, _, _ = data.draw(st.sampled_from(self.kept))
        self.find(gateway, id, tenant)

    @rule(gateway=GATEWAYS, id=IDS, tenant=TENANTS)
    def forget(self, gateway: int, id: str, tenant: str) -> None:
        there = any(one[:2] == (id, tenant) for one in self.living())
        assert asyncio.run(self.doors[gateway].forget(id, tenant)) == there
        self.kept = [one for one in self.living() if one[:2] != (id, tenant)]

    @rule(seconds=st.sampled_from([0.5, 4.0, 10.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now_s += seconds

    @invariant()
    def is_within_its_bounds(self) -> None:
        file = sqlite3.connect(self.path)
        count, size = file.execute("SELECT count(*), total(length(answer) + length(items)) FROM responses").fetchone()
        assert file.execute("SELECT * FROM held").fetchone() == (count, size)
        file.close()
        assert count <= SMALL.rows and size <= SMALL.bytes


def test_a_bounded_map(tmp_path_factory: pytest.TempPathFactory) -> None:
    TwoGatewaysOneStore.folders = iter(lambda: tmp_path_factory.mktemp("store"), None)
    machine = TwoGatewaysOneStore.TestCase
    machine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
    machine("runTest").runTest()


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Callable[..., ResponseStore]]:
    create_store(tmp_path / "responses")
    opened: list[ResponseStore] = []

    def open_one() -> ResponseStore:
        opened.append(ResponseStore(tmp_path / "responses"))
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


def test_gateways_that_write_at_the_same_time_all_succeed(door: Callable[[], ResponseStore]) -> None:
    doors = [door() for _ in range(4)]

    async def write_all() -> list[bool]:
        stored = Stored(b"{}", b"[]")
        return await asyncio.gather(*(doors[i % 4].keep(f"resp_{i}", "", stored) for i in range(200)))

    assert all(asyncio.run(write_all()))
    assert asyncio.run(doors[3].find("resp_0", "")) == Stored(b"{}", b"[]")


def test_a_store_that_nobody_made_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(sqlite3.OperationalError):
        ResponseStore(tmp_path / "nothing")


def test_a_response_that_cannot_be_written_is_not_kept(
    door: Callable[[], ResponseStore], capsys: pytest.CaptureFixture[str]
) -> None:
    store = door()
    store._file.execute("PRAGMA query_only = ON")
    assert not asyncio.run(store.keep("resp_1", "", Stored(b"{}", b"[]")))
    assert "could not be stored" in capsys.readouterr().err
    assert asyncio.run(store.find("resp_1", "")) is None


def test_a_response_is_there_until_its_time_is_over(tmp_path: Path) -> None:
    create_store(tmp_path / "responses")
    clock = Clock()
    store = ResponseStore(tmp_path / "responses", SMALL, clock)
    stored = Stored(b"{}", b"[]")
    asyncio.run(store.keep("resp_1", "", stored))
    clock.now_s += SMALL.age_s - 0.001
    assert asyncio.run(store.find("resp_1", "")) == stored
    clock.now_s += 0.001
    assert asyncio.run(store.find("resp_1", "")) is None
    asyncio.run(store.keep("resp_2", "", stored))
    assert store._file.execute("SELECT id FROM responses").fetchall() == [("resp_2",)]
    store.close()
