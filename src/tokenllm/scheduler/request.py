"""A request as it was accepted: what it asks for, and where it runs. How far it has come is in its row's columns."""

import zlib

import numpy as np

from tokenllm.engine.batch import Chunk, Column, LogitsRule
from tokenllm.memory.prefix_tree import Node, Realm
from tokenllm.memory.token_slots import Slots
from tokenllm.messages import Submit

APPLICATION_TOKENS = 32  # who asks alike is answered alike: a template, and the first words of instructions
HIGHEST_PRIORITY = 100


class Request:
    """An accepted request. It holds a row of the batch while it runs: from its admission to its end, or to a pause."""

    def __init__(self, submit: Submit, arrival_s: float, tenant: int) -> None:
        sampling = submit.sampling
        self.uid = submit.uid
        self.prompt = np.frombuffer(submit.prompt, dtype="<i4")
        self.text: Column = self.prompt  # what it reads before it decodes; after a pause also what it had generated
        self.max_tokens = submit.max_tokens
        self.ignore_eos = submit.ignore_eos
        self.logprobs = sampling.logprobs
        self.rule = LogitsRule(
            seed=sampling.seed,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
        )
        self.realm = Realm(submit.tenant, submit.cache_salt, submit.adapter or "", "")
        self.arrival_s = arrival_s
        self.tenant = tenant
        self.priority = max(-HIGHEST_PRIORITY, min(HIGHEST_PRIORITY, submit.priority))
        self.kind = 0  # the policy's word for what it is
        self.was_paused = False
        self.cached = 0  # tokens of its prompt that somebody had computed before its first admission
        self.row: int | None = None  # none while it waits
        self.node: Node | None = None  # of the prefix tree, locked; none while it waits
        self.shared_tokens = 0  # on the way to that node
        self.adopted = False  # tokens of others since the last chunk

    @property
    def most(self) -> int:
        """The tokens it holds at its longest; the last one generated is never stored."""
        return len(self.prompt) + self.max_tokens - 1

    @property
    def generated(self) -> int:
        """The tokens of its text that it had generated before a pause."""
        return len(self.text) - len(self.prompt)

    @property
    def application(self) -> int:
        """A number for how its prompt begins; -1 for one that is too short to tell."""
        return zlib.crc32(self.prompt[:APPLICATION_TOKENS].tobytes()) if len(self.prompt) >= APPLICATION_TOKENS else -1

    def chunk(self, row: int, start: int, slots: Slots, prefix: Slots) -> Chunk:
        """The tokens of its text from `start` on, as many as there are slots."""
        end = start + len(slots)
        generated = self.text[len(self.prompt) :]
        samples = end == len(self.text)
        return Chunk(row, start, slots, self.text[start:end], samples, self.rule, self.logprobs, prefix, generated)
