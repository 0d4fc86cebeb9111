"""How `/v1/completions` words its answers: the prompt where it is echoed, text chunks, an empty one with the reason,
usage.
"""

from collections.abc import Sequence
from itertools import accumulate

import msgspec
from msgspec import UNSET

from tokenllm.gateway.reply import Head, Said, client_reason
from tokenllm.gateway.shown import Shown
from tokenllm.gateway.sse import HOLE, ChunkForm, event
from tokenllm.messages import TokenText
from tokenllm_schemas.requests import MAX_LOGPROBS
from tokenllm_schemas.responses import FinishReason, TextChoice, TextCompletion, TextLogprobs, Usage, floored


class CompletionFrames:
    """The events of one stream of completions."""

    def __init__(self, head: Head, choices: int, usage_wanted: bool, shown: Shown | None = None) -> None:
        self._head, self._shown = head, shown or Shown()
        self._no_usage = None if usage_wanted else UNSET  # present in every chunk, if wanted
        self._tokens = 0
        self._forms = [ChunkForm(self._chunk(TextChoice(i, HOLE, logprobs=HOLE))) for i in range(choices)]
        self._offsets = [0] * choices
        self._foretold = [self._shown.foretold(i) for i in range(choices)]  # tokens of the prompt still to come

    def opening(self) -> bytes:
        shown = self._shown
        if not (shown.echoes or shown.token_ids):
            return b""
        return b"".join(self._echo(index) for index in range(len(self._forms)))

    def _echo(self, index: int) -> bytes:
        shown, prompt = self._shown, self._shown.prompts[index]
        logprobs = None
        if shown.foretells and shown.logprobs is not None:
            logprobs = text_logprobs((), 0, first=prompt.first)
            self._offsets[index] = len(prompt.first.text)
        ids = shown.prompt_ids(index)
        return self._event(TextChoice(index, prompt.echo or "", logprobs=logprobs, prompt_token_ids=ids))

    def text(self, index: int, text: str, logprobs: Sequence[TokenText]) -> bytes:
        if not logprobs:
            return self._forms[index].fill(text, None)
        if self._shown.plain:
            return self._forms[index].fill(text, self._logprobs(index, logprobs))
        own = logprobs[self._foretold[index] :]
        self._foretold[index] -= len(logprobs) - len(own)
        self._tokens += len(own)
        return self._event(TextChoice(index, text, self._logprobs(index, logprobs), token_ids=self._shown.ids(own)))

    def finish(self, index: int, reason: FinishReason) -> bytes:
        return self._event(TextChoice(index, "", finish_reason=reason))

    def usage(self, usage: Usage) -> bytes:
        tier = self._shown.service_tier
        chunk = TextCompletion(**self._head._asdict(), choices=[], usage=usage, service_tier=tier)
        return event(msgspec.json.encode(chunk))

    def _logprobs(self, index: int, tokens: Sequence[TokenText]) -> TextLogprobs | None:
        if self._shown.logprobs is None:
            return None
        offset = self._offsets[index]
        self._offsets[index] += sum(len(token.text) for token in tokens)
        return text_logprobs(tokens, offset, self._shown.logprobs)

    def _event(self, choice: TextChoice) -> bytes:
        return event(msgspec.json.encode(self._chunk(choice)))

    def _chunk(self, choice: TextChoice) -> TextCompletion:
        usage = self._shown.usage(self._tokens) if self._shown.running_usage else self._no_usage
        tier = self._shown.service_tier
        return TextCompletion(**self._head._asdict(), choices=[choice], usage=usage, service_tier=tier)


def text_completion(head: Head, said: Sequence[Said], usage: Usage, shown: Shown | None = None) -> TextCompletion:
    """The whole answer at once."""
    shown = shown or Shown()
    return TextCompletion(
        **head._asdict(),
        choices=[_choice(one, shown) for one in said],
        usage=usage,
        service_tier=shown.service_tier,
        metadata=shown.metadata,
    )


def _choice(said: Said, shown: Shown) -> TextChoice:
    index = said.index
    if shown.plain:
        logprobs = text_logprobs(said.logprobs, 0) if said.logprobs else None
        return TextChoice(index, said.text, logprobs, client_reason(said.finish))
    prompt, foretold = shown.prompts[index], shown.foretold(index)
    first = prompt.first if shown.echoes else None
    told = said.logprobs if shown.echoes else said.logprobs[foretold:]
    logprobs = None
    if shown.logprobs is not None and (told or first):
        logprobs = text_logprobs(told, 0, shown.logprobs, first)
    return TextChoice(
        index,
        (prompt.echo or "") + said.text,
        logprobs,
        client_reason(said.finish),
        token_ids=shown.ids(said.logprobs[foretold:]),
        prompt_token_ids=shown.prompt_ids(index),
        prompt_logprobs=shown.told_of_prompt(index, said.logprobs),
    )


def text_logprobs(
    tokens: Sequence[TokenText], offset: int, alternatives: int = MAX_LOGPROBS, first: TokenText | None = None
) -> TextLogprobs:
    """`offset`: characters of the completion before these tokens; `first` begins a prompt: nothing foretells it."""
    told = [first, *tokens] if first else tokens
    ends = accumulate((len(token.text) for token in told), initial=offset)
    unknown: list[None] = [None] if first else []
    return TextLogprobs(
        tokens=[token.text for token in told],
        token_logprobs=[*unknown, *(floored(token.logprob) for token in tokens)],
        top_logprobs=[*unknown, *(_by_text(token, alternatives) for token in tokens)],
        text_offset=list(ends)[:-1],
    )


def _by_text(token: TokenText, alternatives: int) -> dict[str, float]:
    """Of tokens with the same text, as broken characters have, the likeliest."""
    told: dict[str, float] = {}
    for text, _, logprob in token.top[:alternatives]:
        told.setdefault(text, floored(logprob))
    return told
