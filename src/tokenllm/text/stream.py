"""From ids to text while they come: whole characters only, and never a stop string or a part of one.

The law: all deltas and `finish` joined are `decode` of all ids, cut where the first stop string to become
complete begins (of several completed by one character, the longest). How the ids arrive makes no difference.
"""

from codecs import utf_8_decode
from collections.abc import Iterable, Sequence

from tokenllm.text.tokenizer import Decoder


def token_text(decoder: Decoder, id_: int) -> tuple[str, bytes]:
    """A token as clients see it beside its logprob: its bytes, and what can be read of them."""
    piece = decoder.token_bytes(id_)
    return piece.decode("utf-8", "replace"), piece


class TextStream:
    """The text of one completion. `stopped` once a stop string was found; `tokens_used` ids stand behind the text."""

    __slots__ = ("_held", "_leading_space", "_pending", "_pieces", "_stop", "stopped", "tokens_used")

    def __init__(self, decoder: Decoder, stop: Iterable[str] = (), special_tokens: bool = False):
        self.stopped, self.tokens_used = False, 0
        self._pieces = decoder.pieces if special_tokens else decoder.shown_pieces
        self._leading_space = decoder.leading_space  # still to be dropped
        self._pending = b""  # the beginning of a character
        self._stop = tuple(one for one in stop if one)
        self._held = ""  # may be the beginning of a stop string

    def push(self, ids: Sequence[int], shows_last: bool = True) -> str:
        """The text that these ids make safe to show. Once stopped, nothing changes any more.

        A last one that does not show is one that ends the completion, whatever its text.
        """
        if ids and not shows_last:
            text = self.push(ids[:-1])
            self.tokens_used += not self.stopped
            return text
        if self._stop:
            return "".join([self._push_one(id_) for id_ in ids if not self.stopped])
        self.tokens_used += len(ids)
        pieces = self._pieces
        return self._characters(b"".join([pieces.get(id_, b"") for id_ in ids]))

    def finish(self) -> str:
        """What was held back, when no more ids will come."""
        if self.stopped:
            return ""
        text = self._before_stop(self._characters(b"", last=True))
        held, self._held = self._held, ""
        return text + held

    def _push_one(self, id_: int) -> str:
        self.tokens_used += 1
        return self._before_stop(self._characters(self._pieces.get(id_, b"")))

    def _characters(self, data: bytes, last: bool = False) -> str:
        if self._leading_space and data:
            data, self._leading_space = data.removeprefix(b" "), False
        data = self._pending + data
        text, used = utf_8_decode(data, "replace", last)
        self._pending = data[used:]
        return text

    def _before_stop(self, new: str) -> str:
        if not new:
            return ""
        text, self._held = self._held + new, ""
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._pending = True, b""
            return text[: min(found)[1]]
        held = _held_from(text, self._stop)
        self._held = text[held:]
        return text[:held]


def _held_from(text: str, stops: Iterable[str]) -> int:
    """Where the longest end of the text begins with which a stop string may begin: at its end, if none may."""
    earliest = len(text)
    for stop in stops:
        at = text.find(stop[0], max(0, len(text) - len(stop) + 1), earliest)
        while at >= 0 and not stop.startswith(text[at:]):
            at = text.find(stop[0], at + 1, earliest)
        earliest = at if at >= 0 else earliest
    return earliest
