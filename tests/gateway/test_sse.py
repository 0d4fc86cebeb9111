"""The bytes of a stream: what the chunks are, how they are joined, and what is written when."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any
from unittest.mock import AsyncMock

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenllm.gateway import sse as sse_module
from tokenllm.gateway.anthropic import MessageStory, Wording
from tokenllm.gateway.chat import ChatFrames, chat_logprobs
from tokenllm.gateway.completions import CompletionFrames
from tokenllm.gateway.reply import Head, Reply, joined, whole
from tokenllm.gateway.response_stream import ResponseStory
from tokenllm.gateway.response_wording import ResponseFrames, begun
from tokenllm.gateway.sse import DONE, KEEP_ALIVE, ChoicesStory, EventStream, Story, event
from tokenllm.messages import Delta, Finish, Sampling, Submit, TokenText
from tokenllm_schemas.errors import ApiError
from tokenllm_schemas.response_request import ResponseRequest
from tokenllm_schemas.responses import ChatChunk, ChatChunkChoice, ChatDelta, TextChoice, TextCompletion

HEAD = Head("chatcmpl-1", 7, 'a "model" \0', "f")
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
LOGPROBS = st.lists(
    st.builds(
        TokenText,
        TEXTS,
        st.binary(max_size=4),
        st.floats(max_value=0, allow_nan=False),
        st.lists(st.tuples(TEXTS, st.binary(max_size=4), st.floats(max_value=0, allow_nan=False)), max_size=2).map(
            tuple
        ),
    ),
    max_size=2,
)


@given(TEXTS, LOGPROBS, st.integers(0, 2))
def test_a_filled_form_is_the_chunk(text: str, tokens: list[TokenText], index: int) -> None:
    logprobs = chat_logprobs(tokens) if tokens else None
    choice = ChatChunkChoice(index, ChatDelta(content=text), logprobs=logprobs)
    chunk = ChatChunk(**HEAD._asdict(), choices=[choice])
    assert ChatFrames(HEAD, 3, False).text(index, text, tokens) == event(msgspec.json.encode(chunk))
    completion = TextCompletion(**HEAD._asdict(), choices=[TextChoice(index, text)])
    assert CompletionFrames(HEAD, 3, False).text(index, text, ()) == event(msgspec.json.encode(completion))


@given(TEXTS)
def test_an_event_is_one_line(text: str) -> None:
    data = ChatFrames(HEAD, 1, True).text(0, text, ())
    assert data.startswith(b"data: {") and data.endswith(b"}\n\n")
    assert data.count(b"\n") == 2 and b"\r" not in data
    assert json.loads(data[6:])["choices"][0]["delta"]["content"] == text


def test_offsets_go_on_from_chunk_to_chunk() -> None:
    frames = CompletionFrames(HEAD, 2, False)
    tokens = [TokenText(text, b"", -1.0) for text in ("ab", "c")]
    parts = [frames.text(1, "abc", tokens), frames.text(0, "abc", tokens), frames.text(1, "abc", tokens)]
    choices = [json.loads(part[6:])["choices"][0] for part in parts]
    assert [choice["logprobs"]["text_offset"] for choice in choices] == [[0, 2], [0, 2], [3, 5]]


DELTAS = st.lists(st.tuples(st.integers(0, 3), TEXTS), max_size=20)


@given(DELTAS)
def test_joining_loses_nothing_and_keeps_the_order(deltas: list[tuple[int, str]]) -> None:
    said = joined((index, Delta(9, text, 1)) for index, text in deltas)
    assert len({one.index for one in said}) == len(said)
    for one in said:
        assert one.text == "".join(text for index, text in deltas if index == one.index)


class Circuit:
    """Stands for the circuit: one reply, whose words the test puts."""

    def __init__(self, choices: int) -> None:
        self.reply = Reply(range(choices))
        self.abandoned = False

    def submit(self, submits: list[Submit], patience_s: float) -> Reply:
        assert len(submits) == len(self.reply.uids)
        return self.reply

    def abandon(self, reply: Reply) -> None:
        self.abandoned = True

    def say(self, index: int, text: str = "", reason: Any = None) -> None:
        self.reply.put(index, Delta(index, text, 1, (), Finish(reason, 3, 0, 2) if reason else None))


class Written:
    """An EventStream that runs, and what it has sent."""

    def __init__(self, choices: int = 1, usage_wanted: bool = False, frames: Any = None, story: Any = None) -> None:
        self.circuit = Circuit(choices)
        self.sent: list[dict] = []
        story = story or ChoicesStory(frames or ChatFrames(HEAD, choices, usage_wanted), choices, usage_wanted)
        submits = [Submit(uid, b"\0\0\0\0", 1, Sampling(seed=0)) for uid in range(choices)]
        stream = EventStream(self.circuit, submits, story)  # type: ignore[arg-type]
        self.task = asyncio.create_task(stream({"headers": []}, None, self._send))  # type: ignore[arg-type]

    async def _send(self, message: dict) -> None:
        self.sent.append(message)

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    @property
    def bodies(self) -> list[bytes]:
        return [message["body"] for message in self.sent[1:]]


def chunks(data: bytes) -> list[Any]:
    return [json.loads(line[6:]) for line in data.split(b"\n\n") if line.startswith(b"data: {")]


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(scenario())  # type: ignore[arg-type]


def test_one_write_for_what_waits() -> None:
    async def scenario() -> None:
        written = Written()
        written.circuit.say(0, "a")
        await written.settle()
        for text in "bcd":
            written.circuit.say(0, text)
        await written.settle()
        written.circuit.say(0, "e", "stop")
        await written.task
        assert [message["type"] for message in written.sent] == ["http.response.start"] + 3 * ["http.response.body"]
        role, first = chunks(written.bodies[0])
        assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert first["choices"][0]["delta"] == {"content": "a"}
        [second] = chunks(written.bodies[1])
        assert second["choices"][0]["delta"] == {"content": "bcd"}
        third, finish = chunks(written.bodies[2])
        assert third["choices"][0]["delta"] == {"content": "e"}
        assert (finish["choices"][0]["delta"], finish["choices"][0]["finish_reason"]) == ({}, "stop")
        assert written.bodies[2].endswith(DONE) and not written.sent[-1]["more_body"]
        assert written.circuit.abandoned

    run(scenario)


def stories() -> list[Story]:
    submit = Submit(0, b"\0\0\0\0", 1, Sampling(seed=0))
    response = begun(ResponseRequest(model="m", input="hi"), "resp_1", submit)
    chat = ChoicesStory(ChatFrames(HEAD, 1, False), 1, False)
    return [chat, ResponseStory(ResponseFrames(response), AsyncMock()), MessageStory(Wording("msg_1", "m", 3, ()))]


@pytest.mark.parametrize("story", stories(), ids=lambda story: type(story).__name__)
def test_tokens_without_text_are_not_written(story: Story) -> None:
    async def scenario() -> None:
        written = Written(story=story)
        written.circuit.say(0, "a")
        await written.settle()
        waited_since_s = written.circuit.reply._waits_since_s
        written.circuit.say(0, "")
        await written.settle()
        assert len(written.bodies) == 1
        assert written.circuit.reply._waits_since_s == waited_since_s, "its client has read nothing"
        written.task.cancel()

    run(scenario)


def test_choices_open_in_order() -> None:
    async def scenario() -> None:
        written = Written(choices=3, usage_wanted=True)
        written.circuit.say(2, "c", "stop")
        await written.settle()
        written.circuit.say(0, "a", "stop")
        written.circuit.say(1, "b", "length")
        await written.task
        told = chunks(b"".join(written.bodies))
        assert [chunk["choices"][0]["index"] for chunk in told[:3]] == [0, 1, 2]
        assert told[-1]["choices"] == [] and told[-1]["usage"]["total_tokens"] == 3 + 3 * 2

    run(scenario)


@pytest.mark.parametrize("endpoint", [ChatFrames, CompletionFrames])
def test_silence_is_broken_but_never_begins_a_stream(monkeypatch: pytest.MonkeyPatch, endpoint: Any) -> None:
    monkeypatch.setattr(sse_module, "SILENCE_S", 0.01)

    async def scenario() -> None:
        written = Written(frames=endpoint(HEAD, 1, False))
        await asyncio.sleep(0.05)
        assert written.sent[0]["type"] == "http.response.start", "proxies give up on a connection that says nothing"
        assert written.bodies[:1] != [KEEP_ALIVE]
        written.circuit.say(0, "a")
        await asyncio.sleep(0.05)
        assert written.bodies.count(KEEP_ALIVE) >= 2 and written.bodies[-1] == KEEP_ALIVE
        written.circuit.say(0, "b", "stop")
        await written.task
        assert b"".join(written.bodies).count(b"data: ") == (5 if endpoint is ChatFrames else 4)

    run(scenario)


def test_a_refusal_is_a_status_and_not_an_event() -> None:
    async def scenario() -> None:
        written = Written()
        written.circuit.reply.fail(ApiError(429, "full", "queue_full"))
        with pytest.raises(ApiError):
            await written.task
        assert written.sent == [] and written.circuit.abandoned

    run(scenario)


def test_an_error_in_the_middle_is_an_event() -> None:
    async def scenario() -> None:
        written = Written(choices=2)
        written.circuit.say(0, "a", "stop")
        await written.settle()
        written.circuit.say(1, "b")
        written.circuit.reply.fail(ApiError(503, "died", "engine_error"))
        await written.task
        assert b'"b"' in written.bodies[-2], "what came before the error is told"
        assert written.bodies[-1] == event(ApiError(503, "died", "engine_error").envelope()) + DONE
        assert written.circuit.abandoned

    run(scenario)


def test_a_stream_that_is_cancelled_is_abandoned() -> None:
    async def scenario() -> None:
        written = Written()
        written.circuit.say(0, "a")
        await written.settle()
        written.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await written.task
        assert written.circuit.abandoned

    run(scenario)


def test_a_whole_answer_fails_as_a_whole() -> None:
    async def scenario() -> None:
        circuit = Circuit(2)
        circuit.say(0, "a", "stop")
        circuit.reply.fail(ApiError(500, "failed", "engine_error"))
        with pytest.raises(ApiError):
            await whole(circuit.reply)

    run(scenario)
