"""What the gateway is measured against: an ASGI application that writes one event again and again, one a send, on the
same HTTP server.

`bare.py PORT EVENT PACE` answers /N with streams that write PACE events a second, N of them together. All write at the
same times, as they do where every step of a model has a token for each. Without a pace a reader that falls behind
would make it look quicker, since what the kernel does not take at once is joined.
"""

import asyncio
import sys

from hypercorn.asyncio import serve
from hypercorn.config import Config
from starlette.types import Receive, Scope, Send

HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8")]


class Bare:
    def __init__(self, event: bytes, pace: float) -> None:
        self._event = event
        self._pace = pace
        self._step = asyncio.Event()

    async def beat(self) -> None:
        """Wake all streams at every step."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            due = max(due + 1 / self._pace, loop.time())
            await asyncio.sleep(due - loop.time())
            self._step.set()
            self._step = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        together = int(scope["path"].strip("/"))
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        while True:
            for _ in range(together):
                await self._step.wait()
            for _ in range(together):
                await send({"type": "http.response.body", "body": self._event, "more_body": True})


async def main() -> None:
    config = Config()
    config.bind = [f"127.0.0.1:{sys.argv[1]}"]
    config.loglevel = "WARNING"
    app = Bare(sys.argv[2].encode(), float(sys.argv[3]))
    beating = asyncio.create_task(app.beat())
    await serve(app, config, shutdown_trigger=asyncio.Event().wait)  # type: ignore[arg-type]
    beating.cancel()


if __name__ == "__main__":
    asyncio.run(main())
