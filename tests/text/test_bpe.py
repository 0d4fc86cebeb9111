"""Where `is_exact` says so, tiktoken and the library agree on every text there is."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenllm.text.bpe import (
    BYTES,
    GPT2,
    LLAMA3,
    LONGEST_WHITE_SPACE,
    PATTERNS,
    SMOLLM,
    ByteLevelBpe,
    LibraryEncoder,
    TiktokenEncoder,
    is_exact,
    library_tokenizer,
)

EVERY_WORD = ["".join(letters) for length in range(1, 8) for letters in product("ab", repeat=length)]


@st.composite
def merge_lists(draw: st.DrawFn) -> ByteLevelBpe:
    """Random merges of a's and b's; ids follow the merges, or nearly; some tokens may lack a merge."""
    vocabulary = {char: at for at, char in enumerate(BYTES)}
    merges: list[tuple[str, str]] = []
    for _ in range(draw(st.integers(0, 9))):
        known = [token for token in vocabulary if set(token) <= {"a", "b"}]
        left, right = draw(st.sampled_from(known)), draw(st.sampled_from(known))
        vocabulary.setdefault(left + right, len(vocabulary))
        if draw(st.integers(0, 9)) and (left, right) not in merges:
            merges.append((left, right))
    if merges and not draw(st.integers(0, 5)):
        merges.append(merges.pop(draw(st.integers(0, len(merges) - 1))))
    return ByteLevelBpe(vocabulary, merges, GPT2, ignore_merges=draw(st.booleans()))


def differing(bpe: ByteLevelBpe) -> list[str]:
    library, ours = LibraryEncoder(library_tokenizer(bpe)), TiktokenEncoder(bpe)
    return [word for word in EVERY_WORD if ours.encode(word, True) != library.encode(word, True)]


@settings(max_examples=150)
@given(merge_lists())
def test_exact_means_equal_on_every_text(bpe: ByteLevelBpe) -> None:
    if is_exact(bpe):
        assert not differing(bpe)


def model(*merges: tuple[str, str], extra: tuple[str, ...] = (), ignore_merges: bool = False) -> ByteLevelBpe:
    tokens = [*BYTES, *dict.fromkeys(left + right for left, right in merges), *extra]
    return ByteLevelBpe({token: at for at, token in enumerate(tokens)}, list(merges), GPT2, ignore_merges=ignore_merges)


def test_what_is_exact_and_what_is_not() -> None:
    assert is_exact(model(("a", "b"), ("ab", "a")))
    # bc comes first, so the library never sees ab beside c: it keeps a, bc where tiktoken makes abc
    torn = model(("b", "c"), ("a", "b"), ("ab", "c"))
    assert not is_exact(torn)
    assert TiktokenEncoder(torn).encode("abc", True) != LibraryEncoder(library_tokenizer(torn)).encode("abc", True)
    # both ways to make abc are listed, as in models that were converted from tiktoken
    assert is_exact(model(("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")))
    assert not is_exact(model(("a", "b"), extra=("abab",)))
    # never formed, but found as a whole word
    assert not is_exact(model(("a", "b"), extra=("abcd",)))
    assert is_exact(model(("a", "b"), extra=("abcd",), ignore_merges=True))
    swapped = model(("a", "b"), ("c", "d"))
    assert not is_exact(ByteLevelBpe(swapped.vocabulary, swapped.merges[::-1], GPT2))
    assert not is_exact(ByteLevelBpe({"∑": 0}, [], GPT2))


@pytest.mark.parametrize("pattern", PATTERNS, ids=["gpt2", "smollm", "llama3", "qwen2"])
def test_endless_white_space_is_refused_and_long_is_not(pattern: str) -> None:
    encoder = TiktokenEncoder(ByteLevelBpe({char: at for at, char in enumerate(BYTES)}, [], pattern))
    long = " " * (LONGEST_WHITE_SPACE - 1)
    assert len(encoder.encode(f"a{long}b{long}", True)) == 2 * LONGEST_WHITE_SPACE
    with pytest.raises(ValueError, match="100000 white-space characters"):
        encoder.encode(f"a{long} b", True)


@pytest.mark.timeout(10)  # seconds if linear, hours if not
@pytest.mark.parametrize("pattern", [SMOLLM, LLAMA3], ids=["smollm", "llama3"])
@pytest.mark.parametrize("unit", ["a", "!", " " * 99_990 + "x", "ab", "1", "\r\n", "'", "é"])
def test_long_runs_take_linear_time(pattern: str, unit: str) -> None:
    text = unit * ((LONGEST_WHITE_SPACE if unit.isspace() else 500_000) // len(unit) - 1)
    vocabulary = {char: at for at, char in enumerate(BYTES)} | {"aa": 256, "aaaa": 257, "!!": 258}
    bpe = ByteLevelBpe(vocabulary, [("a", "a"), ("aa", "aa"), ("!", "!")], pattern)
    TiktokenEncoder(bpe).encode(text, True)
