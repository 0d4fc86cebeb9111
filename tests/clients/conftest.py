"""The one server that all clients talk to, and the table of what they said."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from client_environments import Client
from rich.console import Console
from rich.table import Table

from house import REAL, House

API_KEY = "sk-for-the-clients"
LONGEST_S = 120


class Outcome(NamedTuple):
    client: Client
    passed: str
    whole: bool
    seconds: float


OUTCOMES = pytest.StashKey[list[Outcome]]()


@pytest.fixture(scope="session")
def server(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """With the embedded model, on a free port, for those who know its key."""
    log = tmp_path_factory.mktemp("clients") / "server.log"
    house = House([*REAL, "--port", "0", "--max-total-tokens", "8192"], log, {"TOKENLLM_API_KEY": API_KEY})
    try:
        yield house.wait_greeted()
    finally:
        house.raze()


@pytest.fixture
def run_script(server: House, pytestconfig: pytest.Config) -> Callable[[Client], subprocess.CompletedProcess[str]]:
    """Runs a client's script, which has no settings but its own, and notes for the table how that went."""
    outcomes = pytestconfig.stash.setdefault(OUTCOMES, [])

    def run_script(client: Client) -> subprocess.CompletedProcess[str]:
        begun_s = time.monotonic()
        command = [*client.command(), server.url, API_KEY]
        environment = {"PATH": os.environ["PATH"], "HOME": str(client.folder)}
        done = subprocess.run(
            command, cwd=client.folder, env=environment, capture_output=True, text=True, timeout=LONGEST_S
        )
        passed = ", ".join(done.stdout.splitlines())
        outcomes.append(Outcome(client, passed, done.returncode == 0, time.monotonic() - begun_s))
        return done

    return run_script


def pytest_terminal_summary(config: pytest.Config) -> None:
    if outcomes := config.stash.get(OUTCOMES, []):
        table = Table("client", "version", "passed", "", "seconds", show_lines=True)
        for client, passed, whole, seconds in outcomes:
            versions = "\n".join(client.packages).replace("==", " ")
            table.add_row(str(client), versions, passed, "all" if whole else "FAILED", f"{seconds:.1f}")
        Console(width=140).print(table)
