"""From token ids to text: what the detokenizer makes of each message, and nothing of how messages travel.

Owns the text stream of every uid between its `Begin` and its last word. Relies on the scheduler ending every
`Begin` with a finished entry in a `Step`; entries that come after a stop string are dropped.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from tokenllm.messages import (
    FINISH_REASONS,
    STILL_RUNNING,
    Begin,
    Delta,
    Finish,
    Midway,
    Outbound,
    Ready,
    Refused,
    Step,
    Texts,
    TokenLogprob,
    TokenText,
    Vector,
    gateway_of,
)
from tokenllm.text.stream import TextStream, token_text
from tokenllm.text.tokenizer import Decoder

AT_STOP, AT_LENGTH = (1 + FINISH_REASONS.index(reason) for reason in ("stop", "length"))


class Detokenizer:
    def __init__(self, decoder: Decoder, gateways: int) -> None:
        self._decoder = decoder
        self._gateways = gateways
        self._begun: dict[int, tuple[Begin, TextStream]] = {}

    def accept(self, message: Midway) -> dict[int, Outbound]:
        """What each gateway slot has to hear of this."""
        match message:
            case Ready():
                return dict.fromkeys(range(self._gateways), message)
            case Refused():
                return {_slot(message.uid): message}
            case Begin():
                assert message.uid not in self._begun, "a uid begins once"
                telling = message.telling
                self._begun[message.uid] = message, TextStream(self._decoder, telling.stop, telling.special_tokens)
                return {}
            case Vector(uid=uid, values=values):
                return _by_gateway([Delta(uid, "", 0, vector=values)] if uid in self._begun else [])
            case Step():
                return _by_gateway(self._deltas(message))

    def _deltas(self, step: Step) -> Iterator[Delta]:
        for uid, logprobs in step.prompt_logprobs.items():
            if uid in self._begun:
                yield Delta(uid, "", 0, tuple(self._spelled(logprob) for logprob in logprobs))
        ids = np.frombuffer(step.ids, "<i4").tolist()
        end = 0
        for uid, count, finished, cached in zip(step.uids, step.counts, step.finished, step.cached_tokens, strict=True):
            start, end = end, end + count
            if uid not in self._begun:  # it has met a stop string, and the scheduler does not know yet
                continue
            yield self._advance(uid, ids[start:end], finished, cached, step.logprobs.get(uid, ()))
        assert end == len(ids), "counts add up to the ids"

    def _advance(
        self, uid: int, ids: list[int], finished: int, cached: int, logprobs: tuple[TokenLogprob, ...]
    ) -> Delta:
        begin, stream = self._begun[uid]
        if begin.telling.nothing:
            ids, logprobs, finished = [], (), AT_LENGTH if finished == AT_STOP else finished
        used = stream.tokens_used
        text = stream.push(ids, shows_last=finished != AT_STOP)
        if finished != STILL_RUNNING and not stream.stopped:
            text += stream.finish()
        tokens = stream.tokens_used - used
        finish = None
        if finished != STILL_RUNNING or stream.stopped:
            del self._begun[uid]
            finish = _last_word(begin, stream, finished, cached)
        if begin.telling.each_token and not logprobs:
            logprobs = tuple(TokenLogprob(id_, 0.0) for id_ in ids)
        return Delta(uid, text, tokens, tuple(self._spelled(logprob) for logprob in logprobs[:tokens]), finish)

    def _spelled(self, logprob: TokenLogprob) -> TokenText:
        top = tuple((*token_text(self._decoder, token), chance) for token, chance in logprob.top)
        top_ids = tuple(token for token, _ in logprob.top)
        return TokenText(*token_text(self._decoder, logprob.token), logprob.logprob, top, logprob.token, top_ids)


def _last_word(begin: Begin, stream: TextStream, finished: int, cached: int) -> Finish:
    return Finish(
        reason="stop" if stream.stopped else FINISH_REASONS[finished - 1],
        prompt_tokens=begin.prompt_tokens,
        cached_tokens=cached,
        completion_tokens=stream.tokens_used,
        by_stop_string=stream.stopped,
    )


def _by_gateway(deltas: Iterable[Delta]) -> dict[int, Outbound]:
    slots: dict[int, list[Delta]] = {}
    for delta in deltas:
        slots.setdefault(_slot(delta.uid), []).append(delta)
    return {slot: Texts(tuple(some)) for slot, some in slots.items()}


def _slot(uid: int) -> int:
    return gateway_of(uid)[0]
