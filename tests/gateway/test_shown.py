"""A stream's chunks, joined, are the whole answer: for any ids, stop strings, wishes and ways of coming."""

import json
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenllm.detokenizer.core import Detokenizer
from tokenllm.gateway.chat import ChatFrames, chat_completion
from tokenllm.gateway.completions import CompletionFrames, text_completion
from tokenllm.gateway.gateway import telling
from tokenllm.gateway.reply import Head, Said, joined, total_usage
from tokenllm.gateway.shown import Shown, shown_for
from tokenllm.messages import FINISH_REASONS, STILL_RUNNING, Begin, Delta, Sampling, Step, Submit, Texts, TokenLogprob
from tokenllm.text.tokenizer import Decoder
from tokenllm.text.vocabulary import AddedToken, Vocabulary
from tokenllm_schemas.requests import ChatCompletionRequest, CompletionRequest, Generation, parse

EOS = 300
PIECES = {byte: bytes([byte]) for byte in range(256)} | {256: b"stop", 257: "né".encode(), 258: b" op", EOS: b"<eos>"}
DECODER = Decoder(Vocabulary(lambda: None, PIECES, (AddedToken(EOS, "<eos>", special=True),), adds_bos=False))  # type: ignore[arg-type]
HEAD = Head("x-1", 5, "m", "fp")
IDS = st.lists(st.sampled_from([256, 257, 258, EOS, *b"stop e", 0xC3, 0xA9, 0xF0]), min_size=1, max_size=9)
FINISHED = {reason: 1 + code for code, reason in enumerate(FINISH_REASONS)}


def logprob(id_: int, alternatives: int) -> TokenLogprob:
    top = sorted(((other, -float(other % 7)) for other in (id_, 257, 256, 0xC3)[:alternatives]), key=lambda x: -x[1])
    return TokenLogprob(id_, -float("inf") if id_ == 0xC3 else -0.5, tuple(top))


@st.composite
def bodies(draw: st.DrawFn, chat: bool) -> Generation:
    maybe = st.booleans()
    fields: dict[str, Any] = {"stop": draw(st.lists(st.sampled_from(["stop", "op", "é", "e s"]), max_size=2))}
    fields |= {"return_token_ids": draw(maybe), "skip_special_tokens": draw(maybe), "n": draw(st.integers(1, 2))}
    fields |= {"service_tier": draw(st.sampled_from([None, "fast", "flex", "auto"]))}
    logprobs = draw(st.none() | st.integers(0, 3))
    if chat:
        fields |= {"messages": [{"role": "user", "content": "x"}]}
        fields |= {} if logprobs is None else {"logprobs": True, "top_logprobs": logprobs}
        return parse(ChatCompletionRequest, json.dumps({"model": "m", **fields}).encode())
    fields |= {"prompt": "x", "logprobs": logprobs, "echo": draw(maybe), "max_tokens": 9}
    return parse(CompletionRequest, json.dumps({"model": "m", **fields}).encode())


@st.composite
def deltas(draw: st.DrawFn, body: Generation) -> tuple[list[Submit], list[tuple[int, Delta]]]:
    """What the choices of a request are told, by a real detokenizer, each in steps of its own."""
    submits, told = [], []
    for uid in range(body.choices_each() * 2):
        prompt, ids = draw(IDS), draw(IDS)
        asked = Sampling(0, logprobs=body.alternatives(), prompt_logprobs=body.prompt_alternatives())
        submits.append(Submit(uid, struct.pack(f"<{len(prompt)}i", *prompt), 9, asked, telling=telling(body)))
        steps = _steps(draw, uid, asked, prompt, ids)
        told.append([(uid, delta) for delta in _said(submits[-1], len(prompt), steps)])
    order = draw(st.permutations([uid for uid, its in enumerate(told) for _ in its]))
    return submits, [told[uid].pop(0) for uid in order]


def _steps(draw: st.DrawFn, uid: int, asked: Sampling, prompt: list[int], ids: list[int]) -> Iterator[Step]:
    if asked.prompt_logprobs is not None:
        cut = draw(st.integers(1, len(prompt)))
        for part in (prompt[1:cut], prompt[cut:]):
            foretold = tuple(logprob(id_, asked.prompt_logprobs) for id_ in part)
            yield Step((), (), b"", (), (), prompt_logprobs={uid: foretold})
    reason = draw(st.sampled_from(["stop", "length"]))
    for place, id_ in enumerate(ids):
        found = {} if asked.logprobs is None else {uid: (logprob(id_, asked.logprobs),)}
        finished = FINISHED[reason] if place == len(ids) - 1 else STILL_RUNNING
        yield Step((uid,), (1,), struct.pack("<i", id_), (finished,), (0,), found)


def _said(submit: Submit, prompt_tokens: int, steps: Iterator[Step]) -> Iterator[Delta]:
    detokenizer = Detokenizer(DECODER, 1)
    detokenizer.accept(Begin(submit.uid, prompt_tokens, submit.telling))
    for step in steps:
        for texts in detokenizer.accept(step).values():
            assert isinstance(texts, Texts)
            yield from texts.deltas


def parts(draw: st.DrawFn, told: list[tuple[int, Delta]]) -> Iterator[list[Said]]:
    """As a reader finds them who comes at any time."""
    while told:
        some = draw(st.integers(1, len(told)))
        yield joined(told[:some])
        told = told[some:]


def events(frames: ChatFrames | CompletionFrames, pieces: Iterator[list[Said]]) -> list[Any]:
    """What `EventStream` writes."""
    written = frames.opening()
    for said in (one for piece in pieces for one in piece):
        if said.text or said.logprobs:
            written += frames.text(said.index, said.text, said.logprobs)
        if said.finish:
            written += frames.finish(said.index, said.finish.reason)  # type: ignore[arg-type]
    return [json.loads(line.removeprefix("data: ")) for line in written.decode().splitlines() if line]


def whole_of(chunks: Sequence[Any], text_of: Any) -> dict[int, dict[str, Any]]:
    """Each choice, put together from its chunks."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        [choice] = chunk["choices"]
        mine = choices.setdefault(choice["index"], {"text": "", "logprobs": None, "finish_reason": None})
        mine["text"] += text_of(choice)
        mine["finish_reason"] = choice["finish_reason"]
        if choice.get("token_ids"):
            mine["token_ids"] = mine.get("token_ids", []) + choice["token_ids"]
        if choice["logprobs"]:
            known = mine["logprobs"] or {}
            mine["logprobs"] = {key: (known.get(key) or []) + (its or []) for key, its in choice["logprobs"].items()}
    return choices


def expected(answer: msgspec.Struct, text_of: Any) -> dict[int, dict[str, Any]]:
    choices = {}
    for choice in json.loads(msgspec.json.encode(answer))["choices"]:
        keys = {"logprobs": choice["logprobs"], "finish_reason": choice["finish_reason"]}
        ids = {"token_ids": choice["token_ids"]} if choice.get("token_ids") else {}
        if keys["logprobs"]:
            keys["logprobs"] = {key: its or [] for key, its in keys["logprobs"].items()}
        choices[choice["index"]] = {"text": text_of(choice), **keys, **ids}
    return choices


def check(draw: Any, chat: bool) -> None:
    body = draw(bodies(chat))
    submits, told = draw(deltas(body))
    shown = shown_for(body, submits, DECODER)
    said = sorted(joined(told), key=lambda one: one.index)
    usage = total_usage({one.index: one.finish for one in said if one.finish}, body.choices_each())
    frames = (ChatFrames if chat else CompletionFrames)(HEAD, len(submits), False, shown)
    chunks = events(frames, parts(draw, told))
    answer = (chat_completion if chat else text_completion)(HEAD, said, usage, shown)

    def text_of(choice: Any) -> str:
        return (choice.get("message") or choice.get("delta", choice)).get("content" if chat else "text") or ""

    assert whole_of(chunks, text_of) == expected(answer, text_of)
    check_logprobs(answer, body, submits, said)
    assert {chunk.get("service_tier") for chunk in chunks} == {
        json.loads(msgspec.json.encode(answer)).get("service_tier")
    }


def check_logprobs(answer: Any, body: Generation, submits: list[Submit], said: list[Said]) -> None:
    for choice, submit, one in zip(answer.choices, submits, said, strict=True):
        prompt = struct.unpack(f"<{len(submit.prompt) // 4}i", submit.prompt)
        assert one.finish
        if body.return_token_ids:
            assert len(choice.token_ids) == one.finish.completion_tokens
        if not isinstance(body, CompletionRequest) or body.logprobs is None:
            continue
        count = one.finish.completion_tokens + (len(prompt) if body.echo else 0)
        if not count:
            continue
        told = choice.logprobs
        assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset) == count
        assert told.text_offset == [sum(map(len, told.tokens[:place])) for place in range(count)]
        assert (told.token_logprobs[0] is None) == bool(body.echo)
        assert all(value >= -9999 for value in told.token_logprobs if value is not None)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_chat_stream_is_the_whole_chat(data: st.DataObject) -> None:
    check(data.draw, chat=True)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_stream_of_completions_is_the_whole_completion(data: st.DataObject) -> None:
    check(data.draw, chat=False)


def test_prompt_logprobs_have_the_form_that_clients_know() -> None:
    fields = {"model": "m", "prompt": "x", "prompt_logprobs": 1, "max_tokens": 1}
    body = parse(CompletionRequest, json.dumps(fields).encode())
    submit = Submit(1, struct.pack("<3i", 97, 98, 256), 1, Sampling(0, prompt_logprobs=1), telling=telling(body))
    foretold = TokenLogprob(98, -2.0, ((99, -1.0),)), TokenLogprob(256, -0.25, ((256, -0.25),))
    steps = [
        Step((), (), b"", (), (), prompt_logprobs={1: foretold}),
        Step((1,), (1,), struct.pack("<i", 97), (FINISHED["length"],), (0,)),
    ]
    said = joined([(0, delta) for delta in _said(submit, 3, iter(steps))])
    answer = text_completion(HEAD, said, total_usage({}, 1), shown_for(body, [submit], DECODER))
    [choice] = json.loads(msgspec.json.encode(answer))["choices"]
    assert choice["text"] == "a" and choice["logprobs"] is None
    assert choice["prompt_logprobs"] == [
        None,
        {
            "99": {"logprob": -1.0, "rank": 1, "decoded_token": "c"},
            "98": {"logprob": -2.0, "rank": None, "decoded_token": "b"},
        },
        {"256": {"logprob": -0.25, "rank": 1, "decoded_token": "stop"}},
    ]


def test_usage_so_far_is_in_every_chunk() -> None:
    usage = {"include_usage": True, "continuous_usage_stats": True}
    fields = {"model": "m", "prompt": "x", "stream": True, "stream_options": usage}
    body = parse(CompletionRequest, json.dumps(fields).encode())
    submit = Submit(1, struct.pack("<3i", 97, 98, 256), 1, Sampling(0), telling=telling(body))
    steps = [Step((1,), (1,), struct.pack("<i", 97), (code,), (0,)) for code in (0, 0, FINISHED["length"])]
    frames = CompletionFrames(HEAD, 1, True, shown_for(body, [submit], DECODER))
    told = [(0, delta) for delta in _said(submit, 3, iter(steps))]
    chunks = events(frames, iter([joined(told[:2]), joined(told[2:])]))
    counted = [(chunk["usage"]["prompt_tokens"], chunk["usage"]["completion_tokens"]) for chunk in chunks]
    assert counted == [(3, 2), (3, 3), (3, 3)]
    assert all(chunk["choices"][0]["logprobs"] is None for chunk in chunks)


def test_a_plain_answer_shows_nothing_more() -> None:
    assert Shown().plain and Shown((), parse(CompletionRequest, b'{"model": "m", "prompt": "x", "logprobs": 1}')).plain
