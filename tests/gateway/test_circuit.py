"""The law of the circle at the gateway: every uid that entered ring A ends exactly once, whatever happens."""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenllm.counters import METRICS, Page, create_page
from tokenllm.gateway import gateway as gateway_module
from tokenllm.gateway.circuit import Circuit
from tokenllm.gateway.reply import Reply, whole
from tokenllm.messages import (
    FINISH_REASONS,
    Abort,
    Delta,
    Finish,
    FinishReason,
    Inbound,
    Outbound,
    Ready,
    Refused,
    Sampling,
    Submit,
    Texts,
    make_uid,
)
from tokenllm.ring import Receiver, RingFds, Sender, close_ring, create_ring
from tokenllm_schemas.errors import ApiError

[REASONS] = [metric.labels for metric in METRICS if metric.name == "tokenllm_requests_finished_total"]


class Generation:
    """The far ends of both rings, played by the test."""

    def __init__(self, number: int, ring_a_bytes: int = 1 << 16) -> None:
        self.number = number
        self.ring_a, self.ring_c = create_ring(ring_a_bytes), create_ring(1 << 16)
        self.inbox: Receiver[Inbound] = Receiver(self.ring_a, Inbound)
        self.outbox: Sender[Outbound] = Sender(self.ring_c)
        self.submitted: list[int] = []
        self.aborted: list[int] = []

    def close(self) -> None:
        self.inbox.close()
        self.outbox.close()
        close_ring(self.ring_a)
        close_ring(self.ring_c)

    def attach(self, circuit: Circuit) -> None:
        circuit.attach(self.number, _twin(self.ring_a), _twin(self.ring_c))
        self.outbox.send(Ready(self.number, 1000, 100))
        circuit.turn()

    def read(self) -> None:
        for message in self.inbox.receive():
            match message:
                case Submit():
                    self.submitted.append(message.uid)
                case Abort():
                    self.aborted.append(message.uid)

    def say(self, uid: int, text: str, reason: FinishReason | None = None, by_stop_string: bool = False) -> None:
        finish = Finish(reason, 3, 0, 1, by_stop_string) if reason else None
        self.outbox.send(Texts((Delta(uid, text, 1, (), finish),)))


def _twin(fds: RingFds) -> RingFds:
    """The circuit closes what it is given."""
    return RingFds(os.dup(fds.memory), os.dup(fds.bell))


def new_circuit() -> tuple[Circuit, Page]:
    fd = create_page()
    page = Page(fd)
    os.close(fd)
    return Circuit(1, 7, page, lambda ready: None), page


def submits(circuit: Circuit, choices: int, prompt: bytes = b"\1\0\0\0") -> list[Submit]:
    return [Submit(circuit.next_uid(), prompt, 8, Sampling(seed=1)) for _ in range(choices)]


def finished(page: Page) -> dict[str, int]:
    counts = {reason: int(page.get("tokenllm_requests_finished_total", reason)) for reason in REASONS}
    return {reason: count for reason, count in counts.items() if count}


def in_loop(scenario: Coroutine[None, None, None]) -> None:
    asyncio.run(scenario)


def test_a_request_goes_round() -> None:
    async def scenario() -> None:
        circuit, page = new_circuit()
        generation = Generation(1)
        generation.attach(circuit)
        reply = circuit.submit(submits(circuit, 2))
        generation.read()
        first, second = generation.submitted
        generation.say(second, "b")
        generation.say(first, "a", "stop")
        generation.say(second, "c", "length")
        circuit.turn()
        said = await whole(reply)
        told = [(one.index, one.text, one.finish and one.finish.reason) for one in said]
        assert told == [(0, "a", "stop"), (1, "bc", "length")]
        assert finished(page) == {"stop": 1, "length": 1}
        assert circuit.waiting_since() is None
        assert sum(page.histogram("tokenllm_time_to_first_token_seconds")[0]) == 2
        assert sum(page.histogram("tokenllm_inter_token_latency_seconds")[0]) == 1

    in_loop(scenario())


def test_the_time_between_tokens_is_measured_for_each() -> None:
    async def scenario() -> None:
        circuit, page = new_circuit()
        generation = Generation(1)
        generation.attach(circuit)
        [uid] = circuit.submit(submits(circuit, 1)).uids
        for tokens in (1, 4):
            generation.outbox.send(Texts((Delta(uid, "", tokens),)))
            circuit.turn()
            await asyncio.sleep(0.04)
        events, seconds = page.histogram("tokenllm_inter_token_latency_seconds")
        assert sum(events) == 4 and 0.04 <= seconds < 0.08, "one gap, shared by the tokens that came after it"

    in_loop(scenario())


def test_a_refusal_and_a_failure_are_errors() -> None:
    async def scenario() -> None:
        circuit, page = new_circuit()
        generation = Generation(1)
        generation.attach(circuit)
        refused, failed = circuit.submit(submits(circuit, 1)), circuit.submit(submits(circuit, 1))
        generation.outbox.send(Refused(refused.uids[0], 429, "queue_full", "full"))
        generation.say(failed.uids[0], "", "error")
        circuit.turn()
        for reply, status in ((refused, 429), (failed, 500)):
            with pytest.raises(ApiError) as caught:
                await reply.deltas(0)
            assert caught.value.status == status
        assert finished(page) == {"refused": 1, "error": 1}

    in_loop(scenario())


def test_a_stop_string_is_told_to_the_scheduler() -> None:
    async def scenario() -> None:
        circuit, _ = new_circuit()
        generation = Generation(1)
        generation.attach(circuit)
        reply = circuit.submit(submits(circuit, 1))
        generation.say(reply.uids[0], "x", "stop", by_stop_string=True)
        circuit.turn()
        generation.read()
        assert generation.aborted == list(reply.uids)

    in_loop(scenario())


def test_half_a_request_is_never_left_behind() -> None:
    async def scenario() -> None:
        circuit, page = new_circuit()
        generation = Generation(1, ring_a_bytes=1024)
        generation.attach(circuit)
        with pytest.raises(ApiError) as caught:
            circuit.submit(submits(circuit, 8, prompt=bytes(200)))
        assert (caught.value.status, caught.value.code) == (503, "overloaded")
        assert caught.value.headers == {"retry-after": "1"}
        for _ in range(5):  # the aborts may have had to wait for room
            generation.read()
            circuit.turn()
        assert 0 < len(generation.submitted) < 8
        assert generation.aborted == generation.submitted
        for uid in generation.submitted:
            generation.say(uid, "", "abort")
        circuit.turn()
        sent = len(generation.submitted)
        assert finished(page) == {"abort": sent, "refused": 8 - sent}, "each choice once"

    in_loop(scenario())


def test_aborts_that_found_no_room_are_sent_when_there_is_some() -> None:
    async def scenario() -> None:
        circuit, _ = new_circuit()
        generation = Generation(1, ring_a_bytes=1024)
        generation.attach(circuit)
        listening = asyncio.create_task(circuit.listen())
        await asyncio.sleep(0.01)
        replies = []
        with pytest.raises(ApiError):
            while True:
                replies.append(circuit.submit(submits(circuit, 1)))
        for reply in replies:  # more than fit into what is left of the ring
            circuit.abandon(reply)
        for _ in range(100):
            await asyncio.sleep(0.005)
            generation.read()
        assert generation.aborted == [reply.uids[0] for reply in replies]
        listening.cancel()

    in_loop(scenario())


def test_who_has_left_is_told_nothing() -> None:
    async def scenario() -> None:
        circuit, page = new_circuit()
        generation = Generation(1)
        generation.attach(circuit)
        reply = circuit.submit(submits(circuit, 1))
        circuit.abandon(reply)
        generation.say(reply.uids[0], "a")
        generation.say(reply.uids[0], "b", "stop")
        circuit.turn()
        assert await reply.deltas(0) == []
        assert finished(page) == {"stop": 1}

    in_loop(scenario())


def test_nothing_is_submitted_while_there_is_no_model() -> None:
    async def scenario() -> None:
        circuit, _ = new_circuit()
        with pytest.raises(ApiError) as caught:
            circuit.submit(submits(circuit, 1))
        assert (caught.value.status, caught.value.code) == (503, "loading")
        circuit.attach(1, create_ring(1024), create_ring(1024))
        with pytest.raises(ApiError, match="loading"):
            circuit.submit(submits(circuit, 1))

    in_loop(scenario())


def test_a_prompt_that_no_ring_carries_is_the_clients_fault() -> None:
    async def scenario() -> None:
        circuit, page = new_circuit()
        generation = Generation(1, ring_a_bytes=1024)
        generation.attach(circuit)
        batch = submits(circuit, 2) + submits(circuit, 1, prompt=bytes(4000))
        with pytest.raises(ApiError) as caught:
            circuit.submit(batch)
        assert caught.value.status == 400
        generation.read()
        assert generation.aborted == generation.submitted == [submit.uid for submit in batch[:2]]
        assert finished(page) == {"refused": 1}

    in_loop(scenario())


def test_a_finished_answer_survives_its_generation() -> None:
    async def scenario() -> None:
        circuit, page = new_circuit()
        generation = Generation(1)
        generation.attach(circuit)
        finished_one, cut_one = circuit.submit(submits(circuit, 1)), circuit.submit(submits(circuit, 1))
        generation.say(finished_one.uids[0], "all of it", "stop")
        generation.say(cut_one.uids[0], "half")
        circuit.lose(1)
        assert [one.text for one in await whole(finished_one)] == ["all of it"]
        assert [delta.text for _, delta in await cut_one.deltas(0)] == ["half"]
        with pytest.raises(ApiError, match="died"):
            await cut_one.deltas(0)
        assert finished(page) == {"stop": 1, "error": 1}
        assert circuit.ready is None

    in_loop(scenario())


def test_a_generation_that_leaves_a_corrupt_ring_is_lost_like_any_other() -> None:
    async def scenario() -> None:
        circuit, page = new_circuit()
        generation = Generation(1)
        generation.attach(circuit)
        reply = circuit.submit(submits(circuit, 1))
        generation.say(reply.uids[0], "x", "stop")
        os.pwrite(generation.ring_c.memory, b"\xaa" * 4096, 128)  # where its frames begin
        circuit.lose(1)
        with pytest.raises(ApiError, match="died"):
            await reply.deltas(0)
        assert finished(page) == {"error": 1}
        assert page.get("tokenllm_ring_corrupt_total") == 1

    in_loop(scenario())


def test_ready_means_that_answers_move_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when nothing that the scheduler writes says that anything is pending."""
    monkeypatch.setattr(gateway_module, "STUCK_S", 0.1)

    async def scenario() -> None:
        circuit, page = new_circuit()
        nothing: Any = None
        gateway = gateway_module.Gateway(nothing, circuit, [page], max_queued_requests=0, responses=nothing)
        generation = Generation(1)
        generation.attach(circuit)
        await asyncio.sleep(0.15)
        gateway.check_progress()  # idle is ready
        [uid] = circuit.submit([Submit(circuit.next_uid(), bytes(4), 8, Sampling(1), arrived_s=time.monotonic())]).uids
        gateway.check_progress()
        await asyncio.sleep(0.15)
        with pytest.raises(ApiError) as caught:
            gateway.check_progress()
        assert (caught.value.status, caught.value.code) == (503, "stuck")
        page.set("tokenllm_last_step_monotonic_seconds", time.monotonic())
        gateway.check_progress()
        await asyncio.sleep(0.15)
        generation.say(uid, "a")
        circuit.turn()
        gateway.check_progress()
        await asyncio.sleep(0.15)
        with pytest.raises(ApiError):
            gateway.check_progress()
        generation.say(uid, "b", "stop")
        circuit.turn()
        await asyncio.sleep(0.15)
        gateway.check_progress()

    in_loop(scenario())


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["submit", "text", "last word", "refuse", "abandon", "obey", "stray", "lose", "cut", "turn"]),
        st.integers(0, 2**32),
    ),
    max_size=60,
)


class Ledger:
    """What the test knows: who was submitted, and what each reply's reader heard."""

    def __init__(self) -> None:
        self.circuit, self.page = new_circuit()
        self.generation = Generation(1, ring_a_bytes=2048)
        self.generation.attach(self.circuit)
        self.replies: list[Reply] = []
        self.read: list[Reply] = []  # those whose client has not left
        self.alive: set[int] = set()  # uids that the generation owes a last word
        self.ended = 0

    async def act(self, action: str, number: int) -> None:
        match action:
            case "submit":
                self._submit(number % 8 + 1)
            case "text" if self.alive:
                self.generation.say(self._one(number), "x")
            case "last word" if self.alive:
                uid = self._one(number)
                self.alive.remove(uid)
                self.generation.say(uid, "y", FINISH_REASONS[number % 4], by_stop_string=number % 8 == 0)
            case "refuse" if self.alive:
                uid = self._one(number)
                self.alive.remove(uid)
                self.generation.outbox.send(Refused(uid, 429, "queue_full", "full"))
            case "abandon" if self.read:
                self.circuit.abandon(self.read.pop(number % len(self.read)))
            case "obey":
                self._obey()
            case "stray":
                self.generation.say(make_uid(1, 6, number), "z", "stop")
            case "lose":
                self._replace()
            case "cut":
                self.circuit.cut(ApiError(503, "shutting down", "draining"))
            case "turn":
                self.circuit.turn()

    def _submit(self, choices: int) -> None:
        try:
            reply = self.circuit.submit(submits(self.circuit, choices))
        except ApiError:
            self.generation.read()  # it may have sent some of them
            self.ended += choices - len(self.generation.submitted)
            self._obey()
        else:
            self.replies.append(reply)
            self.read.append(reply)
            self._obey()

    def _obey(self) -> None:
        """The generation reads its ring, and ends what was aborted."""
        self.generation.read()
        self.alive |= set(self.generation.submitted)
        self.ended += len(self.generation.submitted)
        for uid in self.generation.aborted:
            if uid in self.alive:
                self.alive.remove(uid)
                self.generation.say(uid, "", "abort")
        self.generation.submitted.clear()
        self.generation.aborted.clear()

    def _replace(self) -> None:
        self.generation.read()
        self.ended += len(self.generation.submitted)
        self.circuit.lose(self.generation.number)
        self.alive.clear()
        self.generation.close()
        self.generation = Generation(self.generation.number + 1, ring_a_bytes=2048)
        self.generation.attach(self.circuit)

    def _one(self, number: int) -> int:
        return sorted(self.alive)[number % len(self.alive)]


@settings(max_examples=150, deadline=None)
@given(ACTIONS)
def test_every_uid_ends_once(actions: list[tuple[str, int]]) -> None:
    async def scenario() -> None:
        ledger = Ledger()
        for action, number in actions:
            await ledger.act(action, number)
            ledger.circuit.turn()
        ledger._replace()
        ledger.circuit.lose(ledger.generation.number)
        ledger.generation.close()
        assert sum(finished(ledger.page).values()) == ledger.ended
        assert ledger.circuit.waiting_since() is None
        for reply in ledger.read:
            await _ends_once(reply)

    in_loop(scenario())


async def _ends_once(reply: Reply) -> None:
    """The reader of a reply hears one last word for each choice, or one error for all."""
    last_words: Counter[int] = Counter()
    failed = False
    while reply.open and not failed:
        try:
            deltas = await asyncio.wait_for(reply.deltas(), 1)
        except ApiError:
            failed = True
        else:
            assert all(last_words[index] == 0 for index, _ in deltas), "nothing follows a last word"
            last_words.update(index for index, delta in deltas if delta.finish)
    assert failed or last_words == Counter(range(len(reply.uids)))
