import json
from pathlib import Path

import numpy as np
import pytest

from tokenllm import cli
from tokenllm.routing.router import Router
from tokenllm.simulate import mixes, policies
from tokenllm.simulate.command import run
from tokenllm.simulate.flags import FIRST_COME_ORACLE, ORACLE, POLICIES
from tokenllm.simulate.machine import Machine, StepClock
from tokenllm.simulate.prefixes import Prefixes
from tokenllm.simulate.server import Server
from tokenllm.simulate.workload import TraceError, Workload, of, read

DATA = Path(__file__).parent.parent / "data"
AZURE, MOONCAKE = DATA / "azure_conversation_2000.csv", DATA / "mooncake_conversation_600.jsonl"
EVERY = (*POLICIES, ORACLE, FIRST_COME_ORACLE)

# steps published for a simulator of the same shape: 120k slots (chat 60k), everybody there at once
STEPS = {
    ("dist1", "conservative"): 245_752,
    ("dist1", "lightllm"): 165_132,
    ("dist1", "past-future"): 151_757,
    ("dist1", "oracle-fcfs"): 151_062,
    ("dist2", "conservative"): 464_518,
    ("dist2", "lightllm"): 350_428,
    ("dist2", "past-future"): 325_538,
    ("dist2", "oracle-fcfs"): 327_308,
    ("dist3", "lightllm"): 53_401,
    ("dist3", "past-future"): 49_636,
    ("dist3", "oracle-fcfs"): 48_846,
    ("chat", "conservative"): 20_370,
    ("chat", "lightllm"): 7_048,
    ("chat", "past-future"): 6_638,
    ("chat", "oracle-fcfs"): 6_318,
}
SLOW = {("dist1", "past-future"), ("dist2", "past-future"), ("dist3", "past-future")}


@pytest.mark.parametrize(
    ("mix", "policy"),
    [pytest.param(*key, marks=pytest.mark.slow) if key in SLOW else key for key in STEPS],
)
def test_published_step_counts_are_met_within_5_percent(mix: str, policy: str) -> None:
    result, _ = run(policy, mixes.draw(mix, seed=1), Machine(), mixes.MIXES[mix][2], seed=1, clock="steps")
    assert result.steps == pytest.approx(STEPS[mix, policy], rel=0.05)


@pytest.mark.parametrize("policy", EVERY)
@pytest.mark.parametrize("trace", [AZURE, MOONCAKE])
def test_everybody_finishes_with_all_tokens_and_memory_is_given_back(trace: Path, policy: str) -> None:
    work = read(trace).first(300).at_rate(4.0)
    machine = Machine()
    chosen, kind_of = policies.make(policy, work, machine.pace(0.1), 150_000, 0)
    server = Server(work, Router(chosen, machine.pace(0.1), 64), machine, 150_000, kind_of)
    books = server.run()
    assert not np.isnan(books.last_token_s).any()
    assert (server._generated == work.length).all()
    assert (books.last_token_s >= books.first_token_s).all()
    assert (books.first_token_s > 0).all()
    assert server._used == 0
    assert books.most_tokens <= 150_000


@pytest.mark.parametrize("policy", ["conservative", "oracle", "oracle-fcfs"])
def test_who_knows_the_worst_or_the_truth_pauses_nobody(policy: str) -> None:
    result, _ = run(policy, mixes.draw("dist3", 2, 150), Machine(), 40_000, 0)
    assert result.pauses == 0


def small(count: int, seed: int) -> Workload:
    random = np.random.default_rng(seed)
    return of("small", random.integers(1, 60, count), random.integers(1, 80, count), 100)


@pytest.mark.parametrize("policy", EVERY)
def test_jumping_over_steps_changes_hardly_anything(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    jumping, _ = run(policy, small(120, 5), Machine(), 600, 0)
    monkeypatch.setattr(Server, "_must_decide", lambda self: True)
    walking, _ = run(policy, small(120, 5), Machine(), 600, 0)
    if policy == "conservative":  # the others may find a little earlier, while nothing happens, that somebody fits now
        assert walking.steps == jumping.steps
    assert walking.output_tokens_per_s == pytest.approx(jumping.output_tokens_per_s, rel=0.05)


@pytest.mark.parametrize("policy", EVERY)
def test_the_same_seed_gives_the_same_run(policy: str) -> None:
    first, again = (run(policy, small(150, 6), Machine(), 800, 9)[0] for _ in range(2))
    assert (first.steps, first.pauses, first.ttft_p99_s) == (again.steps, again.pauses, again.ttft_p99_s)


def test_pauses_happen_when_memory_is_short_and_are_charged() -> None:
    result, books = run("lightllm", mixes.draw("dist1", 1, 60), Machine(), 30_000, 0)
    assert result.pauses > 0
    assert books.recomputed.sum() > 0
    assert result.recomputed_share == books.recomputed.sum() / mixes.draw("dist1", 1, 60).prompt.sum()


def test_what_a_paused_request_left_is_forgotten_from_its_end_and_only_as_room_is_wanted() -> None:
    cache = Prefixes([], np.array([100, 100, 100]), 512)
    cache.leave(0, 150, now=1.0)
    cache.leave(1, 120, now=2.0)
    cache.evict(30)
    assert (cache.tail.tolist(), cache.kept_tokens) == ([120, 120, 0], 240)
    assert cache.come_back(0) == 120
    cache.leave(0, 130, now=3.0)
    cache.evict(200)  # the oldest first, and what is left of an entry that is out of date is not counted twice
    assert (cache.tail.tolist(), cache.kept_tokens) == ([50, 0, 0], 50)
    cache.evict(-10)
    assert cache.kept_tokens == 50


def test_a_pause_costs_no_more_than_what_was_forgotten() -> None:
    work = mixes.draw("dist1", 1, 200)
    machine, pace = Machine(), Machine().pace(0.2)
    policy, kind_of = policies.make("tokenllm", work, pace, 60_000, 0)
    books = Server(work, Router(policy, pace, 64), machine, 60_000, kind_of).run()
    whole = (work.prompt + work.length)[books.pauses > 0]
    again = books.recomputed[books.pauses > 0] / books.pauses[books.pauses > 0]
    assert len(again) > 2
    assert 0 < again.mean() < 0.5 * whole.mean()


def test_a_shared_prefix_is_computed_once() -> None:
    blocks = [np.array([0, 1, 2, 3, 10 + place]) for place in range(30)]
    together = of("shared", np.full(30, 2100), np.full(30, 8), 8, np.arange(30) * 1.0, blocks=blocks)
    alone = of("alone", np.full(30, 2100), np.full(30, 8), 8, np.arange(30) * 1.0)
    _, shared = run("conservative", together, Machine(), 60_000, 0)
    _, unshared = run("conservative", alone, Machine(), 60_000, 0)
    assert shared.first_token_s[0] == pytest.approx(unshared.first_token_s[0])
    assert np.median(shared.first_token_s) < 0.25 * np.median(unshared.first_token_s)


def test_one_request_alone_takes_what_the_formula_says() -> None:
    machine = Machine()
    _, books = run("conservative", of("one", np.array([1000]), np.array([11]), 11), machine, 2000, 0)
    prefill = (1000 * machine.flop_per_token + machine.attention_flop * 1000 * 500) / machine.rate
    decode = sum((machine.weight_bytes + machine.kv_bytes * held) / machine.bandwidth for held in range(1000, 1010))
    assert books.seconds == pytest.approx(prefill + decode)
    assert books.most_tokens == 1010


def test_a_request_that_never_fits_is_refused_and_outside_the_sla() -> None:
    result, _ = run("tokenllm", of("two", np.array([50, 5000]), np.array([5, 5]), 5), Machine(), 1000, 0)
    assert result.refused_share == 0.5
    assert result.in_sla_share == 0.5


def test_overload_is_where_the_order_counts() -> None:
    work = read(AZURE).at_rate(7.0)
    ours, theirs = (run(name, work, Machine(), Machine().capacity, 0)[0] for name in ("tokenllm", "lightllm"))
    assert ours.in_sla_share > 1.3 * theirs.in_sla_share
    assert ours.ttft_p99_s < 2 * theirs.ttft_p99_s
    assert ours.paused_share <= 0.01


def test_the_command_writes_rows_and_a_picture(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    flags = ["--policy", "lightllm", "--requests", "200", "--seed", "3", "--json", str(out)]
    assert cli.main(["simulate", "--trace", str(AZURE), "--capacity", "60000", "--rate", "5", *flags]) == 0
    rows = json.loads(out.read_text())
    assert [row["policy"] for row in rows] == ["lightllm", "oracle"]
    assert {"output_tokens_per_s", "memory_use", "paused_share", "recomputed_share"} <= rows[0].keys()
    assert {"ttft_p50_s", "ttft_p99_s", "in_sla_share"} <= rows[0].keys()
    assert out.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("a.csv", "ContextTokens\n3\n", "GeneratedTokens"),
        ("a.csv", "ContextTokens,GeneratedTokens\n3,-1\n", "a.csv:2"),
        ("a.jsonl", '{"timestamp": 0, "input_length": 3, "output_length": "x"}\n', "a.jsonl:1"),
        ("a.jsonl", "", "empty"),
        ("a.txt", "", ".csv or .jsonl"),
    ],
)
def test_a_trace_that_cannot_be_read_is_named(tmp_path: Path, name: str, text: str, word: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(TraceError, match=word.replace(".", r"\.")):
        read(path)


def test_block_ids_may_be_hashes_of_any_size_and_may_be_missing(tmp_path: Path) -> None:
    first = {"timestamp": 0, "input_length": 1500, "output_length": 20, "hash_ids": [10**30, 7, -8]}
    second = first | {"timestamp": 900, "hash_ids": [10**30, 7, 9]}
    third = {"timestamp": 2000, "input_length": 5, "output_length": 0}
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (first, second, third)))
    work = read(path)
    assert [ids.tolist() for ids in work.blocks] == [[0, 1, 2], [0, 1, 3], []]
    assert work.group[0] == work.group[1] != work.group[2] == -1
    result, books = run("tokenllm", work, Machine(), 4000, 0)
    assert books.first_token_s[1] < 0.6 * books.first_token_s[0]
    assert result.refused_share == 0


def test_nobody_fits(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    flags = ["--policy", "tokenllm", "--rate", "1", "--requests", "20", "--capacity", "10", "--json", str(out)]
    assert cli.main(["simulate", "--trace", str(AZURE), *flags]) == 0
    assert [row["refused_share"] for row in json.loads(out.read_text())] == [1, 1]


def test_a_step_clock_counts() -> None:
    assert StepClock().decode_steps_s(3, 10, 4).sum() == 4
