"""A request as it was accepted: what it asks for, and where it runs. How far it has come is in its row's columns."""

import zlib

import numpy as np

from tokenllm.engine.batch import Chunk, Column, Foretold, LogitsRule, Pooled
from tokenllm.memory.prefix_tree import Node, Realm
from tokenllm.memory.token_slots import Slots
from tokenllm.messages import Sampling, Submit

APPLICATION_TOKENS = 32  # who asks alike is answered alike: a template, and the first words of instructions
HIGHEST_PRIORITY = 100


class Request:
    """An accepted request. It holds a row of the batch while it runs: from its admission to its end, or to a pause."""

    def __init__(self, submit: Submit, arrival_s: float) -> None:
        sampling = submit.sampling
        self.uid = submit.uid
        self.prompt = np.frombuffer(submit.prompt, dtype="<i4")
        self.text: Column = self.prompt  # what it reads before it decodes; after a pause also what it had generated
        self._pooling = submit.pooling
        self.max_tokens = 1 if submit.pooling else submit.max_tokens  # who wants a vector ends where others begin
        self.ignore_eos = submit.ignore_eos
        self.stop_ids = frozenset(submit.stop_ids)
        self.logprobs, self._prompt_logprobs = sampling.logprobs, sampling.prompt_logprobs
        self._foretold = 1  # tokens of the prompt whose logprobs are told, or on their way; the first has none
        self.rule = _rule(sampling, self.prompt)
        self.realm = Realm(submit.tenant, submit.cache_salt, submit.adapter or "", "")
        self.arrival_s = arrival_s
        self.tenant = zlib.crc32(submit.tenant.encode()) >> 1  # a number that stands for it, of 31 bits
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

    @property
    def adoptable(self) -> Column:
        """What of its text may have been computed by others: not what is to foretell its prompt, or is averaged."""
        if self._pooling == "mean":
            return self.text[:0]
        foretells = self._prompt_logprobs is not None and self._foretold < len(self.prompt)
        return self.text[: self._foretold - 1] if foretells else self.text

    def _foretell(self, start: int, end: int) -> Foretold | None:
        """What a chunk is to tell of the prompt's tokens, each once."""
        first, last = max(self._foretold, start + 1), min(end + 1, len(self.prompt))
        if self._prompt_logprobs is None or first >= last:
            return None
        self._foretold = last
        return Foretold(self.uid, first - 1 - start, self.prompt[first:last], self._prompt_logprobs)

    def _pooled(self, start: int, end: int) -> Pooled | None:
        """Which tokens of a chunk its vector is made of."""
        ends = end == len(self.prompt)
        match self._pooling:
            case "mean":
                return Pooled(self.uid, 0, begins=start == 0, ends=ends)
            case "last" if ends:
                return Pooled(self.uid, end - start - 1, begins=True, ends=True)
        return None

    def chunk(self, row: int, start: int, slots: Slots, prefix: Slots) -> Chunk:
        """The tokens of its text from `start` on, as many as there are slots."""
        end = start + len(slots)
        generated = self.text[len(self.prompt) :]
        samples = end == len(self.text) and self._pooling is None
        ids, foretold, pooled = self.text[start:end], self._foretell(start, end), self._pooled(start, end)
        return Chunk(row, start, slots, ids, samples, self.rule, self.logprobs, prefix, generated, foretold, pooled)


def _rule(sampling: Sampling, prompt: Column) -> LogitsRule:
    repeats = sampling.repetition_penalty != 1
    return LogitsRule(
        seed=sampling.seed,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        min_p=sampling.min_p,
        logit_bias=sampling.logit_bias,
        only_biased=sampling.only_biased,
        muted=sampling.muted,
        muted_until=len(prompt) + sampling.min_tokens if sampling.muted else 0,
        bad_words=sampling.bad_words,
        repetition_penalty=sampling.repetition_penalty,
        prompt=tuple(np.unique(prompt).tolist()) if repeats else (),
    )
