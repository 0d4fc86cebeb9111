"""Gateway processes for the tests of what goes over the wire."""

from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
from fake_generation import GatewayUnderTest

from tokenllm.text.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def tokenizer(default_model: Path) -> Tokenizer:
    return load_tokenizer(default_model)


@pytest.fixture(scope="session")
def gateway(default_model: Path, tokenizer: Tokenizer) -> Iterator[GatewayUnderTest]:
    """One process for all tests that leave it as they found it."""
    under_test = GatewayUnderTest(default_model, tokenizer, max_queued_requests=3)
    under_test.load_model()
    yield under_test
    under_test.close()


@pytest.fixture
def fresh(gateway: GatewayUnderTest) -> Iterator[GatewayUnderTest]:
    """The same process with a generation that has heard nothing yet."""
    gateway.kill_model()
    gateway.load_model()
    yield gateway
    if not gateway.generation:
        gateway.load_model()


@pytest.fixture
def start(default_model: Path, tokenizer: Tokenizer) -> Iterator[Callable[..., GatewayUnderTest]]:
    """Processes of the test's own."""
    started: list[GatewayUnderTest] = []

    def start_one(**settings: object) -> GatewayUnderTest:
        started.append(GatewayUnderTest(default_model, tokenizer, **settings))
        return started[-1]

    yield start_one
    for under_test in started:
        under_test.close()


@pytest.fixture(scope="session")
def client(gateway: GatewayUnderTest) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, timeout=20)
