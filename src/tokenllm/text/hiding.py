"""Keeps clients' text from turning into control tokens, whatever a template puts beside it.

Control tokens are found in the rendered prompt by their literals. An unseen character inside every literal,
and inside every beginning and end of one at the edges of a text, keeps these apart until all have been found.
"""

import re
from collections.abc import Iterable
from itertools import pairwise

from tokenllm.text.trie import trie_pattern


class Hider:
    """Puts an unseen character into whatever in a text could become one of some literals, or a part of one."""

    def __init__(self, literals: Iterable[str]):
        self._literals = tuple(literals)
        self._longest = max(map(len, self._literals), default=0)
        self._beginnings = {literal[:n] for literal in self._literals for n in range(1, len(literal))}
        self._ends = {literal[n:] for literal in self._literals for n in range(1, len(literal))}
        self._whole = re.compile(f"(?={trie_pattern(self._literals)})") if self._literals else None

    def hide(self, text: str, unseen: str) -> str:
        """The text with `unseen` wherever it is needed; a template may still strip white space off it."""
        if not self._whole or not (core := text.strip()):
            return text
        start = text.index(core)
        end = start + len(core)
        places = {match.start() + 1 for match in self._whole.finditer(text)}
        for n in range(1, min(self._longest, len(core) + 1)):
            if core[-n:] in self._beginnings:
                places.add(end - n + 1)
            if core[:n] in self._ends:
                places.add(start + n - 1)
        if len(core) < self._longest and any(core in literal for literal in self._literals):
            places.add(start)
        cuts = [0, *sorted(places), len(text)]
        return unseen.join(text[cut:following] for cut, following in pairwise(cuts))
