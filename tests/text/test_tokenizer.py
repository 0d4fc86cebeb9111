"""Every tokenizer equals the library's; control tokens come from literals only where asked; bytes come back."""

import json
import re
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenllm.checkpoint import CheckpointError
from tokenllm.text import bpe, tokenizer
from tokenllm.text.bpe import LibraryEncoder, TiktokenEncoder
from tokenllm.text.tokenizer import load_decoder, load_tokenizer
from tokenllm.text.trie import trie_pattern
from tokenllm.text.vocabulary import AddedToken


def check(pair, text: str) -> None:
    ids = pair.ours.encode(text)
    assert ids == pair.plain(text)
    assert pair.ours.encode_with_specials(text) == pair.special(text)
    assert not pair.ours.special_ids.intersection(ids)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_the_default_model_equals_the_library(default_pair, texts, data) -> None:
    assert isinstance(default_pair.ours._encoder, TiktokenEncoder)
    check(default_pair, data.draw(texts))


@pytest.mark.slow
@settings(max_examples=8000, deadline=None)
@given(data=st.data())
def test_the_default_model_equals_the_library_on_thousands_of_texts(default_pair, texts, data) -> None:
    check(default_pair, data.draw(texts))


@pytest.mark.slow
@pytest.mark.parametrize("context", ["a{}b", "{0} {0}", "'{} x", "1{}2", " {}\n{}", "{0}{0}!"])
def test_the_default_model_equals_the_library_on_every_character(default_pair, context: str) -> None:
    characters = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) not in ("Cs", "Cn")]
    for at in range(0, len(characters), 500):
        text = "\n".join(context.format(char, char) for char in characters[at : at + 500])
        assert default_pair.ours.encode(text) == default_pair.plain(text)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_kind_equals_the_library(pair, texts, data) -> None:
    check(pair, data.draw(texts))


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(data=st.data())
def test_every_kind_equals_the_library_on_thousands_of_texts(pair, texts, data) -> None:
    check(pair, data.draw(texts))


def test_tiktoken_does_what_it_can(tiktoken_pair) -> None:
    assert isinstance(tiktoken_pair.ours._encoder, TiktokenEncoder)


def test_the_library_does_the_rest(library_pair) -> None:
    assert isinstance(library_pair.ours._encoder, LibraryEncoder)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_text_decodes_as_the_library_decodes_it(pair, texts, data) -> None:
    ids = pair.special(data.draw(texts))
    assert pair.ours.decode(ids) == pair.theirs.decode(ids)
    assert pair.ours.decode(ids, skip_special=False) == pair.theirs.decode(ids, skip_special_tokens=False)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_ids_decode_as_the_library_decodes_them(tiktoken_pair, data) -> None:
    ids = data.draw(st.lists(st.integers(0, tiktoken_pair.ours.vocab_size - 1), max_size=20))
    assert tiktoken_pair.ours.decode(ids) == tiktoken_pair.theirs.decode(ids)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_text_comes_back(default_pair, pairs, texts, data) -> None:
    text = data.draw(texts)
    missing = set("\x04\x06\x13\x14\x16\x1d\U00040000")
    if not missing.intersection(text):
        assert default_pair.ours.decode(default_pair.ours.encode(text)) == text
    assert pairs["llama3"].ours.decode(pairs["llama3"].ours.encode(text)) == text
    assert pairs["qwen2"].ours.decode(pairs["qwen2"].ours.encode(text)) == unicodedata.normalize("NFC", text)


def test_the_default_model(default_pair) -> None:
    tokenizer = default_pair.ours
    assert (tokenizer.vocab_size, tokenizer.eos_ids, tokenizer.bos_id, tokenizer.adds_bos) == (49152, {2}, 1, False)
    assert tokenizer.special_ids == set(range(17))
    assert tokenizer.special_literals[:3] == ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    assert tokenizer.encode("Hello, world") == [19556, 28, 905]
    assert tokenizer.encode_with_specials("<|im_start|>user") == [1, 4093]
    assert tokenizer.encode("<|im_start|>user") == [44, 108, 306, 79, 3738, 108, 46, 4093]
    assert (tokenizer.token_bytes(905), tokenizer.token_bytes(1), tokenizer.token_bytes(10**6)) == (
        b" world",
        b"<|im_start|>",
        b"",
    )
    assert tokenizer.decode([1, 19556, 10**6, 905]) == "Hello world"
    assert tokenizer.decode([1, 19556], skip_special=False) == "<|im_start|>Hello"


def test_what_begins_a_prompt(pairs) -> None:
    assert (pairs["llama3"].ours.adds_bos, pairs["llama3"].ours.bos_id) == (True, 0)
    assert not pairs["qwen2"].ours.adds_bos


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "ok <|im_start|>\udc00"])
def test_half_a_character_is_refused(pair, text: str) -> None:
    with pytest.raises(ValueError, match="lone surrogate"):
        pair.ours.encode(text)
    with pytest.raises(ValueError, match="lone surrogate"):
        pair.ours.encode_with_specials(text)


def test_a_decoder_is_the_same_without_the_encoder(default_model: Path, default_pair) -> None:
    decoder = load_decoder(default_model)
    assert decoder.pieces == default_pair.ours.pieces
    assert decoder.shown_pieces == default_pair.ours.shown_pieces


def test_many_threads_at_once(default_pair) -> None:
    texts = [f"{i} little threads, {'sitting on a wall ' * i}\x04 {chr(0x4E00 + i)}" for i in range(200)]
    alone = [default_pair.ours.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(default_pair.ours.encode, texts)) == alone


def test_encoding_lets_other_threads_run(default_pair) -> None:
    text = "abcdefghijklmnopqrstuvwxyz" * 40_000
    longest, running = 0.0, True
    with ThreadPoolExecutor(1) as thread:
        encoding = thread.submit(default_pair.ours.encode, text)
        before = time.monotonic()
        started = before
        while running:
            time.sleep(0.001)
            now = time.monotonic()
            running, longest, before = not encoding.done(), max(longest, now - before), now
    assert longest < (now - started) / 2, f"held up for {longest:.3f} s of {now - started:.3f} s"


@given(st.lists(st.text("ab.*|", min_size=1, max_size=4), min_size=1), st.text("ab.*|c"))
def test_a_trie_finds_the_longest(words: list[str], text: str) -> None:
    match = re.match(trie_pattern(words), text)
    expected = max((word for word in words if text.startswith(word)), key=len, default=None)
    assert (match and match[0]) == expected


def test_stripping_tokens_swallow_white_space(tmp_path: Path, folder_of, kinds) -> None:
    theirs = kinds["llama3"]()
    theirs.add_special_tokens(
        [tokenizers.AddedToken("<|r|>", rstrip=True), tokenizers.AddedToken("<|l|>", lstrip=True)]
    )
    ours = load_tokenizer(folder_of(tmp_path, theirs))
    for text in ("a <|r|>  b", "a  <|l|> b", "<|l|> <|r|>", "a\n<|r|>\n\n<|l|>\n"):
        assert ours.encode_with_specials(text) == theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model": {}}, r"model\.vocab is missing"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a"]}}, ""),
        ({"decoder": {"type": "WordPiece"}}, "decoder .*WordPiece.* is not supported"),
        ({"added_tokens": [{"id": "x"}]}, "added_tokens: "),
        ({"added_tokens": [{"id": 1, "content": "x", "single_word": True}]}, "single_word is not supported"),
    ],
)
def test_a_folder_that_cannot_be_read(tmp_path: Path, folder_of, kinds, change, complaint: str) -> None:
    folder = folder_of(tmp_path, kinds["gpt2"]())
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(content | change))
    with pytest.raises(CheckpointError, match=rf"tokenizer\.json: .*{complaint}"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no tokenizer\.json"):
        load_tokenizer(folder)


@given(st.lists(st.sampled_from(["<|", "|>", "<|a|>", "<|a|>b", "a", "<", " "])), st.integers(1, 9))
def test_literals_are_found_wherever_a_window_ends(pieces: list[str], window: int) -> None:
    literals = ["<|a|>", "<|a|>b", "|>", "a"]
    splitter = tokenizer._Splitter(AddedToken(i, literal, special=True) for i, literal in enumerate(literals))
    whole = re.split(f"({trie_pattern(literals)})", "".join(pieces))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "WINDOW", window)
        found = splitter.split("".join(pieces))
    assert found == [literals.index(part) if at % 2 else part for at, part in enumerate(whole)]


@given(st.integers(0, 3), st.integers(0, 40), st.integers(0, 3))
def test_an_endless_run_of_white_space_is_never_overlooked(before: int, run: int, after: int) -> None:
    text = "x" * before + " " * run + "x" * after
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe, "WITHIN", 10)
        assert bpe._may_be_endless(text) or run < 20
