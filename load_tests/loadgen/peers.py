"""Peers under test: how each is started, asked and known to be ready.

Two kinds: a server that speaks the OpenAI protocol, and the transformers child, which computes one static
batch after another and is asked through its standard input.
"""

import asyncio
import json
import shlex
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from loadgen.client import Answered, Outcome, Server, Streams, find_model, run_load
from loadgen.processes import Child, free_port
from loadgen.workload import IdsPrompt

KV_GAUGE = "tokenllm_kv_tokens_capacity"

Ask: TypeAlias = Callable[[list[IdsPrompt], int], list[Outcome]]


class HttpPeer(msgspec.Struct, frozen=True, tag="http"):
    """A server: its command, with {port} and {model}, and the path that answers 200 when it is ready."""

    name: str
    command: str
    ready_path: str
    extra_body: dict[str, Any] = {}


class BatchPeer(msgspec.Struct, frozen=True, tag="batch"):
    """A child that reads batches, with {model} in its command."""

    name: str
    command: str


Peer: TypeAlias = HttpPeer | BatchPeer


class Running(msgspec.Struct, frozen=True):
    """A peer that is up. `ask` sends prompts with so many streams."""

    child: Child
    start_s: float  # from the start of its process until it was ready
    kv_tokens: int | None
    ask: Ask


@contextmanager
def running(peer: Peer, model: Path, log: Path) -> Iterator[Running]:
    match peer:
        case HttpPeer():
            port = free_port()
            root = f"http://127.0.0.1:{port}"
            with Child(_words(peer.command, model, port), log) as child:
                start_s = child.wait_until_ready(root + peer.ready_path)
                yield Running(child, start_s, kv_tokens(root), _asking_server(f"{root}/v1", peer.extra_body))
        case BatchPeer():
            with Child(_words(peer.command, model, 0), log, piped=True) as child:
                child.read_line()
                yield Running(child, time.monotonic() - child.began, None, _asking_batches(child))


def _words(command: str, model: Path, port: int) -> list[str]:
    return [word.format(model=model, port=port) for word in shlex.split(command)]


def kv_tokens(root: str) -> int | None:
    """The size of the KV memory, of a server that tells it in its metrics."""
    try:
        with urllib.request.urlopen(f"{root}/metrics", timeout=5) as response:
            page = response.read().decode()
    except OSError:
        return None
    values = [float(line.split()[-1]) for line in page.splitlines() if line.startswith(KV_GAUGE)]
    return int(values[0]) if values else None


def _asking_server(base_url: str, extra_body: dict[str, Any]) -> Ask:
    server = Server(base_url, asyncio.run(find_model(base_url, "")), extra_body=extra_body)
    return lambda prompts, streams: asyncio.run(run_load(server, prompts, Streams(streams)))


def _asking_batches(child: Child) -> Ask:
    def ask(prompts: list[IdsPrompt], streams: int) -> list[Outcome]:
        began = time.monotonic()
        return [
            answer
            for first in range(0, len(prompts), streams)
            for answer in _batch(child, prompts[first : first + streams], time.monotonic() - began)
        ]

    return ask


def _batch(child: Child, prompts: list[IdsPrompt], started_s: float) -> list[Answered]:
    """All prompts of a batch are equally long, and get every token at the same time."""
    child.write_line(json.dumps({"prompts": [p.ids for p in prompts], "output_tokens": prompts[0].output_tokens}))
    token_s = json.loads(child.read_line())["token_s"]
    gaps = [now - before for before, now in pairwise(token_s)]
    return [
        Answered(started_s, token_s[0], token_s[-1], gaps, len(p.ids), len(token_s), p.output_tokens, True)
        for p in prompts
    ]
