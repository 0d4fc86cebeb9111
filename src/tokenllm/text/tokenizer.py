"""Text to token ids and back, with the model's own tokens.

A `Tokenizer` is an encoder for ordinary text, the control and other added tokens around it, and the bytes of
every token. It never changes, may be used by many threads at once, and leaves the GIL while it encodes.
Where the tokens come from is `vocabulary.py`.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenllm.checkpoint.description import describe
from tokenllm.text.hiding import Hider
from tokenllm.text.trie import trie_pattern
from tokenllm.text.vocabulary import AddedToken, Vocabulary, load_vocabulary

WINDOW = 1 << 15  # characters: half a millisecond


def load_decoder(path: Path) -> "Decoder":
    """The half of a tokenizer that turns ids into text: quicker to load, and smaller."""
    return Decoder(load_vocabulary(path))


def load_tokenizer(path: Path) -> "Tokenizer":
    """The tokenizer of a .gguf file or a Hugging Face folder."""
    description = describe(path)
    return Tokenizer(load_vocabulary(path), description.eos_ids, description.bos_id)


class Decoder:
    """Decodes what a model says."""

    def __init__(self, vocabulary: Vocabulary):
        self.special_ids = frozenset(token.id for token in vocabulary.added if token.special)
        self.special_literals = tuple(token.content for token in vocabulary.added if token.special)
        self.pieces = vocabulary.pieces
        self.shown_pieces = {id_: piece for id_, piece in self.pieces.items() if id_ not in self.special_ids}
        self.vocab_size = max(self.pieces) + 1
        self.leading_space = vocabulary.leading_space

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ids. Ids beyond the vocabulary have none; broken UTF-8 becomes U+FFFD."""
        pieces = self.shown_pieces if skip_special else self.pieces
        data = b"".join([pieces.get(id_, b"") for id_ in ids])
        return data.removeprefix(b" " if self.leading_space else b"").decode("utf-8", "replace")

    def token_bytes(self, id_: int) -> bytes:
        """The raw bytes of one token; of a control token, those of its literal."""
        return self.pieces.get(id_, b"")


class Tokenizer(Decoder):
    """Encodes text for a model too."""

    def __init__(self, vocabulary: Vocabulary, eos_ids: frozenset[int], bos_id: int | None):
        super().__init__(vocabulary)
        self.eos_ids, self.bos_id = eos_ids, bos_id
        self.adds_bos = vocabulary.adds_bos and bos_id is not None
        self._encoder = vocabulary.make_encoder()
        self._added_words = _Splitter(token for token in vocabulary.added if not token.special)
        # nothing can hide inside one character: a control token with such a literal is out of reach of any text
        reachable = [token for token in vocabulary.added if not token.special or len(token.content) > 1]
        self._added = _Splitter(reachable)
        self._hider = Hider(token.content for token in reachable if token.special)

    def encode(self, text: str, first: bool = True) -> list[int]:
        """Ids of text in which control tokens are plain text. `first`: nothing stands before it in the prompt."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError("text holds a lone surrogate, which is no character") from error
        ids: list[int] = []
        for section in self._added_words.split(text):
            ids += [section] if isinstance(section, int) else self._encoder.encode(section, first and not ids)
        return ids

    def encode_with_specials(self, text: str, unseen: str = "") -> list[int]:
        """Ids of text whose control-token literals become control tokens; `unseen` is dropped once they are found."""
        ids: list[int] = []
        for section in self._added.split(text):
            ids += [section] if isinstance(section, int) else self.encode(section.replace(unseen, ""), first=not ids)
        return ids

    def hide_specials(self, text: str, unseen: str) -> str:
        """The same text, except that no part of it becomes a control token in `encode_with_specials`."""
        return self._hider.hide(text, unseen)


class _Splitter:
    """Cuts text at the literals of added tokens, leftmost and longest first.

    A regular expression keeps the GIL: it looks through a window at a time, so that other threads get their turn.
    """

    def __init__(self, tokens: Iterable[AddedToken]):
        self._tokens = {token.content: token for token in tokens}
        self._longest = max(map(len, self._tokens), default=0)
        self._literals = re.compile(trie_pattern(self._tokens)) if self._tokens else None

    def split(self, text: str) -> list[str | int]:
        """Ordinary text and ids by turns."""
        sections: list[Any] = list(self._sections(text))
        for at in range(1, len(sections), 2):
            token = self._tokens[sections[at]]
            sections[at] = token.id
            sections[at - 1] = sections[at - 1].rstrip() if token.lstrip else sections[at - 1]
            sections[at + 1] = sections[at + 1].lstrip() if token.rstrip else sections[at + 1]
        return sections

    def _sections(self, text: str) -> Iterator[str]:
        """Ordinary text and literals by turns."""
        begin = at = 0
        while self._literals and at < len(text):
            window = at + WINDOW
            found = self._literals.search(text, at, window + self._longest)
            if not found or found.start() >= window:  # what begins beyond may be cut off
                at = window
                continue
            yield text[begin : found.start()]
            yield found[0]
            begin = at = found.end()
        yield text[begin:]
