"""Laws of the token memory, for requests that begin, read, decode, finish and are dropped in any order: every slot is
free, cached or active once; a row names only slots that hold what it should read; the tree knows what a dict knows, and
forgets what the dict would forget.
"""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tokenllm.memory.prefix_tree import Look, Node, PrefixTree, Realm
from tokenllm.memory.token_memory import TokenMemory
from tokenllm.memory.token_slots import Slots

CAPACITY = 32
REALMS = st.sampled_from([Realm("ann", "", "", "1"), Realm("bob", "", "", "1"), Realm("ann", "salt", "", "1")])
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=7)  # two words, so that prefixes meet
Prefix = tuple[Realm, tuple[int, ...]]  # a token, by all that it depends on


@dataclass
class Running:
    """A request as its scheduler sees it."""

    uid: int
    realm: Realm
    prompt: list[int]
    node: Node
    slots: Slots
    ids: list[int]
    shared: int  # so many of its slots are the tree's, on the way to `node`

    @property
    def reads(self) -> bool:
        return len(self.ids) < len(self.prompt)

    def prefix(self, count: int) -> Prefix:
        return self.realm, tuple(self.ids[:count])


@dataclass
class NaiveCache:
    """A prefix tree as a dict: each token by all that it depends on, and when it was last used."""

    last_use: dict[Prefix, int] = field(default_factory=dict)
    uses: int = 0

    def cached(self, realm: Realm, ids: list[int]) -> int:
        return next(
            count for count in range(len(ids), -1, -1) if not count or (realm, tuple(ids[:count])) in self.last_use
        )

    def use(self, prefixes: list[Prefix]) -> None:
        self.uses += 1
        self.last_use |= dict.fromkeys(prefixes, self.uses)

    def forget(self, count: int, held: set[Prefix]) -> set[Prefix]:
        """The token that is last in line and that no other depends on, so many times."""
        forgotten = set()
        for _ in range(count):
            inner = {(realm, ids[:-1]) for realm, ids in self.last_use}
            oldest = min((use, prefix) for prefix, use in self.last_use.items() if prefix not in inner | held)[1]
            del self.last_use[oldest]
            forgotten.add(oldest)
        return forgotten


class MemoryMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.memory = TokenMemory(CAPACITY)
        self.tree = self.memory.prefixes
        self.naive = NaiveCache()
        self.running: list[Running] = []
        self.content: dict[int, Prefix] = {}  # what the K and V of a slot that is not free are of
        self.uid = 0

    def held(self) -> set[Prefix]:
        return {request.prefix(count + 1) for request in self.running for count in range(request.shared)}

    def take(self, count: int) -> Slots | None:
        """Slots for tokens; what had to be forgotten for them is what the naive cache forgets."""
        missing = count - self.memory.free
        if count > self.memory.available:
            with pytest.raises(MemoryError, match=f"{count} token slots wanted"):
                self.memory.take(count)
            return None
        slots = self.memory.take(count)
        if missing > 0:
            forgotten = self.naive.forget(missing, self.held())
            evicted = set(slots.tolist()) & set(self.content)
            assert len(evicted) == missing and {self.content[slot] for slot in evicted} == forgotten
            for slot in evicted:
                del self.content[slot]
        assert not set(slots.tolist()) & set(self.content), "a slot that is taken was free"
        return slots

    def give_back(self, slots: Slots) -> None:
        self.memory.give_back(slots)
        for slot in slots.tolist():
            del self.content[slot]

    def compute(self, request: Running, tokens: list[int]) -> bool:
        slots = self.take(len(tokens))
        if slots is None:
            return False
        for slot, token in zip(slots.tolist(), tokens, strict=True):
            request.ids.append(token)
            self.content[slot] = request.prefix(len(request.ids))
        request.slots = np.concatenate([request.slots, slots])
        return True

    def rest(self, request: Running) -> tuple[np.ndarray, Slots]:
        """What it has computed and the tree does not hold for it; a row is written over by its next tenant."""
        return np.array(request.ids[request.shared :], np.int32), request.slots[request.shared :].copy()

    def insert(self, request: Running) -> Slots:
        known = max(request.shared, self.naive.cached(request.realm, request.ids))
        ids, row = self.rest(request)
        surplus = self.tree.insert(request.node, ids, row)
        row.fill(-1)
        self.naive.use([request.prefix(count + 1) for count in range(len(request.ids))])
        assert surplus.tolist() == request.slots[request.shared : known].tolist(), "what somebody had cached before"
        return surplus

    def leave(self, request: Running) -> None:
        before = self.held()
        self.running.remove(request)
        self.tree.unlock(request.node)
        self.naive.use(list(before - self.held()))

    @rule(realm=REALMS, prompt=PROMPTS)
    def begin(self, realm: Realm, prompt: list[int]) -> None:
        self.begin_one(realm, prompt)

    @rule(realm=REALMS, prompt=PROMPTS, answer=PROMPTS)
    def serve(self, realm: Realm, prompt: list[int], answer: list[int]) -> None:
        """A whole request, without anything between."""
        request = self.begin_one(realm, prompt)
        self.read_some(request, len(prompt))
        if not request.reads:
            self.compute(request, answer)
        self.finish_one(request)

    def begin_one(self, realm: Realm, prompt: list[int]) -> Running:
        match = self.tree.match(realm, np.array(prompt, np.int32))
        self.tree.lock(match.node)
        assert len(match) == self.naive.cached(realm, prompt[:-1]) < len(prompt)
        self.uid += 1
        ids = prompt[: len(match)]
        self.running.append(Running(self.uid, realm, prompt, match.node, match.slots, ids, shared=len(match)))
        return self.running[-1]

    @rule(realm=REALMS, prompt=PROMPTS)
    def look(self, realm: Realm, prompt: list[int]) -> None:
        most = prompt[:-1]
        cached, held = self.naive.cached(realm, most), self.held()
        active = sum((realm, tuple(prompt[: count + 1])) in held for count in range(cached))
        assert self.tree.look(realm, np.array(prompt, np.int32)) == Look(cached, active)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), count=st.integers(1, 6))
    def read(self, data: st.DataObject, count: int) -> None:
        self.read_some(data.draw(st.sampled_from(self.running)), count)

    def read_some(self, request: Running, count: int) -> None:
        tokens = request.prompt[len(request.ids) :][:count]
        if not tokens or not self.compute(request, tokens):
            return
        ids, row = self.rest(request)
        goes_on = self.naive.cached(request.realm, request.ids) > request.shared
        node = self.tree.extend(request.node, ids, row)
        row.fill(-1)
        assert (node is None) == goes_on, "what nobody had planned is the caller's, all of it"
        if node:
            request.node, request.shared = node, len(request.ids)
            self.naive.use([request.prefix(count + 1) for count in range(len(request.ids))])

    @precondition(lambda self: self.running)
    @rule(data=st.data(), token=st.integers(0, 1))
    def decode(self, data: st.DataObject, token: int) -> None:
        request = data.draw(st.sampled_from(self.running))
        if not request.reads:
            self.compute(request, [token])

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.finish_one(data.draw(st.sampled_from(self.running)))

    def finish_one(self, request: Running) -> None:
        surplus = self.insert(request)
        self.leave(request)
        self.give_back(surplus)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        """Nothing of it is kept but what it had inserted."""
        self.drop_one(data.draw(st.sampled_from(self.running)))

    def drop_one(self, request: Running) -> None:
        self.leave(request)
        self.give_back(request.slots[request.shared :])

    @rule(share=st.floats(0, 1))
    def evict(self, share: float) -> None:
        slots = self.tree.evict(int(share * self.tree.evictable))
        assert {self.content[slot] for slot in slots.tolist()} == self.naive.forget(len(slots), self.held())
        self.give_back(slots)

    def teardown(self) -> None:
        while self.running:
            self.drop_one(self.running[0])
        assert self.memory.active == self.tree.locked == 0
        self.memory.take(CAPACITY)
        assert not self.tree.cached

    @invariant()
    def every_slot_is_held_once(self) -> None:
        assert self.memory.free + self.memory.cached + self.memory.active == CAPACITY
        self.memory.check([request.slots for request in self.running])

    @invariant()
    def the_tree_knows_what_the_dict_knows(self) -> None:
        assert self.tree.cached == len(self.naive.last_use)
        assert self.tree.locked == len(self.held())

    @invariant()
    def a_row_reads_what_was_computed_for_it(self) -> None:
        for request in self.running:
            read = [self.content[slot] for slot in request.slots.tolist()]
            assert read == [request.prefix(count + 1) for count in range(len(request.ids))]


MemoryMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
test_laws_of_the_token_memory = MemoryMachine.TestCase


ANN = Realm("ann", "", "", "1")


def ids(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def test_the_life_of_a_request_and_of_its_twin() -> None:
    memory = TokenMemory(20)
    tree, prompt = memory.prefixes, ids("the cat")

    first = tree.match(ANN, prompt)
    assert not len(first)
    tree.lock(first.node)
    slots = memory.take(4)  # a step reads "the "
    node = tree.extend(first.node, prompt[:4], slots)
    assert node
    assert tree.look(ANN, ids("the cow")) == Look(cached=4, active=4)
    assert tree.look(Realm("bob", "", "", "1"), ids("the cow")) == Look(0, 0)

    slots = np.concatenate([slots, memory.take(3)])  # the next one, the rest
    node = tree.extend(node, prompt[4:], slots[4:])
    assert node and (memory.free, memory.cached, memory.active) == (13, 0, 7)

    twin = tree.match(ANN, prompt)
    tree.lock(twin.node)
    assert twin.slots.tolist() == slots[:6].tolist(), "all but the last token"
    assert tree.sole(node) == 1 and tree.sole(twin.node) == 0
    own = memory.take(1)
    assert tree.goes_on(twin.node, prompt[6:]) and not tree.extend(twin.node, prompt[6:], own)
    memory.check([slots, np.concatenate([twin.slots, own])])

    slots = np.concatenate([slots, memory.take(2)])  # the first one decodes "s " and has finished; its twin at once
    assert not len(tree.insert(node, ids("s "), slots[7:]))
    tree.unlock(node)
    surplus = tree.insert(twin.node, prompt[6:], own)
    assert surplus.tolist() == own.tolist()
    tree.unlock(twin.node)
    memory.give_back(surplus)
    assert (memory.free, memory.cached, memory.active) == (11, 9, 0)
    memory.take(16)
    assert tree.look(ANN, ids("the cats and dogs")).cached == 4, "the end is forgotten first, to the token"


def test_what_is_sole_changes_only_where_meetings_are_counted() -> None:
    tree, slots = PrefixTree(), np.arange(9, dtype=np.int32)

    def holds(text: str) -> Node:
        match = tree.match(ANN, ids(text))
        tree.lock(match.node)
        return tree.extend(match.node, ids(text)[len(match) :], slots[len(match) : len(text)]) or match.node

    first = holds("abcd")
    holds("xyz")
    assert (tree.meetings, tree.sole(first)) == (0, 4)
    second = holds("abef")
    assert (tree.meetings, tree.sole(first), tree.sole(second)) == (1, 2, 2)
    third = holds("abg")
    assert (tree.meetings, tree.sole(first), tree.sole(third)) == (1, 2, 1)
    tree.unlock(third)
    assert tree.meetings == 1
    tree.unlock(second)
    assert (tree.meetings, tree.sole(first)) == (2, 4)


def test_an_edge_that_is_split_is_held_by_whom_it_was() -> None:
    tree = PrefixTree()
    tree.insert(tree.root(ANN), ids("abcd"), np.arange(4, dtype=np.int32))
    nodes = []
    for text in ("abcd!", "abcd?", "ab!", "a!"):
        nodes.append(tree.match(ANN, ids(text)).node)
        tree.lock(nodes[-1])
        assert tree.locked == 4
    for node, locked in zip(nodes, (4, 2, 1, 0), strict=True):
        tree.unlock(node)
        assert tree.locked == locked


def test_what_was_used_last_is_forgotten_last() -> None:
    memory = TokenMemory(9)
    tree = memory.prefixes
    for text in ("one", "two", "six"):
        tree.insert(tree.root(ANN), ids(text), memory.take(3))
    node = tree.match(ANN, ids("one!")).node
    tree.lock(node)
    tree.unlock(node)
    memory.take(4)
    assert [tree.look(ANN, ids(text + "!")).cached for text in ("one", "two", "six")] == [3, 0, 2]


@pytest.mark.parametrize("break_it", ["leak", "twice", "locked"])
def test_check_finds_what_is_wrong(break_it: str) -> None:
    memory = TokenMemory(8)
    memory.prefixes.insert(memory.prefixes.root(ANN), ids("abc"), memory.take(3))
    row = memory.take(2)
    memory.check([row])
    match break_it:
        case "leak":
            memory.take(1)
        case "twice":
            memory.give_back(row[:1])
        case "locked":
            memory.prefixes.lock(memory.prefixes.match(ANN, ids("abc!")).node)
    with pytest.raises(AssertionError, match="not held exactly once"):
        memory.check([row])
