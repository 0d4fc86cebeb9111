"""What a step costs on a GPU: decoding takes as long as its bytes or its operations, and then comes the prefill."""

from dataclasses import dataclass

import numpy as np

from tokenllm.routing.columns import Floats
from tokenllm.routing.pace import Pace

FORMULA = (
    "step = max((weights + kv·tokens held by the decoding) / bandwidth, flop·decodes / rate)\n"
    "     + Σ prompt tokens read · (flop + attention·their mean position) / rate"
)


@dataclass(frozen=True)
class Machine:
    """By default an H100 with 80 GB and a Llama-3.1-8B in bfloat16."""

    weight_bytes: float = 15.0e9
    kv_bytes: float = 131072
    bandwidth: float = 3.1e12
    flop_per_token: float = 16.06e9
    attention_flop: float = 524288  # of one token for each token before it
    rate: float = 670e12
    memory_bytes: float = 80e9
    usable: float = 0.93

    @property
    def capacity(self) -> int:
        """The tokens of KV memory beside the weights and the embedding, which decoding does not read."""
        return int((self.memory_bytes * self.usable - self.weight_bytes - 1.05e9) // self.kv_bytes)

    def decode_s(self, decodes: int, held: int) -> float:
        if not decodes:
            return 0.0
        return max(
            (self.weight_bytes + self.kv_bytes * held) / self.bandwidth, self.flop_per_token * decodes / self.rate
        )

    def decode_steps_s(self, decodes: int, held: int, steps: int) -> Floats:
        """The durations of so many steps in a row, in each of which every stream grows by a token."""
        growing = (self.weight_bytes + self.kv_bytes * (held + decodes * np.arange(steps))) / self.bandwidth
        return np.maximum(growing, self.flop_per_token * decodes / self.rate)

    def prefill_s(self, tokens: np.ndarray, before: np.ndarray) -> float:
        """Prompt chunks of so many tokens, each behind so many that are in memory already."""
        return float((tokens * (self.flop_per_token + self.attention_flop * (before + tokens / 2))).sum()) / self.rate

    def pace(self, target_s: float) -> Pace:
        return Pace(
            step_s=self.weight_bytes / self.bandwidth,
            per_held_s=self.kv_bytes / self.bandwidth,
            per_decode_s=0.0,
            per_read_s=self.flop_per_token / self.rate,
            target_s=target_s,
        )


class StepClock:
    """A machine on which every step takes a second and every prompt is read in one: for counting steps."""

    capacity = 120_000

    def decode_s(self, decodes: int, held: int) -> float:
        return 1.0

    def decode_steps_s(self, decodes: int, held: int, steps: int) -> Floats:
        return np.ones(steps)

    def prefill_s(self, tokens: np.ndarray, before: np.ndarray) -> float:
        return 0.0
