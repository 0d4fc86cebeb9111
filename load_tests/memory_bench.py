"""What the prefix tree costs the scheduler: a prompt of 8192 tokens found along one edge, 64 or 8192 of them; the same
among ten thousand other nodes; and a chunk entered, and room made.
"""

import argparse
import gc
import time
from collections.abc import Callable
from itertools import count

import numpy as np
from rich.console import Console
from rich.table import Table

from tokenllm.memory.prefix_tree import Ids, PrefixTree, Realm
from tokenllm.memory.token_memory import TokenMemory

PROMPT_TOKENS, CHUNK_TOKENS, OTHERS, OTHERS_TOKENS, SYSTEM_TOKENS = 8192, 512, 10_000, 64, 256
REALM = Realm("tenant", "", "", "1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=300)
    repeats = parser.parse_args().repeats
    table = Table("what", "p50 µs", "p99 µs")
    gc.disable()
    for edges in (1, 64, PROMPT_TOKENS):
        measure_chain(table, edges, repeats if edges < PROMPT_TOKENS else 20)
    measure_full(table, repeats)
    Console().print(table)


def measure_chain(table: Table, edges: int, repeats: int) -> None:
    memory, prompt = with_chain(edges)
    tree = memory.prefixes
    show(table, f"match, {PROMPT_TOKENS} tokens on {edges} edges", repeats, lambda: tree.match(REALM, prompt))
    show(table, f"match, lock, unlock, {edges} edges", repeats, lambda: hold(tree, prompt))
    show(table, f"look, {edges} edges", repeats, lambda: tree.look(REALM, prompt))


def measure_full(table: Table, repeats: int) -> None:
    memory, prompt = with_chain(64)
    tree = memory.prefixes
    with_others(memory)
    show(table, f"match, 64 edges among {OTHERS} others", repeats, lambda: tree.match(REALM, prompt))
    slots, root = tree.match(REALM, prompt).slots, tree.root(REALM)
    show(table, f"insert, {PROMPT_TOKENS} tokens known already", repeats, lambda: tree.insert(root, prompt[:-1], slots))
    fresh = count(500_000, OTHERS_TOKENS)
    show(table, f"take {OTHERS_TOKENS} of a full memory, insert", repeats, lambda: replace(memory, next(fresh)))
    show(table, "take 1, give it back", repeats, lambda: memory.give_back(memory.take(1)))


def with_chain(edges: int) -> tuple[TokenMemory, Ids]:
    """A memory that has cached a prompt along so many edges, and the prompt with one more token."""
    memory = TokenMemory(PROMPT_TOKENS + OTHERS * OTHERS_TOKENS + SYSTEM_TOKENS)
    prompt = np.random.default_rng(0).integers(0, 128_000, PROMPT_TOKENS + 1, dtype=np.int32)
    memory.prefixes.insert(memory.prefixes.root(REALM), prompt[:-1], memory.take(PROMPT_TOKENS))
    for end in range(PROMPT_TOKENS, 0, -PROMPT_TOKENS // edges):
        memory.prefixes.match(REALM, prompt[: end + 1])  # the edge is split here
    return memory, prompt


def with_others(memory: TokenMemory) -> None:
    """Answers to one system prompt, until the memory is full."""
    system = np.arange(SYSTEM_TOKENS, dtype=np.int32)
    slots = memory.take(SYSTEM_TOKENS)
    for first in range(OTHERS):
        ids = np.concatenate([system, np.arange(first, first + OTHERS_TOKENS, dtype=np.int32)])
        memory.prefixes.insert(memory.prefixes.root(REALM), ids, np.concatenate([slots, memory.take(OTHERS_TOKENS)]))
    assert not memory.free, "all of it is cached"


def hold(tree: PrefixTree, prompt: Ids) -> None:
    node = tree.match(REALM, prompt).node
    tree.lock(node)
    tree.unlock(node)


def replace(memory: TokenMemory, first: int) -> None:
    ids = np.arange(first, first + OTHERS_TOKENS, dtype=np.int32)
    memory.prefixes.insert(memory.prefixes.root(REALM), ids, memory.take(OTHERS_TOKENS))


def show(table: Table, what: str, repeats: int, deed: Callable[[], object]) -> None:
    times = []
    for _ in range(repeats):
        began = time.perf_counter_ns()
        deed()
        times.append(time.perf_counter_ns() - began)
    p50, p99 = np.percentile(times, (50, 99)) / 1e3
    table.add_row(what, f"{p50:.1f}", f"{p99:.1f}")


if __name__ == "__main__":
    main()
