"""Several client processes are one client: every request once, in order, and the pace of all together."""

from pathlib import Path

import pytest
from fake_server import FakeServer
from hypothesis import given
from hypothesis import strategies as st
from test_command import call

from loadgen.client import Answered, Arrivals, Streams
from loadgen.many import shares_of
from loadgen.report import load


def test_processes_share_the_requests_and_begin_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake = FakeServer(first_s=0.5)
    random = ("--workload", "random", "--requests", "7", "--output-tokens", "3", "--prompt-tokens", "16")
    code = call(fake, *random, "--concurrency", "5", "--processes", "2", "--out", str(tmp_path / "two"))
    assert code == 0, capsys.readouterr().out
    (run,) = load(tmp_path / "two.json").runs
    assert run.figures.requests == 7 and run.figures.output_tokens == 21
    assert fake.most_running == 5, "streams of both processes were under way at once"
    prompts = [tuple(body["prompt"]) for body in fake.bodies]
    assert len(set(prompts)) == 8, "the first request, which warms up, and seven others"
    answers = [outcome for outcome in run.outcomes if isinstance(outcome, Answered)]
    assert max(answer.started_s for answer in answers) - min(answer.started_s for answer in answers) >= 0.5
    assert run.figures.wall_s < 2, "the start of the processes is not part of the run"


@given(st.integers(1, 2000), st.integers(1, 64))
def test_streams_are_divided_and_none_is_lost(streams: int, processes: int) -> None:
    shares = [share for share in shares_of(Streams(streams), processes) if isinstance(share, Streams)]
    counts = [share.streams for share in shares]
    assert sum(counts) == streams and min(counts) >= 1 and max(counts) - min(counts) <= 1
    assert len(counts) <= processes


def test_arrivals_of_all_processes_add_up() -> None:
    shares = [share for share in shares_of(Arrivals(10.0, 3), 4) if isinstance(share, Arrivals)]
    assert sum(share.per_s for share in shares) == 10.0
    assert len({share.seed for share in shares}) == 4
