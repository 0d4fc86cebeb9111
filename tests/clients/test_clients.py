"""Every client, in an environment of its own, against the embedded model: it chats, streams, leaves in the middle of a
stream, and is refused in words of its own. The OpenAI SDKs are part of every run of the tests, the others of
`make test-clients`."""

from collections.abc import Callable
from subprocess import CompletedProcess

import pytest
from client_environments import Client, clients

EACH_DOES = {"chat", "stream", "abort", "bad_request", "not_found"}
ALWAYS = "openai"


def marked(client: Client) -> object:
    return pytest.param(client, id=str(client), marks=[] if client.name == ALWAYS else pytest.mark.clients)


@pytest.mark.timeout(900)  # some are a hundred packages, which have to be fetched
@pytest.mark.parametrize("client", [marked(client) for client in clients()])
def test_a_client_works_unchanged(client: Client, run_script: Callable[[Client], CompletedProcess[str]]) -> None:
    client.install()
    done = run_script(client)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(done.stdout.splitlines()) >= EACH_DOES
