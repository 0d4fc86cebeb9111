"""Readers that cost next to nothing: they send bytes that were made before, and count what comes without parsing it.

An event is a `data:`, and a token a space that does not follow one. So tokens are only counted where the server says
words with one space each, and nothing else in its events holds one.
"""

import select
import socket
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Literal, TypeAlias

import msgspec
import numpy as np

Column: TypeAlias = Literal["events", "tokens", "bytes"]

MARK = b"data:"
ENDINGS = b"0\r\n\r\n", b"}"  # of a stream, and of a JSON answer
READ_BYTES = 1 << 18
SAMPLE_S = 0.05
PATIENCE_S = 60.0


class RawError(Exception):
    """The server did not answer as it should."""


class Counts(msgspec.Struct):
    """What a reader had seen at some times."""

    at_s: list[float] = []  # time.monotonic(), the same clock in all processes
    events: list[int] = []
    tokens: list[int] = []
    bytes: list[int] = []

    def note(self, events: int, spaces: int, size: int) -> None:
        self.at_s.append(time.monotonic())
        self.events.append(events)
        self.tokens.append(spaces - events)
        self.bytes.append(size)

    def between(self, column: Column, start_s: float, end_s: float) -> float:
        """How much came between two times."""
        start, end = np.interp([start_s, end_s], self.at_s, getattr(self, column))
        return float(end - start)


def http_request(method: str, path: str, body: object = None) -> bytes:
    data = msgspec.json.encode(body) if body is not None else b""
    lines = f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n"
    return lines.encode() + b"\r\n" + data


def connect(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def check_status(answer: bytes) -> None:
    if not answer.startswith(b"HTTP/1.1 200 "):
        raise RawError(answer[:500].decode(errors="replace"))


class _Stream:
    """One answer that is being read."""

    def __init__(self, port: int, request: bytes) -> None:
        self.socket = connect(port)
        self.socket.sendall(request)
        self.ended = False
        self._head = b""
        self._in_body = False
        self._end = b""  # of what came last: a mark may begin there

    def read(self) -> tuple[int, int, int]:
        """Events, spaces and bytes that are new."""
        data = self.socket.recv(READ_BYTES)
        self.ended = not data or data.endswith(ENDINGS[0])
        if not self._in_body:
            data = self._body_of(data)
        marked = self._end + data
        self._end = marked[1 - len(MARK) :]
        return marked.count(MARK), data.count(b" "), len(data)

    def _body_of(self, data: bytes) -> bytes:
        self._head, self._in_body, body = (self._head + data).partition(b"\r\n\r\n")
        if self._in_body:
            check_status(self._head)
        return body


def read_streams(port: int, request: bytes, streams: int, until_s: float) -> Counts:
    """Ask so many times at once, and read until all is said or the time has come."""
    waiting = {stream.socket.fileno(): stream for stream in (_Stream(port, request) for _ in range(streams))}
    poller = select.epoll()
    for fd in waiting:
        poller.register(fd, select.EPOLLIN)
    counts, events, spaces, size, due = Counts(), 0, 0, 0, 0.0
    while waiting and (now := time.monotonic()) < until_s:
        if now >= due:
            counts.note(events, spaces, size)
            due = now + SAMPLE_S
        for fd, _ in poller.poll(SAMPLE_S):
            new_events, new_spaces, new_bytes = waiting[fd].read()
            events, spaces, size = events + new_events, spaces + new_spaces, size + new_bytes
            if waiting[fd].ended:
                poller.unregister(fd)
                waiting.pop(fd).socket.close()
    counts.note(events, spaces, size)
    for stream in waiting.values():
        stream.socket.close()
    return counts


def time_answers(port: int, request: bytes, until_s: float, pause_s: float = 0.0) -> list[float]:
    """Ask again and again on one connection; how long each first byte after the head took, in seconds."""
    taken, connection = [], connect(port)
    while (sent := time.monotonic()) < until_s:
        connection.sendall(request)
        answer = _more(connection)
        while not answer.partition(b"\r\n\r\n")[2]:
            answer += _more(connection)
        taken.append(time.monotonic() - sent)
        check_status(answer)
        while not answer.endswith(ENDINGS):
            answer += _more(connection)
        if b"connection: close" in answer:  # servers let go of a connection after so many requests
            connection.close()
            connection = connect(port)
        time.sleep(pause_s)
    connection.close()
    return taken


def _more(connection: socket.socket) -> bytes:
    if data := connection.recv(READ_BYTES):
        return data
    raise RawError("the connection ended in the middle of an answer")


class Readers:
    """Processes that are there before anything is measured. A context manager."""

    def __init__(self, processes: int) -> None:
        spawn = get_context("spawn")
        self._processes = processes
        self._pool = ProcessPoolExecutor(processes, spawn, spawn.Barrier(processes).wait)

    def __enter__(self) -> "Readers":
        for waiting in [self._pool.submit(time.monotonic) for _ in range(self._processes)]:
            waiting.result(PATIENCE_S)
        return self

    def __exit__(self, *raised: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def streams(self, port: int, request: bytes, streams: int, until_s: float) -> "list[Future[Counts]]":
        """The streams, shared out evenly."""
        every = self._processes
        shares = [streams // every + (first < streams % every) for first in range(every)]
        return [self._pool.submit(read_streams, port, request, share, until_s) for share in shares if share]

    def times(self, port: int, request: bytes, until_s: float, pause_s: float = 0.0) -> "Future[list[float]]":
        return self._pool.submit(time_answers, port, request, until_s, pause_s)


def total(parts: Sequence[Counts], column: Column, start_s: float, end_s: float) -> float:
    return sum(part.between(column, start_s, end_s) for part in parts)
