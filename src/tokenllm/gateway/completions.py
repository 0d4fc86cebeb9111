"""How `/v1/completions` words its answers: text chunks, an empty one with the reason, usage."""

from collections.abc import Sequence
from itertools import accumulate

import msgspec
from msgspec import UNSET

from tokenllm.gateway.reply import Head, Said, client_reason
from tokenllm.gateway.sse import HOLE, ChunkForm, event
from tokenllm.messages import TokenText
from tokenllm_schemas.responses import FinishReason, TextChoice, TextCompletion, TextLogprobs, Usage, floored


class CompletionFrames:
    """The events of one stream of completions."""

    def __init__(self, head: Head, choices: int, usage_wanted: bool) -> None:
        self._head = head
        self._no_usage = None if usage_wanted else UNSET  # present in every chunk, if wanted
        self._forms = [ChunkForm(self._chunk(TextChoice(i, HOLE, logprobs=HOLE))) for i in range(choices)]
        self._offsets = [0] * choices

    def opening(self) -> bytes:
        return b""

    def text(self, index: int, text: str, logprobs: Sequence[TokenText]) -> bytes:
        if not logprobs:
            return self._forms[index].fill(text, None)
        offset = self._offsets[index]
        self._offsets[index] += sum(len(token.text) for token in logprobs)
        return self._forms[index].fill(text, text_logprobs(logprobs, offset))

    def finish(self, index: int, reason: FinishReason) -> bytes:
        return event(msgspec.json.encode(self._chunk(TextChoice(index, "", finish_reason=reason))))

    def usage(self, usage: Usage) -> bytes:
        return event(msgspec.json.encode(TextCompletion(**self._head._asdict(), choices=[], usage=usage)))

    def _chunk(self, choice: TextChoice) -> TextCompletion:
        return TextCompletion(**self._head._asdict(), choices=[choice], usage=self._no_usage)


def text_completion(head: Head, said: Sequence[Said], usage: Usage) -> TextCompletion:
    """The whole answer at once."""
    return TextCompletion(**head._asdict(), choices=[_choice(one) for one in said], usage=usage)


def _choice(said: Said) -> TextChoice:
    logprobs = text_logprobs(said.logprobs, offset=0) if said.logprobs else None
    return TextChoice(said.index, said.text, logprobs, client_reason(said.finish))


def text_logprobs(tokens: Sequence[TokenText], offset: int) -> TextLogprobs:
    """`offset`: characters of the completion before these tokens."""
    ends = accumulate((len(token.text) for token in tokens), initial=offset)
    return TextLogprobs(
        tokens=[token.text for token in tokens],
        token_logprobs=[floored(token.logprob) for token in tokens],
        top_logprobs=[{text: floored(logprob) for text, _, logprob in token.top} for token in tokens],
        text_offset=list(ends)[:-1],
    )
