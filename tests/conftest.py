"""Fixtures that more than one room needs."""

import os
from collections.abc import Generator
from pathlib import Path
from typing import TypeVar

import pytest

# before anything imports Triton: where there is no GPU, its interpreter plays one
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"
# before torch is imported: its threads must not spin for long while other processes need the cores
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

from tokenllm.checkpoint.source import resolve


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that is skipped has failed: what cannot be tested here must not look as if it were."""
    return _failed_if_skipped((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return _failed_if_skipped((yield))


Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


def _failed_if_skipped(report: Report) -> Report:
    if report.skipped and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", f"no test may be skipped: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The embedded default model's file, downloaded once into the cache folder."""
    return resolve("")
