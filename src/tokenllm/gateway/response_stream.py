"""A response as a stream tells it: numbered events without a [DONE], and stored before its last one."""

from collections.abc import Awaitable, Callable, Sequence

from tokenllm.gateway.reply import Said, joined
from tokenllm.gateway.response_wording import ResponseFrames
from tokenllm.gateway.sse import KEEP_ALIVE
from tokenllm.messages import Delta
from tokenllm_schemas.errors import ApiError
from tokenllm_schemas.response_object import Response


class ResponseStory:
    """`finish` makes the response of what was said."""

    silence = KEEP_ALIVE

    def __init__(self, frames: ResponseFrames, finish: Callable[[Said], Awaitable[Response]]) -> None:
        self._frames = frames
        self._finish = finish
        self._deltas: list[tuple[int, Delta]] = []

    def opening(self) -> bytes:
        return self._frames.opening()

    def told(self, deltas: Sequence[tuple[int, Delta]]) -> bytes:
        self._deltas += deltas
        return b"".join(self._frames.text(one.text, one.logprobs) for one in joined(deltas) if one.text or one.logprobs)

    def failure(self, error: ApiError) -> bytes:
        return self._frames.failure(error)

    async def closing(self) -> bytes:
        [said] = joined(self._deltas)
        return self._frames.closing(await self._finish(said))
