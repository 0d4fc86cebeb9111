"""Tokenizers: the default model's with its Hugging Face equivalent, and small trained ones of every known kind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tokenizers
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tokenllm.checkpoint.gguf import read_gguf
from tokenllm.text.bpe import LLAMA3, QWEN2
from tokenllm.text.tokenizer import Tokenizer, load_tokenizer

CORPUS = [Path(json.__file__).read_text(), Path(json.decoder.__file__).read_text()] + [
    "Straße, naïve café, œuvre; 東京は日本の首都です。 서울은 한국의 수도. Привет, мир! 🙂🙃 👩‍👩‍👧 ½ ² Ⅷ ٣٤",
    "I'll we've you're it's she'd I'm don't 'S 'LL   \t\t tabs\n\n\n lines \r\n x=1234567;  y  =  3.14159e-10\n",
] * 30
CONTROL = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"]
WORDS = ["<think>", "</think>"]


class Pair(NamedTuple):
    """A tokenizer of ours and the one of the library that it has to equal."""

    ours: Tokenizer
    theirs: tokenizers.Tokenizer

    def __repr__(self) -> str:
        return "Pair"  # hypothesis shows it, and the library's own is endless

    def plain(self, text: str) -> list[int]:
        self.theirs.encode_special_tokens = True
        return self.theirs.encode(text, add_special_tokens=False).ids

    def special(self, text: str) -> list[int]:
        self.theirs.encode_special_tokens = False
        return self.theirs.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="session")
def default_pair(default_model: Path) -> Pair:
    metadata = read_gguf(default_model).metadata
    vocabulary = {token: id_ for id_, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in metadata["tokenizer.ggml.merges"])]
    theirs = tokenizers.Tokenizer(models.BPE(vocabulary, pairs))
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    theirs.decoder = decoders.ByteLevel()
    theirs.add_special_tokens([token for token, id_ in vocabulary.items() if id_ < 17])
    return Pair(load_tokenizer(default_model), theirs)


def words_of(pattern: str) -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def byte_level(pre_tokenizer: pre_tokenizers.PreTokenizer, whole_alphabet: bool = True) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if whole_alphabet else []
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, show_progress=False, special_tokens=CONTROL
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
    return tokenizer


def llama3() -> tokenizers.Tokenizer:
    tokenizer = byte_level(words_of(LLAMA3))
    begin = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    return tokenizer


def qwen2() -> tokenizers.Tokenizer:
    tokenizer = byte_level(words_of(QWEN2))
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def gpt2() -> tokenizers.Tokenizer:
    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))


def smollm() -> tokenizers.Tokenizer:
    """Lacks the bytes its corpus lacks."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return byte_level(pre_tokenizers.Sequence([digits, words]), whole_alphabet=False)


def unknown_words() -> tokenizers.Tokenizer:
    """Byte-level, but with a pattern nobody has compared: the library has to do it."""
    return byte_level(words_of(r"\p{L}+|[^\p{L}]"))


def sentence_piece(prepend_scheme: str) -> tokenizers.Tokenizer:
    """As Llama 2 and Mistral have it: spaces are ▁, unknown characters fall back to bytes."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if prepend_scheme == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    replace = decoders.Replace("▁", " ")
    tokenizer.decoder = decoders.Sequence(
        [replace, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokens = ["<unk>", *CONTROL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=800, show_progress=False, special_tokens=tokens, limit_alphabet=120)
    lines = [line for text in CORPUS for line in text.splitlines()]
    tokenizer.train_from_iterator(lines, trainer)
    content = json.loads(tokenizer.to_str())  # the trainer takes the bytes for control tokens, which they are not
    content["added_tokens"] = content["added_tokens"][: 1 + len(CONTROL)]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
    return tokenizer


KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "llama3": llama3,
    "qwen2": qwen2,
    "gpt2": gpt2,
    "smollm": smollm,
    "unknown words": unknown_words,
    "sentence piece, legacy": lambda: sentence_piece("legacy"),
    "sentence piece, first": lambda: sentence_piece("first"),
    "sentence piece, always": lambda: sentence_piece("always"),
}
TIKTOKEN_KINDS = {"llama3", "qwen2", "gpt2", "smollm"}

CONFIG = json.loads((Path(__file__).parents[1] / "data" / "llama-3.2-1b-config.json").read_text())
CONFIG |= {"bos_token_id": 0, "eos_token_id": 1}


def write_folder(path: Path, tokenizer: tokenizers.Tokenizer, **config: Any) -> Path:
    """A Hugging Face folder without weights."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    made = {kind: (make(), tmp_path_factory.mktemp("model")) for kind, make in KINDS.items()}
    return {kind: Pair(load_tokenizer(write_folder(path, theirs)), theirs) for kind, (theirs, path) in made.items()}


@pytest.fixture(scope="session", params=KINDS)
def pair(request: pytest.FixtureRequest, pairs: dict[str, Pair]) -> Pair:
    return pairs[request.param]


@pytest.fixture(scope="session", params=[kind for kind in KINDS if kind not in TIKTOKEN_KINDS])
def library_pair(request: pytest.FixtureRequest, pairs: dict[str, Pair]) -> Pair:
    return pairs[request.param]


@pytest.fixture(scope="session", params=sorted(TIKTOKEN_KINDS))
def tiktoken_pair(request: pytest.FixtureRequest, pairs: dict[str, Pair]) -> Pair:
    return pairs[request.param]


# characters that are assigned: what kind of character the others will be, the libraries disagree about
_anything = st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=12)
SPACES = [" ", "  ", "\n", "\r\n", " \n ", "\t", "\u00a0", "\u3000", "\x85", "\u200b", "▁"]
NUMBERS = ["0", "123", "4567", "½", "²", "٣", "<0x0A>"]
MARKS = ["'s", "'LL", "_", "!!", "=>", "{", "}", "<", "|", ">", "<|", "|>", "hello", "Hello", " world", " the"]
ABROAD = ["e\u0301", "\u1100\u1161", "\u017f", "İ", "ß", "한국", "東京", "🙂", "👩‍👩‍👧", "\ufffd"]
BYTES_SMOLLM_LACKS = ["\x04", "\x1d", "\U00040000"]
_tricky = st.sampled_from([*SPACES, *NUMBERS, *MARKS, *ABROAD, *BYTES_SMOLLM_LACKS, "\x00"])
_literals = st.sampled_from([*CONTROL, *WORDS, "<|endoftext|>", "<repo_name>", "<|im_", "im_end|>"])
TEXTS = st.lists(_tricky | _anything | _literals, max_size=14).map("".join)


@pytest.fixture(scope="session")
def texts() -> st.SearchStrategy[str]:
    return TEXTS


@pytest.fixture(scope="session")
def kinds() -> dict[str, Callable[[], tokenizers.Tokenizer]]:
    return KINDS


@pytest.fixture(scope="session")
def folder_of() -> Callable[..., Path]:
    return write_folder
