"""How fast messages cross from one process to another: the ring, a multiprocessing queue and a pipe, in turn.

Each measurement sends 200-byte messages to a new process: paced ones for the latency, then as many as go through. It
prints a table, and leaves the numbers and a plot in `load_tests/results/`.
"""

import argparse
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.queues import Queue
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tokenllm.ring import Receiver, RingFds, RingFull, Sender, close_ring, create_ring

RESULTS = Path(__file__).parent / "results"
MESSAGE_BYTES, RING_BYTES = 200, 1 << 20
PACED_MESSAGES, PACE_S = 500, 0.001


class Message(msgspec.Struct, frozen=True, array_like=True):
    sent_ns: int
    filling: bytes


class Measurement(msgspec.Struct, frozen=True):
    """One round of one transport."""

    transport: str
    consumer: str
    p50_us: float
    p99_us: float
    messages_per_s: float


Send: TypeAlias = Callable[[Message], None]
CASES = [(transport, consumer) for consumer in ("sleeps", "polls") for transport in ("ring", "queue", "pipe")]
FILLING = bytes(MESSAGE_BYTES - len(msgspec.msgpack.encode(Message(time.monotonic_ns(), bytes(100)))) + 100)
encode, decode = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder(Message).decode


def measure(transport: str, consumer: str, messages: int) -> Measurement:
    """Send to a new process and let it report."""
    context = multiprocessing.get_context("spawn")
    report, reporter = context.Pipe(duplex=False)
    send, end, close = OPEN[transport]()
    arguments = (transport, consumer == "polls", end, reporter, messages)
    process = context.Process(target=consume, args=arguments, daemon=True)
    process.start()
    report.recv_bytes()  # it is there
    for _ in range(PACED_MESSAGES):
        time.sleep(PACE_S)
        send(Message(time.monotonic_ns(), FILLING))
    latencies_us = msgspec.msgpack.decode(report.recv_bytes(), type=list[float])
    began_ns = time.monotonic_ns()
    for _ in range(messages):
        send(Message(began_ns, FILLING))
    seconds = msgspec.msgpack.decode(report.recv_bytes(), type=float)
    process.join()
    close()
    shares = statistics.quantiles(latencies_us, n=100)
    return Measurement(transport, consumer, shares[49], shares[98], messages / seconds)


def consume(transport: str, polls: bool, end: Any, reporter: Connection, messages: int) -> None:
    """The other process: the latencies of the paced messages, then the seconds that the flood took."""
    source = ARRIVALS[transport](end, polls)
    reporter.send_bytes(b"there")
    latencies_us = [(time.monotonic_ns() - message.sent_ns) / 1e3 for message in islice(source, PACED_MESSAGES)]
    reporter.send_bytes(encode(latencies_us))
    last = next(islice(source, messages - 1, None))
    reporter.send_bytes(encode((time.monotonic_ns() - last.sent_ns) / 1e9))


def open_ring() -> tuple[Send, Any, Callable[[], None]]:
    fds = create_ring(RING_BYTES)
    sender = Sender[Message](fds)

    def send(message: Message) -> None:
        while True:
            try:
                return sender.send(message)
            except RingFull:
                time.sleep(0)

    return send, (DupFd(fds.memory), DupFd(fds.bell)), lambda: close_ring(fds)


def ring_arrivals(end: tuple[Any, Any], polls: bool) -> Iterator[Message]:
    memory, bell = end
    receiver = Receiver[Message](RingFds(memory.detach(), bell.detach()), Message)
    while True:
        while polls and not receiver.waiting:
            pass
        if not polls:
            receiver.sleep(None)
        yield from receiver.receive()


def open_queue() -> tuple[Send, Any, Callable[[], None]]:
    queue = multiprocessing.get_context("spawn").Queue()
    return lambda message: queue.put(encode(message)), queue, queue.close


def queue_arrivals(end: "Queue[bytes]", polls: bool) -> Iterator[Message]:
    while True:
        while polls and end.empty():
            pass
        yield decode(end.get())


def open_pipe() -> tuple[Send, Any, Callable[[], None]]:
    readable, writable = multiprocessing.get_context("spawn").Pipe(duplex=False)
    return lambda message: writable.send_bytes(encode(message)), readable, writable.close


def pipe_arrivals(end: Connection, polls: bool) -> Iterator[Message]:
    while True:
        while polls and not end.poll(0):
            pass
        yield decode(end.recv_bytes())


OPEN = {"ring": open_ring, "queue": open_queue, "pipe": open_pipe}
ARRIVALS: dict[str, Callable[[Any, bool], Iterator[Message]]] = {
    "ring": ring_arrivals,
    "queue": queue_arrivals,
    "pipe": pipe_arrivals,
}


def of_case(measurements: list[Measurement], case: tuple[str, str], number: str) -> list[float]:
    return [getattr(found, number) for found in measurements if (found.transport, found.consumer) == case]


def print_table(measurements: list[Measurement], rounds: int) -> None:
    table = Table(title=f"{MESSAGE_BYTES}-byte messages between two processes, median (best) of {rounds} rounds")
    for column in ("transport", "consumer", "messages/s", "one way p50 µs", "p99 µs"):
        table.add_column(column, justify="left" if column in ("transport", "consumer") else "right")
    for case in CASES:
        rate, p50, p99 = (of_case(measurements, case, number) for number in ("messages_per_s", "p50_us", "p99_us"))
        table.add_row(
            *case,
            f"{statistics.median(rate):,.0f} ({max(rate):,.0f})",
            f"{statistics.median(p50):.0f} ({min(p50):.0f})",
            f"{statistics.median(p99):.0f} ({min(p99):.0f})",
        )
    Console().print(table)


def save_plot(measurements: list[Measurement]) -> None:
    from matplotlib.figure import Figure  # here, since each measured process imports this file and needs none of it

    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    titles = {"messages_per_s": "messages per second", "p50_us": "one way, p50, µs", "p99_us": "one way, p99, µs"}
    for panel, (number, title) in zip(panels, titles.items(), strict=True):
        panel.boxplot([of_case(measurements, case, number) for case in CASES])
        panel.set_xticks(range(1, 1 + len(CASES)), [f"{transport}\n{consumer}" for transport, consumer in CASES])
        panel.set(title=title, yscale="log")
    figure.savefig(RESULTS / "ring_bench.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="all cases are measured in turn, so many times")
    parser.add_argument("--messages", type=int, default=50_000, help="in one flood")
    options = parser.parse_args()
    turns = [case for _ in range(options.rounds) for case in CASES]
    measurements = [measure(*case, options.messages) for case in track(turns, description="measuring")]
    print_table(measurements, options.rounds)
    RESULTS.mkdir(exist_ok=True)
    machine = {"machine": platform.platform(), "python": platform.python_version()}
    (RESULTS / "ring_bench.json").write_bytes(msgspec.json.encode({**machine, "measurements": measurements}))
    save_plot(measurements)
    Console().print(f"numbers and plot: {RESULTS}/ring_bench.json, {RESULTS}/ring_bench.png")


if __name__ == "__main__":
    main()
