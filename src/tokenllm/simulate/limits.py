"""What bounds the prompt tokens of a step beside the router's word: what a runner takes, in the scheduler's terms."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tokenllm.routing.columns import Ints


def all_of(decodes: int, prompt_tokens: int) -> int:
    """For a machine to which every step is as good."""
    return prompt_tokens


@dataclass(frozen=True)
class StepLimits:
    """The scheduler's settings of the same names."""

    prefill_chunk_tokens: int
    most_chunks: int
    most_context_tokens: int
    filled: Callable[[int, int], int] = all_of

    def prompt_tokens(self, wanted: int, decodes: int) -> int:
        """How many a step reads: with the decodes no more than a step without any, but at least a quarter of that."""
        most = self.prefill_chunk_tokens
        return min(most, self.filled(decodes, min(wanted, max(most - decodes, most // 4, 1))))

    def chunks(self, held: Ints, unread: Ints, budget: int) -> Ints:
        """Of texts in the order in which they are read: so many tokens, texts and contexts."""
        left, context = self.most_chunks, self.most_context_tokens
        tokens = np.zeros(len(held), np.int64)
        for place, (before, rest) in enumerate(zip(held.tolist(), unread.tolist(), strict=True)):
            chunk = min(budget, rest, context - before)
            if chunk > 0 and left:
                tokens[place] = chunk
                left, budget, context = left - 1, budget - chunk, context - before - chunk
        return tokens


UNLIMITED = StepLimits(1 << 60, 1 << 60, 1 << 60)
