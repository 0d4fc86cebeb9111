"""Keeps clients' text from turning into control tokens, whatever a template puts beside it.

Control tokens are found in the rendered prompt by their literals. An unseen character inside every literal,
and inside every beginning and end of one at the edges of a text, keeps these apart until all have been found.
"""

import re
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

from tokenllm.text.trie import trie_pattern

WHITE_SPACE = re.compile(r"(\s+)")


class Hider:
    """Puts an unseen character into whatever in a text could become one of some literals, or a part of one."""

    def __init__(self, literals: Iterable[str]):
        self._literals = tuple(literals)
        self._longest = max(map(len, self._literals), default=0)
        self._beginnings = {literal[:n] for literal in self._literals for n in range(1, len(literal))}
        self._ends = {literal[n:] for literal in self._literals for n in range(1, len(literal))}
        self._edges = {edge for literal in self._literals for edge in (literal[0], literal[-1])}
        pattern = trie_pattern(self._literals)
        self._any = re.compile(pattern) if self._literals else None  # hundreds of times quicker where there is none
        self._whole = re.compile(f"(?={pattern})")  # those that overlap too

    def hide(self, text: str, unseen: str) -> str:
        """The text with `unseen` wherever it is needed; a template may still take white space out of it."""
        places, words = self._places(text), self._words(text)
        if len(words) > 1 and len(self._places("".join(words))) > len(places):  # words that may meet
            return "".join(_cut(part, self._places(part), unseen) for part in WHITE_SPACE.split(text))
        return _cut(text, places, unseen)

    def _words(self, text: str) -> list[str]:
        """None, where nothing can become of them."""
        near = len(text) < 2 * self._longest or any(edge in text for edge in self._edges)
        return text.split() if near else []

    def _places(self, text: str) -> set[int]:
        """Where a literal must be torn, or what could become one with what stands beside the text."""
        if not self._any or not (core := text.strip()):
            return set()
        start = text.index(core)
        end = start + len(core)
        first = self._any.search(text)
        places = {match.start() + 1 for match in self._whole.finditer(text, first.start())} if first else set()
        for n in range(1, min(self._longest, len(core) + 1)):
            if core[-n:] in self._beginnings:
                places.add(end - n + 1)
            if core[:n] in self._ends:
                places.add(start + n - 1)
        if len(core) < self._longest and any(core in literal for literal in self._literals):
            places.add(start)
        return places


def _cut(text: str, places: set[int], unseen: str) -> str:
    cuts = [0, *sorted(places), len(text)]
    return unseen.join(text[cut:following] for cut, following in pairwise(cuts))


class Veiled(str):
    """A hidden text that a template compares, looks up and sorts as the text it was, and writes as it is."""

    _plain: str

    def __new__(cls, hidden: str, plain: str | None = None) -> "Veiled":
        veiled = super().__new__(cls, hidden)
        veiled._plain = hidden if plain is None else plain
        return veiled

    def __eq__(self, other: object) -> bool:
        return self._plain == other

    def __ne__(self, other: object) -> bool:
        return self._plain != other

    def __lt__(self, other: str) -> bool:
        return self._plain < other

    def __hash__(self) -> int:
        return hash(self._plain)

    def __contains__(self, part: str) -> bool:
        return part in self._plain

    def startswith(self, *args: Any) -> bool:
        return self._plain.startswith(*args)

    def endswith(self, *args: Any) -> bool:
        return self._plain.endswith(*args)


def veiled(value: Any, hide: Callable[[str], str]) -> Any:
    """A value as JSON has it in which every string is hidden, keys too."""
    match value:
        case str():
            hidden = hide(value)
            return value if hidden == value else Veiled(hidden, value)
        case list():
            return [veiled(one, hide) for one in value]
        case dict():
            return {veiled(key, hide): veiled(part, hide) for key, part in value.items()}
    return value
