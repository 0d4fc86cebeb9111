"""The shared numbers: every page adds up, whoever writes it, and `/metrics` shows the sums."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from tokenllm.counters import HISTOGRAMS, METRICS, VALUES, Page, create_page, total
from tokenllm.gateway.metrics import render

CONTRACT = {
    "gauge": "kv_tokens_capacity kv_tokens_free kv_tokens_cached kv_tokens_active requests_running requests_waiting "
    "predicted_peak_tokens retry_after_seconds last_step_monotonic_seconds",
    "counter": "requests_finished_total prompt_tokens_total prompt_tokens_computed_total generation_tokens_total "
    "preemptions_total restarts_total steps_total kernel_compilations_total ring_corrupt_total",
    "histogram": "time_to_first_token_seconds inter_token_latency_seconds request_seconds step_seconds",
}
STEP = "tokenllm_step_seconds"


def samples(pages: list[Page]) -> dict[tuple[str, str], float]:
    """What Prometheus reads: values by name and its only label, if any."""
    families = text_string_to_metric_families(render(pages).decode())
    return {
        (sample.name, "".join(sample.labels.values())): sample.value for family in families for sample in family.samples
    }


def test_the_contract_is_kept():
    text = render([Page(create_page())]).decode()
    for kind, names in CONTRACT.items():
        for name in names.split():
            assert f"# TYPE tokenllm_{name} {kind}\n" in text
    for reason in ("stop", "length", "abort", "error", "refused"):
        assert f'tokenllm_requests_finished_total{{reason="{reason}"}} 0.0\n' in text
    assert f'{STEP}_bucket{{le="+Inf"}} 0.0\n' in text
    assert f"{STEP}_sum 0.0\n" in text
    assert f"{STEP}_count 0.0\n" in text
    assert text.count("# TYPE") == len(METRICS) == sum(len(names.split()) for names in CONTRACT.values())


steps = st.tuples(st.integers(0, 2), st.sampled_from(sorted(VALUES)), st.integers(0, 1000))


@given(st.lists(steps, max_size=30))
def test_every_number_is_the_sum_over_the_pages(added: list[tuple[int, tuple[str, str], int]]):
    pages = [Page(create_page()) for _ in range(3)]
    expected = dict.fromkeys(VALUES, 0)
    for page, (name, label), value in added:
        pages[page].add(name, value, label)
        expected[name, label] += value
    assert {(name, label): total(pages, name, label) for name, label in VALUES} == expected
    shown = samples(pages)
    assert {key: shown[key] for key in expected} == expected


@given(st.lists(st.tuples(st.integers(0, 1), st.sampled_from([0.0, 0.0005, 0.001, 0.0011, 2.5, 5.0, 5.1, 1e6]))))
def test_a_bucket_counts_everything_up_to_its_bound(events: list[tuple[int, float]]):
    pages = [Page(create_page()) for _ in range(2)]
    for page, seconds in events:
        pages[page].observe(STEP, seconds)
    shown = samples(pages)
    assert shown[f"{STEP}_count", ""] == shown[f"{STEP}_bucket", "+Inf"] == len(events)
    assert shown[f"{STEP}_sum", ""] == pytest.approx(sum(seconds for _, seconds in events))
    for bound in HISTOGRAMS[STEP][1]:
        assert shown[f"{STEP}_bucket", str(bound)] == sum(seconds <= bound for _, seconds in events)


def test_no_number_lies_upon_another():
    page = Page(create_page())
    for i, (name, label) in enumerate(VALUES):
        page.add(name, i + 1, label)
    for name in HISTOGRAMS:
        for seconds in (0.0001, 1e9):
            page.observe(name, seconds)
    assert [page.get(name, label) for name, label in VALUES] == [i + 1 for i in range(len(VALUES))]
    for name in HISTOGRAMS:
        events, seconds = page.histogram(name)
        assert (events[0], events[-1], sum(events), seconds) == (1, 1, 2, 1e9 + 0.0001)


def test_a_gauge_is_set_and_moved():
    page = Page(create_page())
    page.set("tokenllm_requests_waiting", 5)
    page.add("tokenllm_requests_waiting", -2)
    assert page.get("tokenllm_requests_waiting") == 3


@pytest.mark.parametrize(
    "slip",
    [
        lambda page: page.add("tokenllm_step_total"),
        lambda page: page.add("tokenllm_requests_finished_total"),
        lambda page: page.add("tokenllm_requests_finished_total", label="stopped"),
        lambda page: page.add(STEP),
        lambda page: page.set("tokenllm_steps_total", 3),
        lambda page: page.observe("tokenllm_steps_total", 3),
        lambda page: page.get(STEP),
        lambda page: total([page], "steps_total"),
    ],
)
def test_a_slip_in_a_name_is_an_error_at_once(slip):
    with pytest.raises(KeyError):
        slip(Page(create_page()))


CHILD = """
import os, signal, sys
from tokenllm.counters import Page
page = Page(int(sys.argv[1]))
page.add("tokenllm_restarts_total")
page.observe("tokenllm_request_seconds", 2.0)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_page_outlives_its_processes():
    fd = create_page()
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", CHILD, str(fd)], pass_fds=[fd], timeout=30).returncode == -9
    page = Page(fd)
    assert page.get("tokenllm_restarts_total") == 2
    assert sum(page.histogram("tokenllm_request_seconds")[0]) == 2
    assert page.histogram("tokenllm_request_seconds")[1] == 4.0


def test_counting_needs_neither_torch_nor_prometheus():
    loaded = "{'torch', 'numpy', 'prometheus_client'} & {*sys.modules}"
    code = f"import sys, tokenllm.counters, tokenllm.ring; print({loaded})"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert answer.stdout == "set()\n"
