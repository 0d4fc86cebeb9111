"""A request while the scheduler works on it."""

import numpy as np

from tokenllm.engine.batch import LogitsRule, Piece
from tokenllm.memory.token_slots import Slots
from tokenllm.messages import FinishReason, Submit
from tokenllm.routing.policy import Demand


class Request:
    """An accepted request. It holds a row of the batch and one token slot per planned token while it runs."""

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
        self.row = -1  # given when it starts to run
        self.planned = 0  # tokens whose K and V are in memory, or on their way
        self.sampled = 0  # tokens generated, or on their way
        self.generated = 0  # tokens generated and known
        self.finished = False
        self._slots = np.empty(0, dtype=np.int32)  # slot of each position

    @property
    def held_slots(self) -> Slots:
        return self._slots[: self.planned]

    @property
    def prompt_left(self) -> int:
        return max(0, len(self.prompt) - self.planned)

    @property
    def wants_step(self) -> bool:
        return self.sampled < self.max_tokens

    @property
    def demand(self) -> Demand:
        return Demand(len(self.prompt), self.sampled, self.max_tokens)

    def finish_reason(self, token: int, eos_ids: frozenset[int]) -> FinishReason | None:
        """How the request ends with this token, its newest; None when it goes on."""
        if token < 0:
            return "error"
        if token in eos_ids and not self.ignore_eos:
            return "stop"
        return "length" if self.generated == self.max_tokens else None

    def start(self, row: int) -> None:
        self.row = row
        self._slots = np.empty(len(self.prompt) + self.max_tokens, dtype=np.int32)

    def next_piece(self, slots: Slots) -> Piece:
        """The request's share of the next step: as many tokens as there are slots, recorded as planned."""
        start, end = self.planned, self.planned + len(slots)
        ids = self.prompt[start:end] if start < len(self.prompt) else None
        self._slots[start:end] = slots
        self.planned = end
        samples = end >= len(self.prompt)
        self.sampled += samples
        return Piece(self.row, start, slots, ids, samples, self.rule, self.logprobs)
