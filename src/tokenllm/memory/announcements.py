"""Which prompts are being read at this moment, and by whom, so that a twin can wait for the tokens they share instead
of computing them again. Owns no memory: an announcement says that tokens will be cached, and is withdrawn when they
are, or when nobody will compute them.
"""

from bisect import bisect_left, insort
from collections.abc import Hashable

import numpy as np

ID_BYTES = 4  # token ids are little-endian int32


def common_tokens(some: bytes, others: bytes, at: int = 0) -> int:
    """How many token ids are the same at the beginning of `some` and of `others` from byte `at` on."""
    if others.startswith(some, at):
        return len(some) // ID_BYTES
    count = min(len(some), len(others) - at) // ID_BYTES
    differ = np.frombuffer(some, "<i4", count) != np.frombuffer(others, "<i4", count, at)
    return int(differ.argmax()) if differ.any() else count


class Announcements:
    """The announced prompts of each realm, sorted: who shares most with a prompt stands beside its place."""

    def __init__(self) -> None:
        self._lines: dict[Hashable, list[tuple[bytes, int]]] = {}
        self._by_uid: dict[int, tuple[Hashable, bytes]] = {}

    def __len__(self) -> int:
        return len(self._by_uid)

    def announce(self, uid: int, realm: Hashable, tokens: bytes) -> None:
        assert uid not in self._by_uid, "a request reads one prompt"
        self._by_uid[uid] = realm, tokens
        insort(self._lines.setdefault(realm, []), (tokens, uid))

    def withdraw(self, uid: int) -> None:
        """What `uid` has announced, if anything, is cached now, or will never be."""
        if uid not in self._by_uid:
            return
        realm, tokens = self._by_uid.pop(uid)
        line = self._lines[realm]
        del line[bisect_left(line, (tokens, uid))]
        if not line:
            del self._lines[realm]

    def longest(self, realm: Hashable, tokens: bytes) -> tuple[int, int]:
        """How many of these tokens have been announced by one request at most, and by which; (0, 0) if by none."""
        line = self._lines.get(realm, [])
        place = bisect_left(line, (tokens,))
        beside = line[max(place - 1, 0) : place + 1]
        return max(((common_tokens(announced, tokens), uid) for announced, uid in beside), default=(0, 0))
