"""Byte-level BPE by tiktoken where that is provably exact, by the `tokenizers` library where it is not.

tiktoken merges whatever neighbours form a token, lowest id first; a Hugging Face model merges the pairs of
its merge list, in list order. `is_exact` tells whether the two always agree for a given model.
"""

import re
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import msgspec
import tiktoken
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GPT-2's words after every digit was cut out: white space before a digit has no successor either
SMOLLM = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
PATTERNS = (GPT2, SMOLLM, LLAMA3, QWEN2)

NEVER = 1 << 62  # an id beyond all

# tiktoken's regex engine keeps a state per white-space character and gives up, with a panic, at about a million
LONGEST_WHITE_SPACE = 100_000
ENDLESS_WHITE_SPACE = re.compile(rf"(?<!\s)\s{{{LONGEST_WHITE_SPACE}}}")  # looks at each run once
WITHIN = LONGEST_WHITE_SPACE // 2  # so long a run fills one of such stretches, wherever it begins


def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level vocabularies: itself, or one past U+00FF."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTES = _byte_alphabet()


def to_bytes(token: str) -> bytes:
    """The bytes of a token written in the byte alphabet; KeyError if it is not."""
    return bytes(map(BYTES.__getitem__, token))


class ByteLevelBpe(msgspec.Struct, frozen=True):
    """A tokenizer's ordinary part, its tokens written in the byte alphabet."""

    vocabulary: dict[str, int]  # without added tokens
    merges: list[tuple[str, str]]  # earlier ones first
    pattern: str  # cuts text into words; one of PATTERNS
    nfc: bool = False  # normalize first
    ignore_merges: bool = False  # a word that is a token is that token, whatever the merges say


class Encoder(Protocol):
    """Text without any control token → ids. `first`: nothing stands before it in the prompt."""

    def encode(self, text: str, first: bool) -> list[int]: ...


def is_exact(bpe: ByteLevelBpe) -> bool:
    """Whether tiktoken, which sees only ids, does what the merge list says, on any text.

    Until a merge crosses the ends of a stretch of letters, these merge as they would alone. So wherever a token
    is formed, its last two parts are the ones it has when its letters are merged alone. tiktoken is exact
    if the list forms each token out of just these, and is in the order of the ids.
    """
    ids = bpe.vocabulary
    if not ids or not all(BYTES.keys() >= set(token) for token in ids):
        return False
    order = [ids.get(left + right, -1) for left, right in bpe.merges]
    if -1 in order or any(earlier > later for earlier, later in pairwise(order)):
        return False
    merges = set(bpe.merges)
    last_parts = (_merged_alone(token, ids) for token in ids if len(token) > 1)
    # a token that is never formed is still found by tiktoken if it is a whole word, as it is with ignore_merges
    return all(tuple(parts) in merges if len(parts) == 2 else bpe.ignore_merges for parts in last_parts)


def _merged_alone(token: str, ids: dict[str, int]) -> list[str]:
    """What is left of a token's letters, merged lowest id first, when two are left or no merge is."""
    parts = list(token)
    while len(parts) > 2:
        found = [ids.get(left + right, NEVER) for left, right in pairwise(parts)]
        if (lowest := min(found)) == NEVER:
            return parts
        at = found.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def library_tokenizer(bpe: ByteLevelBpe) -> Tokenizer:
    """The same model in the `tokenizers` library."""
    tokenizer = Tokenizer(BPE(bpe.vocabulary, bpe.merges, ignore_merges=bpe.ignore_merges))
    words = pre_tokenizers.Split(Regex(bpe.pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])  # type: ignore[assignment]
    if bpe.nfc:
        tokenizer.normalizer = normalizers.NFC()  # type: ignore[assignment]
    return tokenizer


def _may_be_endless(text: str) -> bool:
    """A quick look, which ends at the first character of nearly every stretch."""
    return any(text[at : at + WITHIN].isspace() for at in range(0, len(text) - WITHIN + 1, WITHIN))


class TiktokenEncoder:
    """An exact tiktoken encoding. Bytes that the vocabulary lacks are dropped, as the library does."""

    def __init__(self, bpe: ByteLevelBpe):
        ranks = {to_bytes(token): id_ for token, id_ in bpe.vocabulary.items()}
        self._bpe = bpe
        self._missing = bytes(byte for byte in range(256) if bytes([byte]) not in ranks)
        # tiktoken insists on a rank for every byte; these never come out, for `encode` keeps the bytes away
        beyond = max(ranks.values()) + 1
        ranks |= {bytes([byte]): beyond + i for i, byte in enumerate(self._missing)}
        self._encoding = tiktoken.Encoding("model", pat_str=bpe.pattern, mergeable_ranks=ranks, special_tokens={})
        self._nfc = normalizers.NFC() if bpe.nfc else None

    def encode(self, text: str, first: bool) -> list[int]:
        if self._nfc and not text.isascii():
            text = self._nfc.normalize_str(text)
        if _may_be_endless(text) and ENDLESS_WHITE_SPACE.search(text):
            raise ValueError(f"text holds a run of {LONGEST_WHITE_SPACE} white-space characters or more")
        if self._missing and self._lacks_a_byte_of(text):
            return self._library.encode(text, first)
        return self._encoding.encode_ordinary(text)

    def _lacks_a_byte_of(self, text: str) -> bool:
        data = text.encode()
        return len(data.translate(None, self._missing)) < len(data)

    @cached_property
    def _library(self) -> "LibraryEncoder":
        # what is left of a word whose missing bytes were dropped merges across the gap: tiktoken has no way to say so
        return LibraryEncoder(library_tokenizer(self._bpe))


class LibraryEncoder:
    """The `tokenizers` library. `later` encodes text that is not the beginning, where the model tells the two apart."""

    def __init__(self, tokenizer: Tokenizer, later: Tokenizer | None = None):
        self._first, self._later = tokenizer, later or tokenizer
        for one in (self._first, self._later):
            one.no_truncation()
            one.no_padding()
            one.encode_special_tokens = True  # control tokens are looked for elsewhere

    def encode(self, text: str, first: bool) -> list[int]:
        tokenizer = self._first if first else self._later
        return tokenizer.encode(text, add_special_tokens=False).ids
