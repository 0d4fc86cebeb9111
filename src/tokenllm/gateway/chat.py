"""How `/v1/chat/completions` words its answers: role chunk, deltas, an empty delta with the reason, usage."""

from collections.abc import Sequence

import msgspec
from msgspec import UNSET, UnsetType

from tokenllm.gateway.reply import Head, Said, client_reason
from tokenllm.gateway.shown import Shown
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

    def __init__(self, head: Head, choices: int, usage_wanted: bool, shown: Shown | None = None) -> None:
        self._head, self._shown = head, shown or Shown()
        self._choices = choices
        self._no_usage = None if usage_wanted else UNSET  # present in every chunk, if wanted
        delta = ChatDelta(content=HOLE)
        self._tokens = 0
        self._forms = [ChunkForm(self._chunk(ChatChunkChoice(i, delta, logprobs=HOLE))) for i in range(choices)]

    def opening(self) -> bytes:
        delta = ChatDelta(role="assistant", content="")
        chunks = (self._chunk(ChatChunkChoice(i, delta), self._shown.prompt_ids(i)) for i in range(self._choices))
        return b"".join(event(msgspec.json.encode(chunk)) for chunk in chunks)

    def text(self, index: int, text: str, logprobs: Sequence[TokenText]) -> bytes:
        shown = self._shown
        told = chat_logprobs(logprobs) if logprobs and shown.logprobs is not None else None
        if shown.plain:
            return self._forms[index].fill(text, told)
        self._tokens += len(logprobs)
        return self._event(ChatChunkChoice(index, ChatDelta(content=text), told, token_ids=shown.ids(logprobs)))

    def finish(self, index: int, reason: FinishReason) -> bytes:
        return self._event(ChatChunkChoice(index, ChatDelta(), finish_reason=reason))

    def usage(self, usage: Usage) -> bytes:
        tier = self._shown.service_tier
        return event(msgspec.json.encode(ChatChunk(**self._head._asdict(), choices=[], usage=usage, service_tier=tier)))

    def _event(self, choice: ChatChunkChoice) -> bytes:
        return event(msgspec.json.encode(self._chunk(choice)))

    def _chunk(self, choice: ChatChunkChoice, prompt_ids: list[int] | UnsetType = UNSET) -> ChatChunk:
        usage = self._shown.usage(self._tokens) if self._shown.running_usage else self._no_usage
        tier = self._shown.service_tier
        return ChatChunk(
            **self._head._asdict(), choices=[choice], usage=usage, service_tier=tier, prompt_token_ids=prompt_ids
        )


def chat_completion(head: Head, said: Sequence[Said], usage: Usage, shown: Shown | None = None) -> ChatCompletion:
    """The whole answer at once."""
    shown = shown or Shown()
    return ChatCompletion(
        **head._asdict(),
        choices=[_choice(one, shown) for one in said],
        usage=usage,
        service_tier=shown.service_tier,
        metadata=shown.metadata,
        prompt_token_ids=shown.prompt_ids(0),
        prompt_logprobs=shown.told_of_prompt(0, said[0].logprobs),
    )


def _choice(said: Said, shown: Shown) -> ChatChoice:
    tokens = said.logprobs[shown.foretold(said.index) :]
    logprobs = chat_logprobs(tokens) if tokens and shown.logprobs is not None else None
    reason = client_reason(said.finish)
    return ChatChoice(said.index, Message(said.text), logprobs, reason, token_ids=shown.ids(tokens))


def chat_logprobs(tokens: Sequence[TokenText]) -> ChatLogprobs:
    return ChatLogprobs([_token(token) for token in tokens])


def _token(token: TokenText) -> ChatTokenLogprob:
    top = [TopLogprob(text, floored(logprob), list(data)) for text, data, logprob in token.top]
    return ChatTokenLogprob(token.text, floored(token.logprob), list(token.bytes_), top)
