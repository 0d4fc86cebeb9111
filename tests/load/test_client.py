"""Against a server whose delays are known, the figures are these delays, and every request is accounted for."""

import asyncio
import json
import random

import pytest
from fake_server import FakeServer, serving
from hypothesis import given
from hypothesis import strategies as st

from loadgen.client import Answered, Arrivals, EventStream, Outcome, Pace, Server, Streams, find_model, run_load
from loadgen.figures import Figures, summarise
from loadgen.report import Run, remarks
from loadgen.workload import ChatPrompt, IdsPrompt, Prompt, Turn

PROMPT = IdsPrompt([7, 8, 9], output_tokens=12)


def load(fake: FakeServer, prompts: list[Prompt], pace: Pace, **settings: object) -> list[Outcome]:
    async def run() -> list[Outcome]:
        async with serving(fake) as base_url:
            return await run_load(Server(base_url, "fake", **settings), prompts, pace)  # type: ignore[arg-type]

    return asyncio.run(run())


def measure(fake: FakeServer, requests: int, pace: Pace) -> Figures:
    return summarise(load(fake, [PROMPT] * requests, pace))


def chunks(count: int) -> list[bytes]:
    return [b'data: {"choices": [{"text": "word"}]}'] * count


def test_known_delays_come_out_as_figures() -> None:
    fake = FakeServer(first_s=0.2, gap_s=0.03)
    figures = measure(fake, 12, Streams(4))
    assert figures.ttft_s and figures.inter_token_s and figures.request_s
    assert 0.2 <= figures.ttft_s.p50 < 0.35
    assert 0.025 < figures.inter_token_s.p50 < 0.06
    alone_s = 0.2 + 11 * 0.03
    assert alone_s <= figures.request_s.p50 < 2 * alone_s
    assert 3 * alone_s <= figures.wall_s < 6 * alone_s
    assert figures.output_tokens == 12 * 12
    assert figures.output_tokens_per_s == pytest.approx(144 / figures.wall_s)
    assert figures.prompt_tokens_per_s == pytest.approx(36 / figures.wall_s)
    assert fake.most_running == 4


def test_tokens_of_a_joined_chunk_are_counted_by_usage_and_share_its_gap() -> None:
    figures = measure(FakeServer(gap_s=0.12, tokens_per_chunk=4), 2, Streams(2))
    assert figures.output_tokens == 24
    assert figures.usage_reported
    assert figures.inter_token_s and 0.028 < figures.inter_token_s.p50 < 0.045


def test_chunks_that_arrive_together_share_the_gap_before_them() -> None:
    figures = measure(FakeServer(gap_s=0.12, chunks_per_write=4), 2, Streams(2))
    assert figures.output_tokens == 24
    assert figures.inter_token_s and 0.028 < figures.inter_token_s.p50 < 0.045


def test_without_usage_a_chunk_is_a_token_and_the_reader_is_told() -> None:
    outcomes = load(FakeServer(usage=False, tokens_per_chunk=4), [PROMPT], Streams(1))
    figures = summarise(outcomes)
    assert (figures.output_tokens, figures.ended_early) == (3, 1)
    told = " ".join(remarks([Run("1 stream", Streams(1), figures, outcomes)]))
    assert "no usage" in told and "ended before" in told


@given(arrivals=st.lists(st.tuples(st.floats(1e-3, 10), st.integers(1, 5)), min_size=1), tokens=st.integers(1, 500))
def test_inter_token_times_add_up_to_the_time_between_first_and_last(arrivals, tokens) -> None:
    stream, now = EventStream(), 100.0
    for gap, count in arrivals:
        now += gap
        stream.take(now, chunks(count))
    samples, later = stream.inter_token_s(tokens), sum(count for _, count in arrivals[1:])
    per_chunk = tokens / sum(count for _, count in arrivals)
    assert len(samples) == later
    assert sum(samples) * per_chunk == pytest.approx(now - 100.0 - arrivals[0][0])


def test_events_without_text_are_not_the_first_token() -> None:
    stream = EventStream()
    stream.take(1.0, [b"", b": ping", b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\r'])
    stream.take(2.0, [b'data:{"choices": [{"delta": {"content": "x"}, "finish_reason": "stop"}]}\r'])
    stream.take(3.0, [b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 5}}', b"data: [DONE]"])
    stream.take(4.0, [b'data: {"choices": [], "usage": null}', b"data: [DONE]"])
    assert stream.arrivals == [(2.0, 1)]
    assert stream.finished and stream.usage and stream.usage.completion_tokens == 5


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("refuse", 'HTTP 429: {"error": {"message": "queue full"}}'),
        ("break", "ClientPayloadError"),
        ("error event", "the generation died"),
        ("no end", "without a finish_reason"),
    ],
)
def test_every_failure_is_counted_and_named(fault: str, said: str) -> None:
    fake = FakeServer(break_request=lambda number: fault if number % 3 == 0 else "")
    outcomes = load(fake, [PROMPT] * 9, Streams(1))
    figures = summarise(outcomes)
    assert (figures.requests, figures.failed, figures.output_tokens) == (9, 3, 6 * 12)
    assert sum(figures.errors.values()) == 3
    assert all(said in error for error in figures.errors)
    assert any(said in remark for remark in remarks([Run("1 stream", Streams(1), figures, outcomes)]))
    assert figures.ttft_s and len([o for o in outcomes if isinstance(o, Answered)]) == 6


def test_a_silent_server_fails_by_timeout_and_a_closed_port_by_connection() -> None:
    slow = summarise(load(FakeServer(first_s=30), [PROMPT], Streams(1), timeout_s=0.2))
    assert list(slow.errors) == ["no complete answer within 0.2 s"]
    assert slow.ttft_s is None and slow.output_tokens_per_s == 0
    nobody = Server("http://127.0.0.1:9/v1", "fake")
    refused = summarise(asyncio.run(run_load(nobody, [PROMPT, PROMPT], Streams(2))))
    assert refused.failed == 2


def test_arrivals_do_not_wait_for_answers_and_follow_the_seed() -> None:
    fake = FakeServer(first_s=0.6)
    load(fake, [IdsPrompt([1], 1)] * 20, Arrivals(per_s=50, seed=3))
    draw = random.Random(3)
    expected_s = sum(draw.expovariate(50) for _ in range(20)) - random.Random(3).expovariate(50)
    assert fake.arrived_s[-1] - fake.arrived_s[0] == pytest.approx(expected_s, abs=0.15)
    assert fake.most_running > 15


def test_bodies_say_what_was_asked() -> None:
    fake = FakeServer()
    chat = ChatPrompt([Turn("user", "Hi")], output_tokens=5)
    load(fake, [PROMPT, chat], Streams(1), extra_body={"cache_prompt": False, "temperature": 0.5})
    ids, talk = fake.bodies
    assert fake.paths == ["/v1/completions", "/v1/chat/completions"]
    assert (ids["prompt"], ids["max_tokens"], ids["ignore_eos"]) == ([7, 8, 9], 12, True)
    assert (talk["messages"], talk["max_tokens"]) == ([{"role": "user", "content": "Hi"}], 5)
    assert "ignore_eos" not in talk
    for body in fake.bodies:
        assert body["stream"] and body["stream_options"] == {"include_usage": True}
        assert (body["cache_prompt"], body["temperature"], body["model"]) == (False, 0.5, "fake")
    json.dumps(fake.bodies)


def test_the_model_is_the_first_that_the_server_names() -> None:
    async def find() -> str:
        async with serving(FakeServer()) as base_url:
            return await find_model(base_url, "key")

    assert asyncio.run(find()) == "fake"
