"""A request as it was accepted: what it asks for, and where it runs. How far it has come is in its row's columns."""

import numpy as np

from tokenllm.engine.batch import Chunk, LogitsRule
from tokenllm.memory.prefix_tree import Node, Realm
from tokenllm.memory.token_slots import Slots
from tokenllm.messages import Submit
from tokenllm.routing.policy import Demand


class Request:
    """An accepted request. It holds a row of the batch from its admission to its end."""

    def __init__(self, submit: Submit) -> None:
        sampling = submit.sampling
        self.uid = submit.uid
        self.prompt = np.frombuffer(submit.prompt, dtype="<i4")
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
        self.row: int | None = None  # none while it waits
        self.node: Node | None = None  # of the prefix tree, locked; none until its first tokens are planned
        self.shared_tokens = 0  # on the way to that node

    @property
    def demand(self) -> Demand:
        """What it may take, before it has begun."""
        return Demand(len(self.prompt), 0, self.max_tokens)

    def chunk(self, row: int, start: int, slots: Slots, prefix: Slots) -> Chunk:
        """The tokens of its prompt from `start` on, as many as there are slots."""
        end = start + len(slots)
        samples = end == len(self.prompt)
        return Chunk(row, start, slots, self.prompt[start:end], samples, self.rule, self.logprobs, prefix)
