"""Many words as one regular expression."""

import re
from collections import defaultdict
from collections.abc import Iterable


def trie_pattern(words: Iterable[str]) -> str:
    """A pattern for the longest of some words that looks at each character once, however many words there are."""
    tails: defaultdict[str, set[str]] = defaultdict(set)
    for word in words:
        tails[word[:1]].add(word[1:])
    ends_here = tails.pop("", None) is not None
    branches = [re.escape(head) + trie_pattern(tail) for head, tail in sorted(tails.items())]
    if len(branches) == 1 and not ends_here:
        return branches[0]
    return f"(?:{'|'.join(branches)})" + ("?" if ends_here else "")
