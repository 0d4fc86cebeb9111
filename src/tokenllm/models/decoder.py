"""The one transformer. Every family is this decoder with other numbers: pre-norm, grouped-query attention with rotary
positions over token-granular KV memory, gated MLP. Everything a layer needs is an argument or a field.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from tokenllm_kernels import Kernels, Linear

Attend: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # (q, KV memory of the layer) → [tokens, heads · head_dim]


@dataclass(frozen=True)
class Layer:
    """The weights of one block."""

    input_norm: Tensor
    qkv: Linear
    qk_norm: tuple[Tensor, Tensor, float] | None
    o: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class Decoder:
    """A decoder-only transformer, ready to run."""

    embedding: Tensor  # [vocab, hidden]
    layers: tuple[Layer, ...]
    norm: Tensor
    head: Linear
    rope: Tensor  # [max_positions, 2, head_dim]
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    dtype: torch.dtype  # of the activations and of KV memory
    kernels: Kernels

    @property
    def vocab_size(self) -> int:
        return self.embedding.shape[0]

    @property
    def kv_bytes_per_token(self) -> int:
        return len(self.layers) * self.kv_heads * 2 * self.head_dim * self.dtype.itemsize

    def kv_memory(self, slots: int) -> list[Tensor]:
        """KV memory for `slots` tokens and a spare one for padding, per layer [slots + 1, kv_heads, 2, head_dim].

        Only the spare is written now: memory that no token has needed yet is promised by the system, not taken.
        """
        shape = (slots + 1, self.kv_heads, 2, self.head_dim)
        memory = [torch.empty(shape, dtype=self.dtype, device=self.embedding.device) for _ in self.layers]
        for layer in memory:
            layer[slots] = 0
        return memory

    def hidden(self, ids: Tensor, positions: Tensor, slots: Tensor, kv: Sequence[Tensor], attend: Attend) -> Tensor:
        """Run a ragged batch through all layers: ids, positions and slots are [tokens]. Writes K and V of every token
        to its slot; `attend` knows who sees what. Returns [tokens, hidden], normalised.
        """
        ops = self.kernels
        rope = self.rope.index_select(0, positions)
        residual = ops.embed(ids, self.embedding, self.dtype)
        for layer, memory in zip(self.layers, kv, strict=True):
            qkv = ops.linear(ops.rms_norm(residual, layer.input_norm, self.eps), layer.qkv)
            q = ops.rope_and_store(qkv, rope, memory, slots, self.heads, layer.qk_norm)
            residual = ops.linear_add(attend(q, memory), layer.o, residual)
            fed = ops.linear_silu_mul(ops.rms_norm(residual, layer.post_norm, self.eps), layer.gate_up)
            residual = ops.linear_add(fed, layer.down, residual)
        return ops.rms_norm(residual, self.norm, self.eps)

    def logits(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """[rows, hidden] → [rows, vocab], into `out` where one is given."""
        return self.kernels.linear(x, self.head, out)
