"""Synthetic workloads, drawn from a seed: `--trace synthetic:NAME`. All requests are there from the start."""

from collections.abc import Callable

import numpy as np

from tokenllm.simulate.workload import TraceError, Workload, of

Random = np.random.Generator


def dist1(random: Random, count: int) -> Workload:
    """Decode-heavy: short prompts, long answers."""
    return of("dist1", random.integers(32, 4097, count), random.integers(2048, 4097, count), 4096)


def dist2(random: Random, count: int) -> Workload:
    """Both long."""
    return of("dist2", random.integers(3000, 5001, count), random.integers(3000, 5001, count), 5000)


def dist3(random: Random, count: int) -> Workload:
    """Prefill-heavy: long prompts, answers of any length."""
    return of("dist3", random.integers(2048, 4097, count), random.integers(32, 4097, count), 4096)


def chat(random: Random, count: int) -> Workload:
    """Lognormal turns of a conversation, far below what they may take."""
    prompt, length = random.lognormal(5.3, 1.0, count), random.lognormal(5.3, 0.9, count)
    return of("chat", prompt.astype(np.int64).clip(4, 4096), length.astype(np.int64).clip(4, 2048), 2048)


def o1(random: Random, count: int) -> Workload:
    """Reasoning: short questions, answers from hundreds to many thousands of tokens, 16k allowed."""
    prompt, length = random.lognormal(5.0, 1.0, count), random.lognormal(7.3, 0.9, count)
    return of("o1", prompt.astype(np.int64).clip(8, 4096), length.astype(np.int64).clip(64, 16000), 16384)


def four_apps(random: Random, count: int) -> Workload:
    """Chat, retrieval, code completion and agents, each with a system prompt of its own that tells them apart."""
    app = random.integers(0, 4, count)
    prompt_of = np.array([5.5, 8.2, 7.3, 7.8])[app]
    length_of = np.array([5.6, 5.0, 3.6, 6.6])[app]
    spread = np.array([0.8, 0.5, 0.6, 0.7])[app]
    prompt = random.lognormal(prompt_of, 0.6).astype(np.int64).clip(16, 8192)
    length = random.lognormal(length_of, spread).astype(np.int64).clip(2, 4096)
    return of("four-apps", prompt, length, np.array([2048, 1024, 256, 4096])[app], group=app)


MIXES: dict[str, tuple[Callable[[Random, int], Workload], int, int]] = {  # how it is drawn, requests, tokens of memory
    "dist1": (dist1, 1500, 120_000),
    "dist2": (dist2, 1500, 120_000),
    "dist3": (dist3, 600, 120_000),
    "chat": (chat, 1600, 60_000),
    "o1": (o1, 1981, 120_000),
    "four-apps": (four_apps, 2000, 120_000),
}


def draw(name: str, seed: int, count: int | None = None) -> Workload:
    if name not in MIXES:
        raise TraceError(f"synthetic:{name}: there are {', '.join(MIXES)}")
    mix, requests, _ = MIXES[name]
    return mix(np.random.default_rng(seed), count or requests)
