"""What an answer shows beside its text: of the tokens behind it, of the prompt, and of what the client said itself.

The logprobs of a prompt come round the circle before those of the answer, in the same list; here the two are parted.
"""

from collections.abc import Sequence
from functools import cached_property

import msgspec
import numpy as np
from msgspec import UNSET, UnsetType

from tokenllm.messages import Submit, TokenText
from tokenllm.text.stream import token_text
from tokenllm.text.tokenizer import Decoder
from tokenllm_schemas.requests import MAX_LOGPROBS, Generation
from tokenllm_schemas.responses import PromptLogprob, PromptLogprobs, Usage, floored


class Prompt(msgspec.Struct, frozen=True):
    ids: tuple[int, ...]
    first: TokenText  # of which nothing is foretold
    echo: str | None  # its text, where the answer begins with it

    @property
    def foretold(self) -> int:
        return len(self.ids) - 1


class Shown:
    """What all choices of an answer show."""

    def __init__(self, prompts: Sequence[Prompt] = (), body: Generation | None = None) -> None:
        self.prompts = prompts  # one for each choice
        self.logprobs = body.alternatives() if body else MAX_LOGPROBS
        self.token_ids = bool(body and body.return_token_ids)
        self.running_usage = bool(body and body.running_usage())
        self.echoes = bool(body and body.echoes())
        self.foretells = bool(body and body.prompt_alternatives() is not None)
        self.prompt_logprobs = body.prompt_logprobs if body and body.asks_prompt_logprobs() else None
        self.choices_each = body.choices_each() if body else 1
        self.service_tier: str | UnsetType = _tier_used(body.service_tier) if body else UNSET
        self.metadata: dict[str, str] | UnsetType = UNSET if body is None or body.metadata is None else body.metadata

    @cached_property
    def plain(self) -> bool:
        """Whether an answer is no more than text and perhaps logprobs."""
        return not (self.token_ids or self.running_usage or self.foretells or self.echoes)

    def foretold(self, index: int) -> int:
        """How many logprobs of the prompt come before those of this choice."""
        return self.prompts[index].foretold if self.foretells else 0

    def ids(self, tokens: Sequence[TokenText]) -> list[int] | UnsetType:
        return [token.id for token in tokens] if self.token_ids else UNSET

    def prompt_ids(self, index: int) -> list[int] | UnsetType:
        return list(self.prompts[index].ids) if self.token_ids else UNSET

    def told_of_prompt(self, index: int, tokens: Sequence[TokenText]) -> PromptLogprobs | UnsetType:
        """`tokens` are those of the prompt that were foretold."""
        if self.prompt_logprobs is None:
            return UNSET
        most = self.prompt_logprobs
        return [None, *(_alternatives(token, most) for token in tokens[: self.prompts[index].foretold])]

    def usage(self, completion_tokens: int) -> Usage:
        """So far; what was cached is known at the end."""
        prompt_tokens = sum(len(prompt.ids) for prompt in self.prompts[:: self.choices_each])
        return Usage.of(prompt_tokens, 0, completion_tokens)


def shown_for(body: Generation, submits: Sequence[Submit], decoder: Decoder) -> Shown:
    """Takes long where there are many prompts."""
    return Shown([_prompt(body, submit, decoder) for submit in submits], body)


def _prompt(body: Generation, submit: Submit, decoder: Decoder) -> Prompt:
    ids = tuple(np.frombuffer(submit.prompt, "<i4").tolist())
    first = TokenText(*token_text(decoder, ids[0]), 0.0, (), ids[0])
    echo = decoder.decode(ids, skip_special=body.skip_special_tokens is not False) if body.echoes() else None
    return Prompt(ids, first, echo)


def _alternatives(token: TokenText, most: int) -> dict[str, PromptLogprob]:
    told = {
        str(id_): PromptLogprob(floored(logprob), rank, text)
        for rank, (id_, (text, _, logprob)) in enumerate(zip(token.top_ids, token.top, strict=True), start=1)
        if rank <= most
    }
    return told | ({} if str(token.id) in told else {str(token.id): _unranked(token)})


def _unranked(token: TokenText) -> PromptLogprob:
    rank = token.top_ids.index(token.id) + 1 if token.id in token.top_ids else None
    return PromptLogprob(floored(token.logprob), rank, token.text)


def _tier_used(asked: str | None) -> str | UnsetType:
    match asked:
        case None:
            return UNSET
        case "flex":
            return "flex"
        case "priority" | "fast":
            return "priority"
        case _:
            return "default"
