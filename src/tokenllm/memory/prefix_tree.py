"""What has been computed before, by its token ids: a radix tree per realm, at token granularity. A node owns the slots
of its edge's tokens. The tree is a book: `TokenMemory` gives it slots to keep and takes them back.

The life of a request, as the scheduler enters it:

    match = tree.match(realm, prompt)                # its first tokens are planned: its row begins with match.slots
    tree.lock(node := match.node)
    node = tree.extend(node, ids, slots) or node     # a step is planned that reads these tokens, the next ones
    …                                                # it decodes: nothing to enter
    surplus = tree.insert(node, ids, slots)          # finish or abort: what follows `node` and is in memory
    tree.unlock(node); memory.give_back(surplus)

A chunk can be shared as soon as it is planned, since whoever reads it is computed later on the same stream.

**Surplus.** Where the same tokens are cached already (by a twin; and the last token of a prompt, which every twin
computes), the tree keeps what it has, and the caller's own slots are surplus. Steps read slots through the request's
row on the device, and no row is rewritten: a running request extends nothing that somebody else has extended alike
meanwhile, so that no token is held twice, and gives its surplus back when it ends.

`look` tells a router what a waiting prompt would find.
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenllm.memory.token_slots import Slots

Ids = NDArray[np.int32]

ID = np.dtype("<i4")
ID_BYTES = ID.itemsize
NO_SLOTS: Slots = np.empty(0, np.int32)


class Realm(NamedTuple):
    """Within a realm prefixes are shared, across realms never: not even by how quickly an answer begins."""

    tenant: str
    cache_salt: str
    adapter: str
    weights_revision: str


class Node:
    """An edge of the tree and what hangs below it. Its parent knows it by `name`: its first token, or the realm.

    `locks` counts the requests that hold it and its children that have locks: if it has none, nothing below it has.
    """

    __slots__ = ("children", "in_line", "last_use", "locks", "name", "parent", "slots", "tokens")

    def __init__(self, parent: "Node | None", name: Hashable, tokens: bytes, slots: Slots) -> None:
        self.parent = parent
        self.name = name
        self.tokens = tokens  # ids as bytes, so that a comparison is a memcmp
        self.slots = slots
        self.children: dict[Hashable, Node] = {}
        self.locks = 0
        self.last_use = 0
        self.in_line = False  # for eviction


class Look(NamedTuple):
    """How much of a prompt need not be computed."""

    cached: int
    active: int  # of the cached tokens: held by running requests anyhow


@dataclass(frozen=True)
class Match:
    """The longest cached prefix of a prompt. Lock `node` before anything else happens to the tree."""

    slots: Slots
    node: Node

    def __len__(self) -> int:
        return len(self.slots)


class PrefixTree:
    """All realms' trees, on one trunk. `cached == evictable + locked`, in tokens."""

    def __init__(self) -> None:
        self.cached = 0
        self.evictable = 0  # held by nobody but the tree
        self.meetings = 0  # times that tokens got a second holder, or lost the last but one: `sole` may have changed
        self._trunk = Node(None, None, b"", NO_SLOTS)
        self._uses = 0  # a clock: so many times has something been used
        # Leaves that nobody holds, by last use; each node at most once. An entry may be outdated (used since, locked,
        # with children): that is seen when it comes to the front.
        self._line: list[tuple[int, int, Node]] = []

    @property
    def locked(self) -> int:
        return self.cached - self.evictable

    def look(self, realm: Hashable, ids: Ids) -> Look:
        """What `match` would find; changes nothing."""
        path, shared = self._walk(self._trunk, realm, _computable(ids))
        cached = active = shared
        if not path[-1].locks:
            active = 0
        for node in path[:-1]:
            cached += len(node.slots)
            if node.locks:
                active += len(node.slots)
        return Look(cached, active)

    def match(self, realm: Hashable, ids: Ids) -> Match:
        """The longest cached prefix; never all of it, since the last token's logits have to be computed."""
        tokens = _computable(ids)
        path = self._cut(*self._walk(self.root(realm), tokens[:ID_BYTES], tokens))
        return Match(_slots_of(path), path[-1])

    def root(self, realm: Hashable) -> Node:
        """What all prompts of a realm follow. Lock it or insert something before anything else happens to the tree."""
        return self._trunk.children.get(realm) or self._grow(self._trunk, realm, b"", NO_SLOTS)

    def lock(self, node: Node) -> None:
        """A request holds what leads to this node: it stays."""
        held: Node | None = node
        while held:
            held.locks += 1
            if held.locks > 1:
                self.meetings += held.locks == 2 and len(held.slots) > 0
                return
            self.evictable -= len(held.slots)
            held = held.parent

    def unlock(self, node: Node) -> None:
        """One request less holds it; what nobody holds now was used just now."""
        held: Node | None = node
        while held:
            assert held.locks, "a lock is given up once"
            held.locks -= 1
            if held.locks:
                self.meetings += held.locks == 1 and len(held.slots) > 0
                break
            self.evictable += len(held.slots)
            held = held.parent
        self._use(node)

    @staticmethod
    def sole(node: Node | None) -> int:
        """How many tokens on the way to this node, which one request has locked, nobody else has."""
        tokens, held = 0, node
        while held and held.locks == 1:
            tokens += len(held.slots)
            held = held.parent
        return tokens

    @staticmethod
    def goes_on(node: Node, ids: Ids) -> bool:
        """Whether anything is cached of what follows a node, if it is to be followed by `ids`."""
        return ids[:1].tobytes() in node.children

    def extend(self, node: Node, ids: Ids, slots: Slots) -> Node | None:
        """A request that holds `node` has planned the tokens that follow, and holds them from now on, at the node that
        is returned. None, and nothing has happened, where somebody else has planned such tokens already.
        """
        assert node.locks and len(ids) == len(slots), "of a node that is held, and a slot for every token"
        if self.goes_on(node, ids):
            return None
        new = self._follow(node, _bytes(ids), slots)
        new.locks = 1  # `node` has one holder less and one child with locks more
        self.evictable -= len(slots)
        return new

    def insert(self, node: Node, ids: Ids, slots: Slots) -> Slots:
        """Keep the slots of tokens that follow a node; what the tree has already, it keeps. Returns the surplus."""
        assert len(ids) == len(slots), "a slot for every token"
        tokens = _bytes(ids)
        if tokens and tokens[:ID_BYTES] not in node.children:  # as it mostly is
            self._use(self._follow(node, tokens, slots))
            return NO_SLOTS
        path = self._cut(*self._walk(node, tokens[:ID_BYTES], tokens))
        kept = _slots_of(path[1:])
        if len(kept) < len(ids):
            path.append(self._follow(path[-1], tokens[ID_BYTES * len(kept) :], slots[len(kept) :]))
        self._use(path[-1])
        mine = slots[: len(kept)]
        return mine[mine != kept]

    def evict(self, count: int) -> Slots:
        """Forget so many tokens that nobody holds: the least recently used leaves, the ends of their edges first."""
        assert count <= self.evictable, "only what nobody holds can be forgotten"
        parts = [NO_SLOTS]
        left = count
        while left:
            leaf = self._oldest_leaf()
            parts.append(leaf.slots[-left:])
            self._shorten(leaf, len(parts[-1]))
            left -= len(parts[-1])
        self.cached -= count
        self.evictable -= count
        return np.concatenate(parts)

    def unheld_slots(self) -> Slots:
        """Of all tokens that are held by the tree alone."""
        return _slots_of([node for node in self._nodes() if not node.locks])

    def check(self) -> None:
        """Every node is what it says; for tests."""
        nodes = list(self._nodes())
        assert self.cached == sum(len(node.slots) for node in nodes)
        assert self.evictable == sum(len(node.slots) for node in nodes if not node.locks)
        in_line = [node for _, _, node in self._line]
        assert len(in_line) == len(set(in_line)) and all(node.in_line for node in in_line)
        assert set(in_line) <= set(nodes), "what has left the tree is forgotten"
        for node in nodes:
            parent = node.parent
            assert parent and parent.children[node.name] is node
            assert parent is self._trunk or (node.tokens and node.name == node.tokens[:ID_BYTES])
            assert len(node.tokens) == ID_BYTES * len(node.slots)
            assert node.locks >= sum(child.locks > 0 for child in node.children.values())
            assert node.locks or node.children or node.in_line, "a leaf that nobody holds can be evicted"

    def _nodes(self) -> Iterator[Node]:
        """All but the trunk."""
        ahead = list(self._trunk.children.values())
        while ahead:
            node = ahead.pop()
            ahead.extend(node.children.values())
            yield node

    @staticmethod
    def _walk(start: Node, name: Hashable, tokens: bytes) -> tuple[list[Node], int]:
        """The way these tokens go from a node whose child is called `name`, and how many of the last node's they share:
        all of the others'.
        """
        path, at = [start], 0
        while node := path[-1].children.get(name):
            path.append(node)
            if not tokens.startswith(node.tokens, at):
                return path, _common_tokens(node.tokens, tokens, at)
            at += len(node.tokens)
            name = tokens[at : at + ID_BYTES]
        return path, len(path[-1].slots)

    def _cut(self, path: list[Node], shared: int) -> list[Node]:
        """The path, ending with the last token that is shared."""
        last = path[-1]
        return path if shared == len(last.slots) else [*path[:-1], self._split(last, shared)]

    def _split(self, node: Node, count: int) -> Node:
        """A node of its own for the first `count` tokens. `node` keeps the others, and all who hold it."""
        parent, cut = node.parent, ID_BYTES * count
        assert parent
        upper = parent.children[node.name] = Node(parent, node.name, node.tokens[:cut], node.slots[:count])
        upper.locks = min(node.locks, 1)
        node.tokens, node.slots = node.tokens[cut:], node.slots[count:]
        node.parent, node.name = upper, node.tokens[:ID_BYTES]
        upper.children[node.name] = node
        return upper

    def _follow(self, parent: Node, tokens: bytes, slots: Slots) -> Node:
        return self._grow(parent, tokens[:ID_BYTES], tokens, slots.copy())

    def _grow(self, parent: Node, name: Hashable, tokens: bytes, slots: Slots) -> Node:
        node = parent.children[name] = Node(parent, name, tokens, slots)
        self.cached += len(slots)
        self.evictable += len(slots)
        return node

    def _use(self, node: Node) -> None:
        """What leads to it is used too, and need not be noted: it can only be forgotten after it, and then is next."""
        self._uses += 1
        node.last_use = self._uses
        self._line_up(node)

    def _line_up(self, node: Node) -> None:
        """A leaf that nobody holds may be evicted, after those that were used before it."""
        if node.parent and not (node.locks or node.children or node.in_line):
            node.in_line = True
            heappush(self._line, (node.last_use, id(node), node))

    def _oldest_leaf(self) -> Node:
        while True:
            last_use, _, node = heappop(self._line)
            node.in_line = False
            if not (node.locks or node.children) and node.last_use == last_use:
                return node
            self._line_up(node)

    def _shorten(self, leaf: Node, count: int) -> None:
        """Take `count` tokens from the end of a leaf; one without tokens leaves the tree."""
        parent, left = leaf.parent, len(leaf.slots) - count
        assert parent
        if left:
            leaf.tokens, leaf.slots = leaf.tokens[: ID_BYTES * left], leaf.slots[:left]
            self._line_up(leaf)
        else:
            del parent.children[leaf.name]
            self._line_up(parent)


def _bytes(ids: Ids) -> bytes:
    return ids.astype(ID, copy=False).tobytes()


def _computable(ids: Ids) -> bytes:
    """All but the last: what follows it is asked for, and only computing it tells."""
    return _bytes(ids[:-1])


def _common_tokens(some: bytes, others: bytes, at: int) -> int:
    """How many token ids are the same at the beginning of `some` and of `others` from byte `at` on."""
    count = min(len(some), len(others) - at) // ID_BYTES
    differ = np.frombuffer(some, ID, count) != np.frombuffer(others, ID, count, at)
    return int(differ.argmax()) if differ.any() else count


def _slots_of(nodes: list[Node]) -> Slots:
    return np.concatenate([NO_SLOTS, *(node.slots for node in nodes)])
