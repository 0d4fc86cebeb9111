"""`tokenllm serve` as a child process, from its start until it answers."""

import asyncio
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loadgen.client import Answered, Server, Streams, find_model, run_load
from loadgen.processes import Child, free_port
from loadgen.workload import IdsPrompt

START_LIMIT_S = 480.0


@dataclass(frozen=True)
class Served:
    base_url: str
    ready_s: float  # from the start of the process
    first_answer_s: float


@contextmanager
def served(folder: Path, flags: Sequence[str], log: Path) -> Iterator[Served]:
    """A server of the model folder, stopped at the end; it has answered one request."""
    port = free_port()
    command = [sys.executable, "-m", "tokenllm", "serve", str(folder), "--port", str(port), *flags]
    root = f"http://127.0.0.1:{port}"
    with Child(command, log) as child:
        ready_s = child.wait_until_ready(f"{root}/health/ready", START_LIMIT_S)
        answer = asyncio.run(_ask(f"{root}/v1"))
        yield Served(f"{root}/v1", ready_s, ready_s + answer.ttft_s)


async def _ask(base_url: str) -> Answered:
    server = Server(base_url, await find_model(base_url, ""))
    (outcome,) = await run_load(server, [IdsPrompt(list(range(100, 132)), 8)], Streams(1))
    if not isinstance(outcome, Answered):
        raise SystemExit(f"the first request failed: {outcome.error}")
    return outcome
