"""What has been computed before, by its token ids: a radix tree per realm, at token granularity. A node owns the slots
of its edge's tokens. The tree is a book: `TokenMemory` gives it slots to keep and takes them back.

The life of a request, as the scheduler enters it:

    match = tree.match(realm, prompt)                # its first tokens are planned: its row begins with match.slots
    tree.lock(node := match.node)
    if tree.known(realm, prompt[:end]) == shared:    # a step that reads up to `end` is planned, and nobody was quicker
        entry = tree.insert(realm, prompt[:end], slots)
        tree.lock(entry.node); tree.unlock(node)     # the lock moves down, the new one first; node = entry.node
    …                                                # it decodes: nothing to enter
    entry = tree.insert(realm, ids, slots)           # finish or abort: all tokens whose K and V are in memory
    tree.unlock(node); memory.give_back(entry.surplus)

A chunk can be shared as soon as it is planned, since whoever reads it is computed later on the same stream.

**Surplus.** Where the same tokens are cached already (by a twin; and the last token of a prompt, which every twin
computes), the tree keeps what it has, and the caller's own slots are surplus. Steps read slots through the request's
row on the device, so a running request may give its surplus back only if the next plan writes the row anew before it
computes. The scheduler rewrites no row: it inserts nothing that somebody else has shared meanwhile, so that no token
is held twice.

`look`, `announce` and `withdraw` tell a router what a waiting prompt would find, and what of it is on its way. No
scheduler asks them yet.
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tokenllm.memory.announcements import ID_BYTES, Announcements, common_tokens
from tokenllm.memory.token_slots import Slots

Ids = NDArray[np.int32]

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


@dataclass(frozen=True)
class Look:
    """How much of a prompt need not be computed."""

    cached: int
    active: int  # of the cached tokens: held by running requests anyhow
    coming: int  # further tokens that a running request is about to compute
    producer: int  # its uid, if any are coming


@dataclass(frozen=True)
class Match:
    """The longest cached prefix of a prompt. Lock `node` before anything else happens to the tree."""

    slots: Slots
    node: Node

    def __len__(self) -> int:
        return len(self.slots)


@dataclass(frozen=True)
class Entry:
    """What the tree holds for ids that were inserted: a slot for each, of the caller's or of somebody before."""

    node: Node
    slots: Slots
    surplus: Slots  # the caller's that the tree did not take


class PrefixTree:
    """All realms' trees, on one trunk. `cached == evictable + locked`, in tokens."""

    def __init__(self) -> None:
        self.cached = 0
        self.evictable = 0  # held by nobody but the tree
        self._trunk = Node(None, None, b"", NO_SLOTS)
        self._announcements = Announcements()
        self._uses = 0  # a clock: so many times has something been used
        # Leaves that nobody holds, by last use; each node at most once. An entry may be outdated (used since, locked,
        # with children): that is seen when it comes to the front.
        self._line: list[tuple[int, int, Node]] = []

    @property
    def locked(self) -> int:
        return self.cached - self.evictable

    def look(self, realm: Hashable, ids: Ids) -> Look:
        """What `match` would find; changes nothing."""
        tokens = _computable(ids)
        path, shared = self._walk(realm, tokens)
        *whole, last = path
        cached = sum(len(node.slots) for node in whole) + shared
        active = sum(len(node.slots) for node in whole if node.locks) + (shared if last.locks else 0)
        announced, uid = self._announcements.longest(realm, tokens)
        coming = max(0, announced - cached)
        return Look(cached, active, coming, uid if coming else 0)

    def known(self, realm: Hashable, ids: Ids) -> int:
        """How many of these tokens are cached, from the first on; changes nothing."""
        path, shared = self._walk(realm, _bytes(ids))
        return sum(len(node.slots) for node in path[:-1]) + shared

    def match(self, realm: Hashable, ids: Ids) -> Match:
        """The longest cached prefix; never all of it, since the last token's logits have to be computed."""
        path = self._cut(*self._walk(realm, _computable(ids)))
        return Match(_slots_of(path), path[-1])

    def lock(self, node: Node) -> None:
        """A request holds what leads to this node: it stays."""
        held: Node | None = node
        while held:
            held.locks += 1
            if held.locks > 1:
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

    def insert(self, realm: Hashable, ids: Ids, slots: Slots) -> Entry:
        """Keep the slots of these tokens, a prefix that is computed or planned; what the tree has already, it keeps."""
        assert len(ids) == len(slots), "a slot for every token"
        tokens = _bytes(ids)
        path = self._cut(*self._walk(realm, tokens))
        if len(path) == 1:
            path.append(self._grow(path[-1], realm, b"", NO_SLOTS))
        known = sum(len(node.slots) for node in path)
        if known < len(ids):
            new = tokens[ID_BYTES * known :]
            path.append(self._grow(path[-1], new[:ID_BYTES], new, slots[known:].copy()))
        self._use(path[-1])
        kept = _slots_of(path)
        return Entry(path[-1], kept, slots[slots != kept])

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

    def announce(self, uid: int, realm: Hashable, ids: Ids) -> None:
        """`uid` is about to compute what is not cached of this prompt."""
        self._announcements.announce(uid, realm, _bytes(ids))

    def withdraw(self, uid: int) -> None:
        """What `uid` has announced, if anything, is cached now, or will never be."""
        self._announcements.withdraw(uid)

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

    def _walk(self, realm: Hashable, tokens: bytes) -> tuple[list[Node], int]:
        """The way these tokens go from the trunk, and how many of the last node's they share: all of the others'."""
        path, name, at = [self._trunk], realm, 0
        while node := path[-1].children.get(name):
            path.append(node)
            if not tokens.startswith(node.tokens, at):
                return path, common_tokens(node.tokens, tokens, at)
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
    return ids.astype("<i4", copy=False).tobytes()


def _computable(ids: Ids) -> bytes:
    """All but the last: what follows it is asked for, and only computing it tells."""
    return _bytes(ids[:-1])


def _slots_of(nodes: list[Node]) -> Slots:
    return np.concatenate([NO_SLOTS, *(node.slots for node in nodes)])
