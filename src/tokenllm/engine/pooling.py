"""Vectors of prompts: sums of hidden states, made where these are, from chunk to chunk. Owns the sums of the prompts
that are being read; relies on steps being entered in the order of their launch.
"""

import torch
from torch import Tensor

from tokenllm.engine.batch import Plan


class Pools:
    """What was added up so far, by row. Of a row whose request left early it means nothing, and is overwritten."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}

    def add(self, hidden: Tensor, plan: Plan) -> dict[int, Tensor]:
        """Enter what a step computed, [tokens, hidden]. Returns the vectors that are whole now, by uid: [hidden] in
        float32, on their way to the host.
        """
        whole = {}
        for places, row, pooled in plan.pooled():
            total = hidden[places].sum(0, dtype=torch.float32)
            if not pooled.begins:
                total += self._sums.pop(row)
            if pooled.ends:
                whole[pooled.uid] = total.to("cpu", non_blocking=True)
            else:
                self._sums[row] = total
        return whole
