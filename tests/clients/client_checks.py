"""What the scripts of all Python clients share: where the server is, how a script tells of its checks, and how it sees
that the server has let go of a stream. Nothing but the standard library: it runs in every client's environment."""

import asyncio
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

SERVER, API_KEY = sys.argv[1:]
BASE_URL = f"{SERVER}/v1"
MODEL = "smollm2-135m-instruct"
QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
ENDLESS = "Write a very long story about the sea, with many chapters."
TOO_HOT = (400, "temperature: input should be less than or equal to 2 (got 5")
NO_SUCH_MODEL = (404, "the model 'nobody' does not exist")
FREED_WITHIN_S = 5
RUNNING, ACTIVE = "tokenllm_requests_running", "tokenllm_kv_tokens_active"
ABORTED = 'tokenllm_requests_finished_total{reason="abort"}'


def run(*checks: Callable[[], Awaitable[None] | None]) -> None:
    """One after the other. Those that passed are told by name; one that fails ends the script with its traceback."""
    asyncio.run(_run(checks))


@contextmanager
def aborting() -> Iterator[None]:
    """Around a stream that its reader leaves: soon after, the server has noticed, and nothing is held for anybody."""
    before = _metrics()[ABORTED]
    yield
    _wait_until_freed(before)


@asynccontextmanager
async def async_aborting() -> AsyncIterator[None]:
    """The same, while the loop goes on: some clients close their connection in a task of its own."""
    before = _metrics()[ABORTED]
    yield
    await asyncio.to_thread(_wait_until_freed, before)


@contextmanager
def refusal(kind: type[Exception], status: int, words: str) -> Iterator[None]:
    """Around a request that the server refuses: the client raises just this, and tells the server's words."""
    try:
        yield
    except kind as error:
        assert getattr(error, "status_code", None) == status, repr(error)
        assert words in str(error), repr(error)
    else:
        raise AssertionError(f"no {kind.__name__}")


def near(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two vectors are the same, but for rounding."""
    return all(abs(x - y) < 1e-3 for x, y in zip(one, other, strict=True))


async def _run(checks: Sequence[Callable[[], Awaitable[None] | None]]) -> None:
    for check in checks:
        if pending := check():
            await pending
        print(check.__name__, flush=True)


def _wait_until_freed(before: float) -> None:
    deadline = time.monotonic() + FREED_WITHIN_S
    while (now := _metrics())[ABORTED] != before + 1 or now[RUNNING] or now[ACTIVE]:
        assert time.monotonic() < deadline, f"{now[ABORTED] - before} aborted, {now[RUNNING]} run, {now[ACTIVE]} tokens"
        time.sleep(0.02)


def _metrics() -> dict[str, float]:
    request = urllib.request.Request(f"{SERVER}/metrics", headers={"authorization": f"Bearer {API_KEY}"})
    with urllib.request.urlopen(request, timeout=5) as response:
        lines = response.read().decode().splitlines()
    pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}
