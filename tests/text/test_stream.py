"""The law of streams: however ids arrive, what was shown is what they decode to, cut before the first stop string."""

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenllm.text.stream import TextStream, token_text


def deltas(decoder, ids: list[int], cuts: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    """What is shown when the ids come in these portions."""
    stream, shown, at = TextStream(decoder, stop), [], 0
    for count in [*cuts, len(ids)]:
        shown.append(stream.push(ids[at : at + count]))
        at += count
    return [*shown, stream.finish()], stream


def cut(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The text up to where the first stop string to become complete begins, the longest if several do."""
    for end in range(len(text) + 1):
        if found := [len(one) for one in stop if text[:end].endswith(one)]:
            return text[: end - max(found)], True
    return text, False


def some_ids(data: st.DataObject, pair, texts: st.SearchStrategy[str]) -> list[int]:
    """The ids of text, or any ids at all, broken characters and unknown ids included."""
    any_id = st.integers(0, pair.ours.vocab_size + 3)
    encoded = texts.map(pair.ours.encode_with_specials)
    return data.draw(
        encoded | st.lists(any_id, max_size=30) | st.tuples(encoded, encoded).map(lambda two: two[0][:-1] + two[1])
    )


CUTS = st.lists(st.integers(0, 4), max_size=20)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_deltas_joined_are_the_decoded_ids(pair, texts, data) -> None:
    ids = some_ids(data, pair, texts)
    shown, stream = deltas(pair.ours, ids, data.draw(CUTS))
    assert "".join(shown) == pair.ours.decode(ids)
    assert (stream.stopped, stream.tokens_used) == (False, len(ids))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_whole_characters_only(default_pair, texts, data) -> None:
    """A replacement character is only shown where the bytes are broken, not where they are incomplete."""
    ids = default_pair.ours.encode(data.draw(texts))
    shown, _ = deltas(default_pair.ours, ids, [1] * len(ids))
    assert "".join(shown).count("\ufffd") == default_pair.ours.decode(ids).count("\ufffd")
    assert shown[-1] == ""


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_stop_strings_cut_and_never_show(pair, texts, data) -> None:
    ids = some_ids(data, pair, texts)
    text = pair.ours.decode(ids)
    part = st.tuples(st.integers(0, max(len(text) - 1, 0)), st.integers(1, 6)).map(lambda p: text[p[0] : sum(p)])
    stop = tuple(data.draw(st.lists(part | st.text("abe ", max_size=3) | st.just("\ufffd"), max_size=4)))
    real = tuple(one for one in stop if one)
    shown, stream = deltas(pair.ours, ids, data.draw(CUTS), stop)
    expected, stopped = cut(text, real)
    assert ("".join(shown), stream.stopped) == (expected, stopped)
    seen = "".join(shown[:-1])
    assert not any(seen.endswith(one[:n]) for one in real for n in range(1, len(one))) or stopped or shown[-1] == ""


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_as_much_is_shown_as_can_be(data, default_pair) -> None:
    """What is held back is a proper beginning of a stop string, and the longest one there."""
    text = data.draw(st.text("ab", max_size=20))
    stop = tuple(data.draw(st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=3)))
    stream, ids = TextStream(default_pair.ours, stop), default_pair.ours.encode(text)
    shown, decoded = "", ""
    for id_ in ids:
        shown, decoded = shown + stream.push([id_]), decoded + default_pair.ours.decode([id_])
        if stream.stopped:
            break
        held = max((n for one in stop for n in range(len(one)) if decoded.endswith(one[:n])), default=0)
        assert shown == decoded[: len(decoded) - held]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_tokens_used_are_those_that_completed_the_stop_string(data, default_pair, texts) -> None:
    ids = default_pair.ours.encode(data.draw(texts))
    text = default_pair.ours.decode(ids)
    at = data.draw(st.integers(0, max(len(text) - 2, 0)))
    stop = (text[at : at + 2] or "x",)
    _, stream = deltas(default_pair.ours, ids, data.draw(CUTS), stop)
    needed = [n for n in range(len(ids) + 1) if stop[0] in default_pair.ours.decode(ids[:n])]
    # a broken character at the very end only shows when the text ends
    assert stream.tokens_used == (needed[0] if needed else len(ids)) or "\ufffd" in text


def test_the_first_to_be_complete_wins(default_pair) -> None:
    ids = default_pair.ours.encode("xabcdx")
    for cuts in ([1] * 6, [6], [2, 1]):
        for stop, shown in {
            ("abcd", "c"): "xab",
            ("bc", "abc"): "x",
            ("d", "abcd", "cd"): "x",
            ("zz",): "xabcdx",
        }.items():
            assert "".join(deltas(default_pair.ours, ids, cuts, stop)[0]) == shown


def test_after_a_stop_nothing_changes(default_pair) -> None:
    tokenizer = default_pair.ours
    stream = TextStream(tokenizer, ("b",))
    assert stream.push(tokenizer.encode("a") + tokenizer.encode("b")) == "a"
    used = stream.tokens_used
    assert (stream.push(tokenizer.encode("more")), stream.finish(), stream.tokens_used) == ("", "", used)
    assert used == 2


def test_control_tokens_are_not_shown(default_pair) -> None:
    stream = TextStream(default_pair.ours)
    assert stream.push([1, 19556, 2, 905]) == "Hello world"
    assert TextStream(default_pair.ours, ("<|im_end|>",)).push([19556, 2, 905]) == "Hello world"


def test_a_character_in_pieces(default_pair) -> None:
    ids = default_pair.ours.encode("🙂")
    assert len(ids) > 1
    stream = TextStream(default_pair.ours)
    assert [stream.push([id_]) for id_ in ids] == [""] * (len(ids) - 1) + ["🙂"]
    stream.push(ids[:1])
    assert stream.finish() == "\ufffd"


def test_a_token_for_logprobs(default_pair) -> None:
    first = default_pair.ours.encode("🙂")[0]
    assert token_text(default_pair.ours, 905) == (" world", b" world")
    assert token_text(default_pair.ours, 2) == ("<|im_end|>", b"<|im_end|>")
    assert token_text(default_pair.ours, first) == ("\ufffd", default_pair.ours.token_bytes(first))
    assert token_text(default_pair.ours, 10**6) == ("", b"")


@pytest.mark.timeout(20)
def test_long_stop_strings_are_quick(default_pair) -> None:
    ids = default_pair.ours.encode("a" * 4000)
    stream = TextStream(default_pair.ours, ("a" * 3999 + "b", "b" + "a" * 3999))
    assert "".join([stream.push([id_]) for id_ in ids]) + stream.finish() == "a" * 4000


def test_a_stream_costs_no_more_for_its_stop_strings(default_pair) -> None:
    stops = tuple(chr(ord("a") + i) * 1024 for i in range(16))
    tracemalloc.start()
    streams = [TextStream(default_pair.ours, stops) for _ in range(64)]
    cost, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert cost < 1024 * len(streams)
    assert streams[0].push(default_pair.ours.encode("ab")) == "a"
