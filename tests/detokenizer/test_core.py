"""Laws of the detokenizer: each uid's news, joined, is its text; and it has exactly one last word, whatever happens."""

import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from tokenllm.detokenizer.core import Detokenizer
from tokenllm.detokenizer.outbox import joined
from tokenllm.messages import (
    FINISH_REASONS,
    STILL_RUNNING,
    Begin,
    Delta,
    Finish,
    Outbound,
    Ready,
    Refused,
    Step,
    Telling,
    Texts,
    TokenLogprob,
    TokenText,
    Vector,
    make_uid,
)
from tokenllm.text.tokenizer import Decoder
from tokenllm.text.vocabulary import AddedToken, Vocabulary

EOS = 300
WORDS = {256: b"stop", 257: b" st", 258: "é🦊".encode(), 259: b"op", 260: b"\xf0\x9f"}
PIECES = {byte: bytes([byte]) for byte in range(256)} | WORDS | {EOS: b"<eos>"}
FINISHED = {reason: 1 + place for place, reason in enumerate(FINISH_REASONS)}


def no_encoder() -> Iterator[None]:
    raise AssertionError("decoding needs no encoder")


DECODER = Decoder(Vocabulary(no_encoder, PIECES, (AddedToken(EOS, "<eos>", special=True),), adds_bos=False))  # type: ignore[arg-type]


def step(entries: list[tuple[int, list[int], int]]) -> Step:
    ids = [id_ for _, some, _ in entries for id_ in some]
    return Step(
        uids=tuple(uid for uid, _, _ in entries),
        counts=tuple(len(some) for _, some, _ in entries),
        ids=struct.pack(f"<{len(ids)}i", *ids),
        finished=tuple(finished for _, _, finished in entries),
        cached_tokens=tuple(range(len(entries))),
        logprobs={
            uid: tuple(TokenLogprob(id_, -0.5, ((id_, -0.5),)) for id_ in some) for uid, some, _ in entries if uid % 2
        },
    )


def expected(ids: list[int], stop: tuple[str, ...], reason: str) -> tuple[str, str]:
    """The text and the reason, by decoding more and more of the ids until a stop string is in what cannot change."""
    for used in range(1, len(ids) + 1):
        text = b"".join(PIECES[id_] for id_ in ids[:used] if id_ != EOS).decode("utf-8", "replace")
        certain = text.rstrip("\ufffd") if used < len(ids) else text
        found = [(certain.find(one) + len(one), certain.find(one)) for one in stop if one in certain]
        if found:
            return certain[: min(found)[1]], "stop"
    return b"".join(PIECES[id_] for id_ in ids if id_ != EOS).decode("utf-8", "replace"), reason


IDS = st.lists(st.sampled_from([*WORDS, EOS, *b"stop e", 0xC3, 0xA9]), max_size=4)


@st.composite
def lives(draw: st.DrawFn) -> list[tuple[int, tuple[str, ...], list[list[int]], str]]:
    """Requests of three gateways: uid, stop strings, ids of each step, and how the scheduler ends them."""
    return [
        (
            make_uid(n % 3, 1, n),
            tuple(draw(st.lists(st.sampled_from(["stop", "op", "é", "e e"]), max_size=2))),
            draw(st.lists(IDS, min_size=1, max_size=8)),
            draw(st.sampled_from(FINISH_REASONS)),
        )
        for n in range(draw(st.integers(1, 7)))
    ]


def news_of(answers: list[dict[int, Outbound]]) -> dict[int, Delta]:
    told: dict[int, Delta] = {}
    for answer in answers:
        for slot, texts in answer.items():
            assert isinstance(texts, Texts)
            for delta in texts.deltas:
                assert delta.uid >> 56 == slot, "news goes to the gateway that asked"
                earlier = told.get(delta.uid)
                assert earlier is None or earlier.finish is None, "nothing follows a last word"
                told[delta.uid] = joined(earlier, delta) if earlier else delta
    return told


@given(lives())
@settings(max_examples=300, deadline=None)
def test_every_uid_gets_its_text_and_one_last_word(
    requests: list[tuple[int, tuple[str, ...], list[list[int]], str]],
) -> None:
    detokenizer, answers = Detokenizer(DECODER, 3), []
    for uid, stop, _, _ in requests:
        assert detokenizer.accept(Begin(uid, 5, Telling(stop))) == {}
    for n in range(8):
        running = [
            (uid, steps[n], FINISHED[reason] if n == len(steps) - 1 else STILL_RUNNING)
            for uid, _, steps, reason in requests
            if n < len(steps)
        ]
        answers.append(detokenizer.accept(step(running)))
    told = news_of(answers)
    assert told.keys() == {uid for uid, _, _, _ in requests}
    for uid, stop, steps, reason in requests:
        ids, news = [id_ for some in steps for id_ in some], told[uid]
        shown = [*ids[:-1], EOS] if reason == "stop" and steps[-1] else ids  # what ends a text is none of it
        assert (news.text, news.finish and news.finish.reason) == expected(shown, stop, reason)
        assert news.finish and news.finish.prompt_tokens == 5
        assert news.tokens == news.finish.completion_tokens
        assert len(news.logprobs) == (news.tokens if uid % 2 else 0)
        if news.finish.by_stop_string:
            assert news.finish.reason == "stop"
        elif reason != "stop" and news.finish.reason != "stop":
            assert news.tokens == len(ids)


def test_a_stop_string_is_the_last_word_and_the_abort_that_follows_is_not() -> None:
    detokenizer = Detokenizer(DECODER, 1)
    detokenizer.accept(Begin(1, 9, Telling(("stop",))))
    assert detokenizer.accept(step([(1, [*b"a st"], 0)])) == {0: Texts((Delta(1, "a ", 4, texts(b"a st")),))}
    finish = Finish("stop", prompt_tokens=9, cached_tokens=0, completion_tokens=5, by_stop_string=True)
    assert detokenizer.accept(step([(1, [259, *b"more"], 0)])) == {
        0: Texts((Delta(1, "", 1, texts(b"op", whole=True), finish),))
    }
    assert detokenizer.accept(step([(1, [*b"more"], 0)])) == {}
    assert detokenizer.accept(step([(1, [], FINISHED["abort"])])) == {}


def test_a_stop_string_in_the_last_token_is_what_ended_the_text() -> None:
    detokenizer = Detokenizer(DECODER, 1)
    detokenizer.accept(Begin(2, 9, Telling(("stop",))))
    (news,) = detokenizer.accept(step([(2, [256], FINISHED["length"])])).values()
    assert news == Texts((Delta(2, "", 1, finish=Finish("stop", 9, 0, 1, by_stop_string=True)),))


def texts(data: bytes, whole: bool = False) -> tuple[TokenText, ...]:
    tokens = {259: data} if whole else {byte: bytes([byte]) for byte in data}
    return tuple(
        TokenText(one.decode(), one, -0.5, ((one.decode(), one, -0.5),), id_, (id_,)) for id_, one in tokens.items()
    )


def test_a_token_that_ends_the_text_is_none_of_it() -> None:
    detokenizer = Detokenizer(DECODER, 1)
    detokenizer.accept(Begin(2, 9))
    (news,) = detokenizer.accept(step([(2, [*b"ab", 256], FINISHED["stop"])])).values()
    assert news == Texts((Delta(2, "ab", 3, finish=Finish("stop", 9, 0, 3)),))


def test_special_tokens_show_where_they_are_wanted() -> None:
    detokenizer = Detokenizer(DECODER, 1)
    detokenizer.accept(Begin(2, 9, Telling(special_tokens=True, each_token=True)))
    (news,) = detokenizer.accept(step([(2, [97, EOS], FINISHED["length"])])).values()
    each = TokenText("a", b"a", 0.0, id=97), TokenText("<eos>", b"<eos>", 0.0, id=EOS)
    assert news == Texts((Delta(2, "a<eos>", 2, each, Finish("length", 9, 0, 2)),))


def test_a_prompts_logprobs_come_before_the_text() -> None:
    """Where only they were asked for, the token that the engine could not but generate is not told."""
    detokenizer, last = Detokenizer(DECODER, 1), FINISHED["stop"]
    detokenizer.accept(Begin(1, 9, Telling(nothing=True)))
    foretold = {1: (TokenLogprob(98, -0.5, ((98, -0.5),)),), 3: (TokenLogprob(98, -0.5),)}
    (news,) = detokenizer.accept(replace(step([(1, [97], last)]), prompt_logprobs=foretold)).values()
    assert news == Texts((Delta(1, "", 0, texts(b"b")), Delta(1, "", 0, (), Finish("length", 9, 0, 0))))


@pytest.mark.parametrize("reason", ["abort", "error", "length"])
def test_what_was_held_back_is_shown_at_the_end(reason: str) -> None:
    detokenizer = Detokenizer(DECODER, 1)
    detokenizer.accept(Begin(2, 9, Telling(("stopped",))))
    detokenizer.accept(step([(2, [256], 0)]))
    (news,) = detokenizer.accept(step([(2, [0xC3], FINISHED[reason])])).values()
    assert isinstance(news, Texts)
    assert news.deltas[0].text == "stop\ufffd"
    assert news.deltas[0].finish == Finish(reason, 9, 0, 2)  # type: ignore[arg-type]


def test_ready_goes_to_every_gateway_and_a_refusal_to_one() -> None:
    detokenizer, ready = Detokenizer(DECODER, 3), Ready(1, 100, 50)
    assert detokenizer.accept(ready) == {0: ready, 1: ready, 2: ready}
    refused = Refused(make_uid(2, 1, 1), 429, "queue_full", "full")
    assert detokenizer.accept(refused) == {2: refused}


def test_a_vector_is_passed_on_and_its_last_word_follows() -> None:
    """To whoever still waits for it."""
    uid, gone = make_uid(1, 1, 1), make_uid(1, 1, 2)
    detokenizer = Detokenizer(DECODER, 2)
    detokenizer.accept(Begin(uid, 5))
    news = [detokenizer.accept(message) for message in (Vector(uid, b"ab"), Vector(gone, b"zz"), Vector(uid, b"cd"))]
    assert news == [{1: Texts((Delta(uid, "", 0, vector=b"ab"),))}, {}, {1: Texts((Delta(uid, "", 0, vector=b"cd"),))}]
    [delta] = detokenizer.accept(step([(uid, [], FINISHED["stop"])]))[1].deltas  # type: ignore[union-attr]
    assert delta == Delta(uid, "", 0, finish=Finish("stop", 5, 0, 0))
