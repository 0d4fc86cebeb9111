"""Which tokens a request allows, favours and forbids, from what its client wrote to what the sampler is told.

Every id is checked against the vocabulary here, and every list against the room that the sampler's tables have.
"""

import math
import reprlib
from collections.abc import Iterable, Iterator
from typing import Any

from tokenllm.gateway.served_model import ServedModel
from tokenllm.messages import Sampling
from tokenllm_schemas.errors import invalid
from tokenllm_schemas.requests import MAX_BAD_WORDS, MAX_BIASED_TOKENS, Generation

MAX_BAD_WORD_TOKENS = 8


def with_masks(sampling: Sampling, body: Generation, model: ServedModel) -> Sampling:
    """Costs nothing where nothing is asked."""
    asked = (body.logit_bias, body.allowed_token_ids, body.bad_words, body.stop_token_ids, body.min_tokens)
    if not any(asked):
        return sampling
    return _Masks(body, model).added_to(sampling)


class _Masks:
    def __init__(self, body: Generation, model: ServedModel) -> None:
        self._body, self._model = body, model
        self._allowed = body.allowed_token_ids or []
        self._check_ids(body.stop_token_ids or [], "stop_token_ids")
        self._check_ids(self._allowed, "allowed_token_ids")
        self._check_ids(map(int, body.logit_bias or {}), "logit_bias")
        words = list(dict.fromkeys(self._words()))
        self._single = [word[0] for word in words if len(word) == 1]
        self._longer = tuple(word for word in words if len(word) > 1)
        if len(self._longer) > MAX_BAD_WORDS:
            message = f"they make {len(self._longer)} sequences of tokens, at most {MAX_BAD_WORDS} are allowed"
            raise invalid("bad_words", message)

    def added_to(self, sampling: Sampling) -> Sampling:
        bias, muted = self._bias(), self._muted()
        if self._allowed and not any(value > -math.inf and id_ not in muted for id_, value in bias.items()):
            raise invalid("allowed_token_ids", f"nothing is left of them (got {reprlib.repr(self._allowed)})")
        fields: dict[str, Any] = {field: getattr(sampling, field) for field in sampling.__struct_fields__}
        masks = {"logit_bias": tuple(bias.items()), "only_biased": bool(self._allowed), "bad_words": self._longer}
        return Sampling(**fields | masks | {"muted": muted, "min_tokens": self._body.min_tokens or 0})

    def _bias(self) -> dict[int, float]:
        asked = {int(id_): value for id_, value in (self._body.logit_bias or {}).items()}
        bias = {id_: asked.get(id_, 0.0) for id_ in self._allowed} if self._allowed else asked
        bias |= {id_: -math.inf for id_ in self._single if id_ in bias or not self._allowed}
        if len(bias) > MAX_BIASED_TOKENS:
            param = "logit_bias" if self._body.logit_bias else "bad_words"
            raise invalid(param, f"names {len(bias)} tokens, with bad_words; at most {MAX_BIASED_TOKENS} are allowed")
        return bias

    def _muted(self) -> tuple[int, ...]:
        """The tokens that end the answer, which must not come before there are `min_tokens`."""
        if not self._body.min_tokens:
            return ()
        eos = {id_ for id_ in self._model.tokenizer.eos_ids if id_ < self._model.vocab_size}
        return tuple(sorted(eos.union(self._body.stop_token_ids or ())))

    def _words(self) -> Iterator[tuple[int, ...]]:
        """A word's tokens where a text begins with it, and where it follows a space."""
        for index, word in enumerate(self._body.bad_words or []):
            for spelling in (word, " " + word.lstrip(" ")):
                ids = tuple(self._model.tokenizer.encode(spelling, first=False))
                if len(ids) > MAX_BAD_WORD_TOKENS:
                    message = f"{reprlib.repr(word)} has {len(ids)} tokens, at most {MAX_BAD_WORD_TOKENS} are allowed"
                    raise invalid(f"bad_words[{index}]", message)
                if ids:
                    yield ids

    def _check_ids(self, ids: Iterable[int], param: str) -> None:
        size = self._model.vocab_size
        if (largest := max(ids, default=0)) >= size:
            raise invalid(param, f"token id {largest} is not in the vocabulary of {size}")
