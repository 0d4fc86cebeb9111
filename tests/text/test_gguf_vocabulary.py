"""A GGUF file's tokenizer is the Hugging Face tokenizer it was made from."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenllm.checkpoint import CheckpointError
from tokenllm.checkpoint.gguf import Gguf
from tokenllm.text.bpe import TiktokenEncoder
from tokenllm.text.gguf_vocabulary import tokenizer_json
from tokenllm.text.tokenizer import Tokenizer
from tokenllm.text.vocabulary import vocabulary_of

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNUSED_TOKEN = "[PAD]"


def gguf(**entries: Any) -> Gguf:
    return Gguf(Path("some.gguf"), {f"tokenizer.ggml.{key}": value for key, value in entries.items()}, {}, np.empty(0))


def converted(theirs, **entries: Any) -> Gguf:
    """What llama.cpp's converter makes of a tokenizer."""
    content = json.loads(theirs.to_str())
    ids = theirs.get_vocab(with_added_tokens=True)
    tokens = [*sorted(ids, key=ids.__getitem__), UNUSED_TOKEN]
    special = {token["content"]: token["special"] for token in content["added_tokens"]}
    types = [
        USER_DEFINED if special.get(token) is False else CONTROL if token in special else NORMAL for token in tokens
    ]
    types = [BYTE if token.startswith("<0x") else type_ for token, type_ in zip(tokens, types, strict=True)]
    types[-1] = UNUSED
    merges = [" ".join(pair) for pair in content["model"]["merges"]]
    return gguf(tokens=tokens, token_type=types, merges=merges, **entries)


def loaded(file: Gguf) -> Tokenizer:
    return Tokenizer(vocabulary_of(tokenizer_json(file), file.path), frozenset({1}), 0)


@pytest.fixture(scope="module", params=[("llama3", "llama-bpe"), ("smollm", "smollm"), ("gpt2", "gpt-2")])
def byte_level(request: pytest.FixtureRequest, pairs):
    kind, pre = request.param
    return loaded(converted(pairs[kind].theirs, model="gpt2", pre=pre)), pairs[kind]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_byte_level(byte_level, texts, data: st.DataObject) -> None:
    ours, pair = byte_level
    text = data.draw(texts)
    assert isinstance(ours._encoder, TiktokenEncoder)
    assert ours.encode(text) == pair.plain(text)
    assert ours.encode_with_specials(text) == (ids := pair.special(text))
    assert ours.decode(ids) == pair.theirs.decode(ids)


@pytest.fixture(scope="module")
def sentence_piece(pairs):
    theirs = pairs["sentence piece, legacy"].theirs
    file = converted(theirs, model="llama")
    tokens, types = file.metadata["tokenizer.ggml.tokens"], file.metadata["tokenizer.ggml.token_type"]
    types[tokens.index("<unk>")] = UNKNOWN
    born = {left + right: -float(at) for at, (left, right) in enumerate(json.loads(theirs.to_str())["model"]["merges"])}
    scores = [born.get(token, 0.0) for token in tokens]
    return loaded(gguf(model="llama", tokens=tokens, token_type=types, scores=scores)), pairs["sentence piece, legacy"]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_sentence_piece(sentence_piece, texts, data: st.DataObject) -> None:
    ours, pair = sentence_piece
    text = data.draw(texts)
    assert ours.encode(text) == pair.plain(text)
    assert ours.encode_with_specials(text) == (ids := pair.special(text))
    assert ours.decode(ids) == pair.theirs.decode(ids)


@pytest.fixture(scope="module")
def treacherous() -> tuple[Tokenizer, list[int]]:
    """Control tokens whose parts are ordinary tokens, a control token of one letter, and bytes that are missing."""
    ordinary = ["▁", "<", "s", ">", "/", "a", "<s", "s>", "▁a", "/s", "</", "<0", "x0", "A>", "<0x0", "0", "x", "A"]
    kinds = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL, "§": CONTROL}
    kinds |= {f"<0x{byte:02X}>": BYTE for byte in range(128)} | dict.fromkeys(ordinary, NORMAL)
    scores = [-float(len(token)) for token in kinds]
    file = gguf(model="llama", tokens=list(kinds), token_type=list(kinds.values()), scores=scores)
    return loaded(file), list(kinds.values())


@given(text=st.text("<s>/a§ 0xA", max_size=12) | st.text(max_size=3))
def test_plain_text_holds_no_control_token(treacherous: tuple[Tokenizer, list[int]], text: str) -> None:
    tokenizer, types = treacherous
    ids = tokenizer.encode(text)
    assert not {types[id_] for id_ in ids} & {CONTROL, UNKNOWN}
    if text.isascii():
        assert tokenizer.decode(ids) == text
    if set(text) <= set("<s>/a 0xA"):
        assert BYTE not in {types[id_] for id_ in ids}, "nor a byte for its literal"


def test_what_begins_a_prompt(pairs) -> None:
    theirs = pairs["gpt2"].theirs
    begins = {pre: loaded(converted(theirs, model="gpt2", pre=pre)).adds_bos for pre in ("llama-bpe", "gpt-2")}
    assert begins == {"llama-bpe": True, "gpt-2": False}
    assert loaded(converted(theirs, model="gpt2", pre="gpt-2", add_bos_token=True)).adds_bos
    assert not loaded(converted(theirs, model="gpt2", pre="llama-bpe", add_bos_token=False)).adds_bos


@pytest.mark.parametrize(
    ("entries", "complaint"),
    [
        ({"model": "bert"}, "'bert' with pre-tokenizer None is not supported"),
        ({"model": "gpt2", "pre": "tekken"}, "'gpt2' with pre-tokenizer 'tekken' is not supported"),
        ({"model": "gpt2", "pre": "smollm"}, "tokenizer.ggml.tokens is missing"),
        ({"model": "llama", "tokens": ["a"], "token_type": [1]}, "tokenizer.ggml.scores is missing"),
        ({"model": "llama", "tokens": ["a"], "token_type": [1, 1]}, "1 tokenizer.ggml.tokens and 2 token_type"),
    ],
)
def test_what_is_not_understood(entries: dict[str, Any], complaint: str) -> None:
    with pytest.raises(CheckpointError, match=f"some.gguf: .*{complaint}"):
        loaded(gguf(**entries))
