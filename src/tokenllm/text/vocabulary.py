"""What a model's files say about its tokens, in the form of a Hugging Face tokenizer.json.

A byte-level BPE whose parts are all recognised is encoded by tiktoken; anything else by the `tokenizers` library.
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import tokenizers

from tokenllm.checkpoint import CheckpointError
from tokenllm.checkpoint.description import read_json
from tokenllm.checkpoint.gguf import read_gguf
from tokenllm.text.bpe import (
    BYTES,
    GPT2,
    PATTERNS,
    SMOLLM,
    ByteLevelBpe,
    Encoder,
    LibraryEncoder,
    TiktokenEncoder,
    is_exact,
    to_bytes,
)
from tokenllm.text.gguf_vocabulary import SPACE, tokenizer_json

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class AddedToken(msgspec.Struct, frozen=True):
    """A token matched by its literal before anything else. `special` ones are control tokens, and never shown."""

    id: int
    content: str
    special: bool = False
    lstrip: bool = False  # swallows white space before it
    rstrip: bool = False
    single_word: bool = False


class Vocabulary(msgspec.Struct, frozen=True):
    """Everything a `Tokenizer` is made of but the ends of text."""

    make_encoder: Callable[[], Encoder]  # seconds of work for a large vocabulary, and only some need it
    pieces: dict[int, bytes]  # every token's bytes, those of added tokens included
    added: tuple[AddedToken, ...]
    adds_bos: bool  # to a prompt that no chat template has rendered
    leading_space: bool = False  # text begins with a space that decoding drops


def load_vocabulary(path: Path) -> Vocabulary:
    if path.suffix == ".gguf":
        return vocabulary_of(tokenizer_json(read_gguf(path)), path)
    file = path / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"{path}: holds no tokenizer.json")
    return vocabulary_of(read_json(file), file)


def vocabulary_of(content: dict[str, Any], path: Path) -> Vocabulary:
    try:
        added = tuple(msgspec.convert(content.get("added_tokens", []), list[AddedToken]))
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path}: added_tokens: {error}") from error
    if single := [token.content for token in added if token.single_word]:
        raise CheckpointError(f"{path}: added_tokens {single}: single_word is not supported")
    literals = _literals(added)
    ordinary = {token: id_ for token, id_ in _numbered_tokens(content, path) if id_ not in literals}
    decoded, leading_space = _decoded_pieces(content.get("decoder"), ordinary, path)
    adds_bos = _adds_bos(content.get("post_processor"))

    def make_encoder() -> Encoder:
        bpe = _recognised(content, ordinary)
        return TiktokenEncoder(bpe) if bpe and is_exact(bpe) else _library_encoder(content, path)

    return Vocabulary(make_encoder, decoded | literals, added, adds_bos, leading_space)


def _literals(added: tuple[AddedToken, ...]) -> dict[int, bytes]:
    return {token.id: token.content.encode() for token in added}


def _numbered_tokens(content: dict[str, Any], path: Path) -> Iterable[tuple[str, int]]:
    """Unigram models list pairs of token and score, the others map tokens to ids."""
    match content:
        case {"model": {"vocab": dict(ids)}}:
            return ids.items()
        case {"model": {"vocab": list(pairs)}}:
            return ((token, id_) for id_, (token, _) in enumerate(pairs))
    raise CheckpointError(f"{path}: model.vocab is missing")


def _recognised(content: dict[str, Any], ordinary: dict[str, int]) -> ByteLevelBpe | None:
    """The byte-level BPE of a tokenizer.json of which nothing is left out; None if it is anything else."""
    model, normalizer = content["model"], content.get("normalizer")
    pattern = _pattern(content.get("pre_tokenizer"))
    unusual = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if model.get("type") != "BPE" or not pattern or normalizer not in (None, {"type": "NFC"}):
        return None
    if any(model.get(key) for key in unusual) or (model.get("unk_token") and BYTES.keys() - ordinary.keys()):
        return None
    pairs: list[Any] = [
        tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model.get("merges", ())
    ]
    if any(len(pair) != 2 for pair in pairs):
        return None
    return ByteLevelBpe(ordinary, pairs, pattern, normalizer is not None, model.get("ignore_merges", False))


def _pattern(pre_tokenizer: Any) -> str | None:
    """The words a tokenizer.json cuts text into before it maps them to bytes."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False} if pre_tokenizer.get("use_regex", True):
            return GPT2
        case {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, words]}:
            return SMOLLM if _pattern(words) == GPT2 else None
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return pattern if pattern in PATTERNS else None
    return None


def _library(content: dict[str, Any], path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(content | {"post_processor": None}))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{path}: {error}") from error


def _library_encoder(content: dict[str, Any], path: Path) -> LibraryEncoder:
    """An encoder that knows the beginning of a prompt, where some models put a space before the first word."""
    words = json.dumps(content.get("pre_tokenizer"))
    later = content | {
        "pre_tokenizer": json.loads(words.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"'))
    }
    return LibraryEncoder(_library(content, path), _library(later, path) if later != content else None)


def _decoded_pieces(decoder: Any, ordinary: dict[str, int], path: Path) -> tuple[dict[int, bytes], bool]:
    """The bytes each token decodes to, and whether the space that text begins with is dropped."""
    match decoder:
        case {"type": "ByteLevel"}:
            return _byte_level_pieces(ordinary), False
        case {"type": "Metaspace", "replacement": "▁"}:
            return _sentence_pieces(ordinary), decoder.get("prepend_scheme", "always") != "never"
        case {"type": "Sequence", "decoders": [{"type": "Replace", "content": " "}, {"type": "ByteFallback"}, *rest]}:
            return _sentence_pieces(ordinary), any(one.get("type") == "Strip" for one in rest)
    raise CheckpointError(f"{path}: decoder {json.dumps(decoder)} is not supported")


def _byte_level_pieces(ordinary: dict[str, int]) -> dict[int, bytes]:
    return {id_: to_bytes(token) if BYTES.keys() >= set(token) else token.encode() for token, id_ in ordinary.items()}


def _sentence_pieces(ordinary: dict[str, int]) -> dict[int, bytes]:
    return {
        id_: bytes.fromhex(byte[1]) if (byte := BYTE_TOKEN.fullmatch(token)) else token.replace(SPACE, " ").encode()
        for token, id_ in ordinary.items()
    }


def _adds_bos(post_processor: Any) -> bool:
    match post_processor:
        case {"type": "TemplateProcessing", "single": [{"SpecialToken": _}, *_]}:
            return True
        case {"type": "Sequence", "processors": list(processors)}:
            return any(_adds_bos(one) for one in processors)
    return False
