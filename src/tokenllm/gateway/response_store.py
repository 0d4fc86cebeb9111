"""What `/v1/responses` remembers: each answer and what it was an answer to, until its time or the room is over.

One SQLite file is shared by all gateways of a server; the supervisor makes it before they start and removes it at the
end. Bounded in age, rows and bytes: the oldest go first. A stored response belongs to the tenant that made it.
"""

import asyncio
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

Result = TypeVar("Result")

PATIENCE_S = 5.0  # for the other gateways' writes
SCHEMA = """
PRAGMA journal_mode = WAL;
CREATE TABLE responses (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    made_s REAL NOT NULL,
    answer BLOB NOT NULL,
    items BLOB NOT NULL
);
CREATE INDEX by_age ON responses (made_s);
CREATE TABLE held (count INTEGER NOT NULL, bytes INTEGER NOT NULL);
INSERT INTO held VALUES (0, 0);
CREATE TRIGGER comes AFTER INSERT ON responses BEGIN
    UPDATE held SET count = count + 1, bytes = bytes + length(new.answer) + length(new.items);
END;
CREATE TRIGGER goes AFTER DELETE ON responses BEGIN
    UPDATE held SET count = count - 1, bytes = bytes - length(old.answer) - length(old.items);
END;
"""
OLDEST = "DELETE FROM responses WHERE number = (SELECT min(number) FROM responses)"


class Bounds(NamedTuple):
    age_s: float = 24 * 3600.0
    rows: int = 10_000
    bytes: int = 256 * 2**20
    row_bytes: int = 8 * 2**20


BOUNDS = Bounds()


class Stored(NamedTuple):
    """One response, as JSON."""

    answer: bytes  # the response object
    items: bytes  # all that it was an answer to: a list, which begins with what earlier responses were about


def create_store(path: Path) -> None:
    """An empty file for the gateways to share."""
    connection = sqlite3.connect(path)
    connection.executescript(SCHEMA)
    connection.close()


class ResponseStore:
    """One process's door to the file. Everything runs in a thread of its own: others may be writing."""

    def __init__(self, path: Path, bounds: Bounds = BOUNDS, clock: Callable[[], float] = time.monotonic) -> None:
        self._bounds = bounds
        self._clock = clock  # the same for all processes of a machine
        self._thread = ThreadPoolExecutor(1, "responses")
        uri = f"{path.resolve().as_uri()}?mode=rw"  # a file that is not there is a mistake, not an empty store
        self._file = sqlite3.connect(uri, uri=True, timeout=PATIENCE_S, isolation_level=None, check_same_thread=False)
        self._file.execute("PRAGMA synchronous = OFF")  # nothing in it outlives the server

    async def keep(self, id: str, tenant: str, stored: Stored) -> bool:
        """Whether there was room for it: a larger one is not kept, and none is while the disk is full."""
        return await self._aside(lambda: self._keep(id, tenant, stored))

    async def find(self, id: str, tenant: str) -> Stored | None:
        return await self._aside(lambda: self._find(id, tenant))

    async def forget(self, id: str, tenant: str) -> bool:
        """Whether it was there."""
        return await self._aside(lambda: self._forget(id, tenant))

    def close(self) -> None:
        self._thread.shutdown()
        self._file.close()

    async def _aside(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _keep(self, id: str, tenant: str, stored: Stored) -> bool:
        if len(stored.answer) + len(stored.items) > min(self._bounds.row_bytes, self._bounds.bytes):
            return False
        try:
            with self._transaction():
                self._forget_the_aged()
                self._file.execute(
                    "INSERT INTO responses (id, tenant, made_s, answer, items) VALUES (?, ?, ?, ?, ?)",
                    (id, tenant, self._clock(), *stored),
                )
                while self._is_too_full():
                    self._file.execute(OLDEST)
        except sqlite3.OperationalError as error:
            print(f"gateway: a response could not be stored: {error}", file=sys.stderr)
            return False
        return True

    def _find(self, id: str, tenant: str) -> Stored | None:
        row = self._file.execute(
            "SELECT answer, items FROM responses WHERE id = ? AND tenant = ? AND made_s > ?",
            (id, tenant, self._youngest_aged_s()),
        ).fetchone()
        return Stored(*row) if row else None

    def _forget(self, id: str, tenant: str) -> bool:
        with self._transaction():
            self._forget_the_aged()
            deleted = self._file.execute("DELETE FROM responses WHERE id = ? AND tenant = ?", (id, tenant))
        return deleted.rowcount > 0

    def _forget_the_aged(self) -> None:
        self._file.execute("DELETE FROM responses WHERE made_s <= ?", (self._youngest_aged_s(),))

    def _youngest_aged_s(self) -> float:
        return self._clock() - self._bounds.age_s

    def _is_too_full(self) -> bool:
        count, size = self._file.execute("SELECT count, bytes FROM held").fetchone()
        return count > self._bounds.rows or size > self._bounds.bytes

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._file.execute("BEGIN IMMEDIATE")
        with self._file:  # commits, or rolls back
            yield
