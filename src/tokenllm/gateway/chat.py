"""How `/v1/chat/completions` words its answers: role chunk, deltas, an empty delta with the reason, usage."""

from collections.abc import Sequence

import msgspec
from msgspec import UNSET

from tokenllm.gateway.reply import Head, Said, client_reason
from tokenllm.gateway.sse import HOLE, ChunkForm, event
from tokenllm.messages import TokenText
from tokenllm_schemas.responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatTokenLogprob,
    FinishReason,
    Message,
    TopLogprob,
    Usage,
    floored,
)


class ChatFrames:
    """The events of one chat stream."""

    def __init__(self, head: Head, choices: int, usage_wanted: bool) -> None:
        self._head = head
        self._choices = choices
        self._no_usage = None if usage_wanted else UNSET  # present in every chunk, if wanted
        delta = ChatDelta(content=HOLE)
        self._forms = [ChunkForm(self._chunk(ChatChunkChoice(i, delta, logprobs=HOLE))) for i in range(choices)]

    def opening(self) -> bytes:
        delta = ChatDelta(role="assistant", content="")
        return b"".join(self._event(ChatChunkChoice(i, delta)) for i in range(self._choices))

    def text(self, index: int, text: str, logprobs: Sequence[TokenText]) -> bytes:
        return self._forms[index].fill(text, chat_logprobs(logprobs) if logprobs else None)

    def finish(self, index: int, reason: FinishReason) -> bytes:
        return self._event(ChatChunkChoice(index, ChatDelta(), finish_reason=reason))

    def usage(self, usage: Usage) -> bytes:
        return event(msgspec.json.encode(ChatChunk(**self._head._asdict(), choices=[], usage=usage)))

    def _event(self, choice: ChatChunkChoice) -> bytes:
        return event(msgspec.json.encode(self._chunk(choice)))

    def _chunk(self, choice: ChatChunkChoice) -> ChatChunk:
        return ChatChunk(**self._head._asdict(), choices=[choice], usage=self._no_usage)


def chat_completion(head: Head, said: Sequence[Said], usage: Usage) -> ChatCompletion:
    """The whole answer at once."""
    return ChatCompletion(**head._asdict(), choices=[_choice(one) for one in said], usage=usage)


def _choice(said: Said) -> ChatChoice:
    logprobs = chat_logprobs(said.logprobs) if said.logprobs else None
    return ChatChoice(said.index, Message(said.text), logprobs, client_reason(said.finish))


def chat_logprobs(tokens: Sequence[TokenText]) -> ChatLogprobs:
    return ChatLogprobs([_token(token) for token in tokens])


def _token(token: TokenText) -> ChatTokenLogprob:
    top = [TopLogprob(text, floored(logprob), list(data)) for text, data, logprob in token.top]
    return ChatTokenLogprob(token.text, floored(token.logprob), list(token.bytes_), top)
