"""The prefix cache of the simulated server: blocks of a prompt, by the ids that the trace gives them.

Equal ids are equal prefixes, so a tree is not needed. Knows for each block who holds it, and for each request what
would come free if it left: the blocks that nobody else holds. Keeps also what each has left behind those blocks.
"""

import heapq

import numpy as np

from tokenllm.routing.columns import Ints

BEHIND = -(1 << 60)  # what a request left behind its blocks goes before them


class Prefixes:
    """Which blocks are in memory, locked by running requests or kept for the next one."""

    def __init__(self, blocks: list[Ints], prompts: Ints, block_tokens: int) -> None:
        count = 1 + max((int(ids.max()) for ids in blocks if len(ids)), default=0)
        self._blocks = blocks
        self._prompts = prompts
        self._block_tokens = block_tokens
        self._tokens = np.zeros(count, np.int64)  # of each block in memory; a prompt's last block is shorter
        self._locks = np.zeros(count, np.int64)
        self._holders = np.zeros(count, np.int64)  # the sum of the ids of those who lock it: with one lock, that one
        self._used = np.zeros(count)
        self._leaving: list[tuple[float, int, int]] = []
        self._locked: list[Ints] = [np.zeros(0, np.int64)] * len(blocks)
        self.sole = np.zeros(len(prompts), np.int64)  # tokens each request alone keeps locked
        self.tail = np.zeros(len(prompts), np.int64)  # tokens that it left behind its blocks when it was last there
        self._left_s = np.zeros(len(prompts))
        self.locked_tokens = 0
        self.kept_tokens = 0

    def hit(self, request: int) -> tuple[Ints, int, int]:
        """The blocks of its prompt in memory, their tokens, and how many of these others have locked."""
        ids = self._blocks[request]
        present = self._tokens[ids] > 0
        blocks = ids if present.all() else ids[: int(present.argmin())]
        tokens = self._tokens[blocks]
        return blocks, int(tokens.sum()), int(tokens[self._locks[blocks] > 0].sum())

    def lock_hit(self, request: int) -> int:
        """Lock what is in memory of its prompt. Returns its tokens."""
        blocks, tokens, _ = self.hit(request)
        self.lock(request, blocks)
        return tokens

    def holds_all(self, request: int) -> bool:
        return len(self._locked[request]) == len(self._blocks[request])

    def lock(self, request: int, blocks: Ints) -> None:
        tokens, locks = self._tokens[blocks], self._locks[blocks]
        others, fresh = locks == 1, locks == 0
        np.subtract.at(self.sole, self._holders[blocks[others]], tokens[others])
        gained = int(tokens[fresh].sum())
        self.sole[request] += gained
        self.locked_tokens += gained
        self.kept_tokens -= gained
        self._locks[blocks] += 1
        self._holders[blocks] += request
        self._locked[request] = np.concatenate((self._locked[request], blocks))

    def insert(self, request: int) -> int:
        """Its prompt has been computed: its blocks are everybody's. Returns the tokens it holds in them from now on."""
        ids = self._blocks[request][len(self._locked[request]) :]
        starts = self._block_tokens * np.arange(len(self._blocks[request]))
        sizes = np.clip(self._prompts[request] - starts, 1, self._block_tokens)
        fresh = self._tokens[ids] == 0
        self._tokens[ids[fresh]] = sizes[len(sizes) - len(ids) :][fresh]
        self.kept_tokens += int(self._tokens[ids[fresh]].sum())
        self.lock(request, ids)
        return int(self._tokens[self._blocks[request]].sum())

    def release(self, request: int, now: float) -> None:
        blocks = self._locked[request]
        self._locks[blocks] -= 1
        self._holders[blocks] -= request
        locks, tokens = self._locks[blocks], self._tokens[blocks]
        np.add.at(self.sole, self._holders[blocks[locks == 1]], tokens[locks == 1])
        left = int(tokens[locks == 0].sum())
        self.sole[request] = 0
        self.locked_tokens -= left
        self.kept_tokens += left
        self._used[blocks] = now
        for depth, block in enumerate(blocks.tolist()):
            if not self._locks[block]:
                heapq.heappush(self._leaving, (now, -depth, block))
        self._locked[request] = blocks[:0]

    def leave(self, request: int, tokens: int, now: float) -> None:
        """What it has computed behind its blocks is kept until the room is wanted."""
        self.tail[request], self._left_s[request] = tokens, now
        self.kept_tokens += tokens
        heapq.heappush(self._leaving, (now, BEHIND, ~request))

    def come_back(self, request: int) -> int:
        """Returns the tokens that it still finds behind its blocks; they are its own again."""
        tokens = int(self.tail[request])
        self.tail[request] = 0
        self.kept_tokens -= tokens
        return tokens

    def evict(self, tokens: int) -> None:
        """Forget what nobody holds, the longest unused first: tails token by token, then whole blocks from the end."""
        while tokens > 0 and self._leaving:
            used, _, name = heapq.heappop(self._leaving)
            gone = self._forget_block(name, used) if name >= 0 else self._shorten(~name, used, tokens)
            tokens -= gone
            self.kept_tokens -= gone

    def _shorten(self, request: int, left_s: float, tokens: int) -> int:
        if self._left_s[request] != left_s:
            return 0  # it has been back since
        gone = min(tokens, int(self.tail[request]))
        self.tail[request] -= gone
        if self.tail[request]:
            heapq.heappush(self._leaving, (left_s, BEHIND, ~request))
        return gone

    def _forget_block(self, block: int, used: float) -> int:
        if self._locks[block] or self._used[block] != used:
            return 0
        gone, self._tokens[block] = int(self._tokens[block]), 0
        return gone
