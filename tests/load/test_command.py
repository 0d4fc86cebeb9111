"""The command as a user calls it: figures on the terminal, saved and compared, and an exit code that tells failures."""

import asyncio
import sys
from pathlib import Path

import pytest
from fake_server import FakeServer, serving

import load as command
from loadgen.report import load


def call(fake: FakeServer, *arguments: str) -> int:
    """The exit code of the command against a fake server."""

    async def run() -> int:
        async with serving(fake) as base_url:
            return await asyncio.to_thread(command.main, ["--base-url", base_url, *arguments])

    return asyncio.run(run())


def test_the_script_runs_by_itself() -> None:
    async def run() -> tuple[int | None, str]:
        script = [sys.executable, command.__file__, "--workload", "absent.json"]
        child = await asyncio.create_subprocess_exec(*script, stdout=asyncio.subprocess.PIPE)
        output, _ = await child.communicate()
        return child.returncode, output.decode()

    code, text = asyncio.run(run())
    assert code == 2 and "absent.json" in text


def test_runs_are_shown_saved_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake = FakeServer(first_s=0.01)
    out = tmp_path / "one"
    code = call(fake, "--concurrency", "1,4", "--workload", "random", "--output-tokens", "3", "--out", str(out))
    text = capsys.readouterr().out
    assert code == 0, text
    assert "4 streams" in text and "TTFT" in text
    report = load(tmp_path / "one.json")
    assert [run.figures.requests for run in report.runs] == [2, 8]
    assert report.runs[1].figures.output_tokens == 24
    prompts = [tuple(body["prompt"]) for body in fake.bodies]
    assert len(prompts) == len(set(prompts)) == 1 + 2 + 8, "no prompt is sent twice, or a prefix cache would answer it"
    assert {len(prompt) for prompt in prompts} == {128}
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")

    saved = str(tmp_path / "one.json")
    code, text = call(fake, "--compare", saved, saved, "--out", str(tmp_path / "both")), capsys.readouterr().out
    assert code == 0, text
    assert text.count("1.00") >= 6, "every ratio of a report to itself is one"
    assert (tmp_path / "both.png").exists()


def test_failures_show_in_the_table_and_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake = FakeServer(break_request=lambda number: "refuse" if number > 2 else "")
    assert call(fake, "--concurrency", "2", "--requests", "4", "--out", str(tmp_path / "x")) == 1
    assert "2 x ServerFault: HTTP 429" in capsys.readouterr().out
    assert load(tmp_path / "x.json").runs[0].figures.failed == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--concurrency", "0"], "--concurrency"),
        (["--rate", "-1"], "--rate"),
        (["--workload", "absent.json"], "absent.json"),
        (["--compare", "absent.json"], "absent.json"),
        (["--model", "fake"], "the first request failed: ServerFault: HTTP 429"),
    ],
)
def test_what_cannot_be_sent_is_said_at_once(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(FakeServer(break_request=lambda number: "refuse"), *arguments) == 2
    assert said in capsys.readouterr().out
