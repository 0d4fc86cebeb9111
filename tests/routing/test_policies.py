import timeit

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenllm.routing.columns import Columns
from tokenllm.routing.conservative import WorstCase
from tokenllm.routing.first_come import FirstCome
from tokenllm.routing.lengths import MOST_SEEN, Lengths, bins
from tokenllm.routing.lightllm import LightLLM
from tokenllm.routing.pace import Pace
from tokenllm.routing.past_future import PastFuture
from tokenllm.routing.peaks import peak
from tokenllm.routing.router import Router
from tokenllm.routing.tokenllm import AHEAD, PAUSED, STEP, TokenLLM

PACE = Pace(step_s=0.005, per_held_s=4e-8, per_decode_s=0, per_read_s=2.4e-5, target_s=0.1)


def columns(rows: list[tuple[int, int, int]], running: bool = False, **others: list[int]) -> Columns:
    """Of (prompt, generated, max_tokens)."""
    prompt, generated, most = np.array(rows, np.int64).reshape(-1, 3).T
    zeros = np.zeros(len(prompt), np.int64)
    given = {name: np.array(values) for name, values in others.items()}
    values = {
        "uid": np.arange(len(prompt)),
        "prompt": prompt,
        "generated": generated,
        "max_tokens": most,
        "unread": zeros + 1 if running else prompt + generated,
        "shared": zeros,
        "arrival": zeros.astype(float),
        "kind": zeros,
        "tenant": zeros,
        "priority": zeros,
    }
    return Columns(**(values | given))


NOBODY = columns([])


@pytest.mark.parametrize(
    ("pairs", "highest"),
    [
        ([(5, 4), (4, 3), (5, 3), (3, 2), (4, 2)], 31),
        ([(450, 150), (250, 150), (250, 100)], 1250),
        ([(250, 1000), (250, 950), (450, 850)], 3500),
    ],
)
def test_published_examples_of_the_peak(pairs: list[tuple[int, int]], highest: int) -> None:
    tokens, steps = np.array(pairs).T
    assert peak(tokens, steps) == highest


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40)), min_size=1, max_size=12))
def test_the_peak_is_the_highest_of_all_steps(pairs: list[tuple[int, int]]) -> None:
    tokens, steps = np.array(pairs).T
    by_step = [int((tokens + step)[steps >= step].sum()) for step in range(41)]
    assert peak(tokens, steps) == max(by_step)


requests = st.lists(st.tuples(st.integers(1, 200), st.just(0), st.integers(1, 200)), min_size=1, max_size=20)


@given(requests, requests, st.integers(0, 4000))
def test_the_worst_case_of_whom_conservative_admits_fits(
    running: list[tuple[int, int, int]], waiting: list[tuple[int, int, int]], room: int
) -> None:
    now, candidates = columns(running, running=True), columns(waiting)
    count = WorstCase().admits(now, candidates, room)
    worst = [prompt + most - 1 for prompt, _, most in running + waiting]
    alive = len(running) + count
    assert count == 0 or sum(worst[:alive]) <= room
    assert count == len(waiting) or sum(worst[: alive + 1]) > room


def test_lightllm_counts_on_max_tokens_when_busy_and_on_its_average_else() -> None:
    policy, waiting = LightLLM(), columns([(100, 0, 6000)] * 15)
    for _ in range(200):
        policy.learn(0, 300)
    assert policy.average == pytest.approx(300, rel=0.01)
    assert policy.admits(NOBODY, waiting, 4500) == 10  # each 101 tokens and about 300 + 2 + 16 steps
    busy = columns([(4400, 10, 20)], running=True)
    assert policy.admits(busy, waiting, 5000) == 0


def test_past_future_draws_from_the_past_of_those_who_got_as_far() -> None:
    policy = PastFuture(seed=3)
    policy.admits(NOBODY, columns([(1, 0, 1000)]), 1e9)
    for length in range(100, 400):
        policy.learn(0, length)
    draws = policy._draw(columns([(10, 250, 1000)], running=True), 4000, np.random.default_rng(3))
    assert 1 <= draws.min() < 10
    assert np.median(draws) == pytest.approx(75, abs=8)


def test_survival_is_learned_and_forgets_nobody_who_still_runs() -> None:
    lengths = Lengths()
    kind = lengths.kind(-1, 1000)
    for length in np.random.default_rng(2).permutation(np.tile(np.arange(1, 1001), 5)):
        lengths.learn(kind, int(length))
    lengths.refresh(np.array([kind]), np.array([0]))
    at = lengths.table[kind, bins(np.array([0, 250, 500, 750]))]
    assert at == pytest.approx([1, 0.75, 0.5, 0.25], abs=0.03)
    assert lengths.mean[kind] == pytest.approx(500, rel=0.03)
    cold = Lengths()
    kind = cold.kind(-1, 1000)
    for _ in range(5):
        cold.learn(kind, 50)
    cold.refresh(np.full(95, kind), np.full(95, 200))
    assert cold.table[kind, bins(np.array(190))] > 0.9, "five of a hundred were short; the others are beyond that"


def test_an_application_of_its_own_is_told_apart_and_a_new_one_leans_on_its_class() -> None:
    lengths = Lengths()
    short = [lengths.kind(7, 1000) for _ in range(40)][-1]
    everybody = lengths.kind(-1, 1000)
    for _ in range(300):
        lengths.learn(short, 20)
        lengths.learn(everybody, 900)
    lengths.refresh(np.zeros(0, int), np.zeros(0, int))
    assert lengths.mean[short] < 60 < lengths.mean[everybody]
    assert lengths.kind(8, 1000) == everybody


def test_however_many_were_seen_but_once_an_application_is_still_learned() -> None:
    lengths = Lengths()
    everybody = {lengths.kind(group, 1000) for group in range(MOST_SEEN + 1)}
    assert len(everybody) == 1 and [lengths.kind(7, 1000) for _ in range(40)][-1] not in everybody


def test_a_class_that_is_new_leans_on_all_others() -> None:
    lengths = Lengths()
    known = lengths.kind(-1, 1000)
    for _ in range(300):
        lengths.learn(known, 20)
    new = lengths.kind(-1, 4000)
    lengths.refresh(np.zeros(0, int), np.zeros(0, int))
    assert lengths.mean[new] < 100 < 4000


def test_lengths_survive_a_restart(tmp_path) -> None:
    lengths = Lengths()
    kind = [lengths.kind(3, 500) for _ in range(20)][-1]
    for length in range(1, 200):
        lengths.learn(kind, length)
    lengths.save(tmp_path / "lengths.json")
    again = Lengths.load(tmp_path / "lengths.json")
    for each in (lengths, again):
        each.refresh(np.zeros(0, int), np.zeros(0, int))
    assert again.kind(3, 500) == kind
    assert again.mean == pytest.approx(lengths.mean, rel=0.01)


def test_what_lies_ahead_agrees_with_drawing_it() -> None:
    lengths, random = Lengths(), np.random.default_rng(1)
    kind = lengths.kind(-1, 400)
    for length in random.integers(100, 400, 3000):
        lengths.learn(kind, int(length))
    rows = [(50, 20, 400), (80, 150, 400), (10, 300, 400)]
    running = columns(rows, running=True, kind=[kind] * 3)
    lengths.refresh(running.kind[:0], running.generated[:0])
    mean, variance = TokenLLM(lengths, PACE, 1000).ahead(running)
    drawn = [random.integers(max(100, generated + 1), 400, 20000) - generated for _, generated, _ in rows]
    place = 9
    step = int(AHEAD[place])
    held = np.array([(d > step) * (p + g + step) for d, (p, g, _) in zip(drawn, rows, strict=True)])
    assert mean[:, place].sum() == pytest.approx(held.sum(0).mean(), rel=0.05)
    assert np.sqrt(variance[:, place].sum()) == pytest.approx(held.sum(0).std(), rel=0.15)


def policy_of(capacity: int) -> TokenLLM:
    lengths = Lengths()
    lengths.kind(-1, 256)
    return TokenLLM(lengths, PACE, capacity)


def test_the_short_go_first_but_nobody_is_left_behind() -> None:
    policy = policy_of(10_000)
    waiting = columns([(2000, 0, 100), (20, 0, 100), (200, 0, 100)])
    assert policy.order(1.0, NOBODY, waiting, 3).tolist() == [1, 2, 0]
    policy.admitted(1.0, waiting)
    old = columns([(20, 0, 100), (2000, 0, 100)], arrival=[999, 0])
    assert policy.order(1000.0, NOBODY, old, 2).tolist() == [1, 0]


def test_priority_goes_first_and_tenants_take_turns() -> None:
    policy = policy_of(10_000)
    waiting = columns([(10, 0, 50), (1000, 0, 50)], priority=[0, 1])
    assert policy.order(0.0, NOBODY, waiting, 2).tolist() == [1, 0]
    many = columns([(100, 0, 50)] * 6 + [(120, 0, 50)] * 2, tenant=[1] * 6 + [2] * 2)
    assert set(policy.order(0.0, NOBODY, many, 2).tolist()) & {6, 7}


def test_a_tenant_that_comes_back_has_no_claim_on_what_others_had_meanwhile() -> None:
    policy = policy_of(10_000)
    first, second = (columns([(100, 0, 50)] * 40, tenant=[tenant] * 40) for tenant in (1, 2))
    policy.order(0.0, NOBODY, first.then(second), 80)
    policy.admitted(0.0, second.take(slice(4)))
    for _ in range(3):  # the first has gone
        policy.order(0.0, NOBODY, second, 40)
        policy.admitted(0.0, second)
    served = policy.order(0.0, NOBODY, first.then(second), 80)[:20] // 40
    assert 8 <= served.sum() <= 12, "they take turns from now on"


def test_of_tenants_that_have_gone_nothing_is_kept() -> None:
    """A tenant is whoever shows a key, and keys cost nothing."""
    policy = policy_of(10_000)
    for tenant in range(100):
        one = columns([(100, 0, 50)], tenant=[tenant << 20])
        policy.admitted(0.0, one.take(policy.order(0.0, NOBODY, one, 1)))
    assert len(policy._served) == 1


@given(requests, requests, st.integers(0, 3000))
def test_a_step_never_takes_more_than_is_free(
    running: list[tuple[int, int, int]], waiting: list[tuple[int, int, int]], free: int
) -> None:
    for policy in (WorstCase(), LightLLM(), PastFuture(), policy_of(5000)):
        now = columns(running, running=True)
        queue = columns(
            waiting, unread=[max(1, prompt - prompt // 2) for prompt, _, _ in waiting]
        )  # half of each cached
        decision = Router(policy, PACE, 256).decide(0.0, now, queue, free)
        given_back = int(now.held[decision.pause].sum())
        taken = decision.tokens + int(queue.held[decision.admit].sum())
        assert taken <= free + given_back or len(decision.pause) == len(running) - 1
        assert decision.tokens >= len(running) - len(decision.pause), "every stream that is not paused gets its token"
        assert len(set(decision.admit.tolist())) == len(decision.admit)
        assert not (len(decision.pause) and len(decision.admit))


class Reckless(FirstCome):
    """Admits everybody."""

    def admits(self, running: Columns, candidates: Columns, room: float) -> int:
        return len(candidates)


def test_a_prefix_hit_takes_from_what_is_free() -> None:
    now, waiting = columns([(50, 5, 90)] * 10, running=True), columns([(100, 0, 50)], unread=[40])
    decision = Router(Reckless(), PACE, 256).decide(0.0, now, waiting, 100)
    assert decision.admit.tolist() == [0]
    assert decision.tokens == 10 + 30, "60 of its tokens are pinned, 10 are the streams'"


def test_as_few_as_needed_are_paused_and_the_last_come_first() -> None:
    now = columns([(50, 5, 90), (60, 5, 90), (2, 2, 90)], running=True)
    decision = Router(Reckless(), PACE, 256).decide(0.0, now, columns([(1, 0, 5)]), 0)
    assert decision.pause.tolist() == [2], "its three slots do for the next tokens of two"
    assert decision.tokens == 2
    assert not len(decision.admit)


def test_tokenllm_pauses_the_cheapest_that_makes_room_for_a_while() -> None:
    policy = policy_of(10_000)
    running = columns([(5000, 10, 256), (1500, 10, 256), (100, 10, 256)], running=True)
    assert policy.victims(running).tolist() == [1, 0, 2]


def test_tokenllm_pauses_who_was_paused_before() -> None:
    policy = policy_of(10_000)
    running = columns([(5000, 10, 256), (1500, 10, 256), (100, 10, 256)], running=True)
    policy.paused(running.take(np.array([0])))
    assert policy.victims(running).tolist() == [0, 1, 2]


def test_tokenllm_counts_each_paused_request_once_and_earns_the_right_to_pause() -> None:
    policy = policy_of(10_000)
    victim = columns([(100, 10, 256)], running=True)
    before = policy._z
    policy.paused(victim)
    raised = policy._z
    policy.paused(victim)
    assert before < policy._z == raised
    for _ in range(round(1 / PAUSED)):
        policy.learn(0, 5000)
    assert policy._z == pytest.approx(before, abs=STEP * PAUSED), "one of so many long answers may be paused"


def test_who_was_paused_comes_back_as_soon_as_the_mean_fits() -> None:
    lengths = Lengths()
    kind = lengths.kind(-1, 400)
    for length in np.random.default_rng(4).integers(20, 400, 500):
        lengths.learn(kind, int(length))
    policy = TokenLLM(lengths, PACE, 2000)
    running = columns([(50, 20, 400)] * 6, running=True, kind=[kind] * 6)
    lengths.refresh(running.kind, running.generated)
    new, back = columns([(69, 0, 400)], kind=[kind]), columns([(49, 20, 400)], kind=[kind])
    means = policy.ahead(running.then(back))[0].sum(0)
    assert policy.admits(running, back, means.max() + 1) == 1
    assert policy.admits(running, new, means.max() + 1) == 0


def test_lengths_nobody_has_reached_go_on_as_those_that_ended() -> None:
    lengths = Lengths()
    kind = lengths.kind(-1, 16384)
    none = np.zeros(0, int)
    lengths.refresh(none, none)
    assert lengths.mean[kind] > 8000, "before anything is known nearly all of it is used"
    for length in (60 * (1 + np.random.default_rng(5).pareto(1.2, 60))).astype(int):
        lengths.learn(kind, min(600, int(length)))
    lengths.refresh(none, none)
    at = lengths.table[kind, bins(np.array([590, 6000]))]
    assert at[1] < 0.2 * at[0], "a power law keeps 1/16 of them"
    many = Lengths()
    kind = many.kind(-1, 16384)
    many.learn(kind, 500)
    many.refresh(np.full(200, kind), np.full(200, 2000))
    assert many.table[kind, bins(np.array(4000))] > 0.5, "one that ended among two hundred says little"


@pytest.mark.slow
def test_a_decision_takes_150_us() -> None:
    random = np.random.default_rng(0)
    policy = policy_of(400_000)
    kind = policy.lengths.kind(-1, 256)
    for length in random.integers(1, 256, 2000):
        policy.lengths.learn(kind, int(length))
    now = columns(
        [(int(p), int(p) % 200, 256) for p in random.integers(50, 2000, 256)], running=True, kind=[kind] * 256
    )
    waiting = columns([(int(p), 0, 256) for p in random.integers(50, 2000, 1000)], kind=[kind] * 1000)
    router = Router(policy, PACE, 512)
    assert len(router.decide(1.0, now, waiting, 40_000).admit)
    assert min(timeit.repeat(lambda: router.decide(1.0, now, waiting, 40_000), number=1, repeat=300)) < 150e-6


def test_prompts_are_read_in_chunks_that_leave_the_streams_their_pace() -> None:
    now = columns([(1000, 5, 100)] * 20, running=True)
    decision = Router(WorstCase(), PACE, 256).decide(0.0, now, columns([(50_000, 0, 10)]), 100_000)
    read = decision.tokens - 20
    step_s = PACE.step_s + PACE.per_held_s * int(now.held.sum()) + PACE.per_read_s * read
    assert step_s == pytest.approx(PACE.target_s, rel=0.01)


def test_the_order_does_not_depend_on_what_numbers_tenants_have() -> None:
    random = np.random.default_rng(0)
    for _ in range(100):
        rows = [(int(prompt), 0, 50) for prompt in random.integers(1, 5, 12)]
        tenants = random.integers(0, 4, 12)
        orders = [
            policy_of(10_000).order(0.0, NOBODY, columns(rows, tenant=names[tenants]), 12).tolist()
            for names in (np.arange(4), np.array([9, 7, 8, 1]))
        ]
        assert orders[0] == orders[1]
