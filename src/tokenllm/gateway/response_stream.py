"""A response that is written while it comes to be: numbered events without a [DONE], and stored before its last one."""

from collections.abc import Awaitable, Callable, Sequence

from starlette.types import Receive, Scope, Send

from tokenllm.gateway.circuit import Circuit
from tokenllm.gateway.patience import patience_of
from tokenllm.gateway.reply import Reply, Said, joined
from tokenllm.gateway.response_wording import ResponseFrames
from tokenllm.gateway.sse import HEADERS, KEEP_ALIVE, SILENCE_S
from tokenllm.messages import Submit
from tokenllm_schemas.errors import ApiError
from tokenllm_schemas.response_object import Response


class ResponseStream:
    """An ASGI application; `finish` makes the response of what was said."""

    def __init__(
        self, circuit: Circuit, submit: Submit, frames: ResponseFrames, finish: Callable[[Said], Awaitable[Response]]
    ) -> None:
        self._circuit = circuit
        self._submit = submit
        self._frames = frames
        self._finish = finish
        self._said: list[Said] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = self._circuit.submit([self._submit], patience_of(scope))
        try:
            # a refusal that comes before anything else is a proper status, so the headers wait for it
            first = joined(await reply.deltas(SILENCE_S))
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            ending = await self._follow(reply, self._frames.opening() + self._told(first), send)
            await send({"type": "http.response.body", "body": ending, "more_body": False})
        finally:
            self._circuit.abandon(reply)

    async def _follow(self, reply: Reply, piece: bytes, send: Send) -> bytes:
        """Write piece after piece; the last is left to be written with the end of the stream."""
        try:
            while reply.open:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                if piece is not KEEP_ALIVE:
                    reply.written()
                said = joined(await reply.deltas(SILENCE_S))
                piece = self._told(said) if said else KEEP_ALIVE
        except ApiError as error:
            return self._frames.failure(error)
        return piece + self._frames.closing(await self._finish(self._whole()))

    def _told(self, said: Sequence[Said]) -> bytes:
        self._said += said
        return b"".join(self._frames.text(one.text, one.logprobs) for one in said if one.text or one.logprobs)

    def _whole(self) -> Said:
        logprobs = tuple(logprob for said in self._said for logprob in said.logprobs)
        return Said(0, "".join(said.text for said in self._said), logprobs, self._said[-1].finish)
