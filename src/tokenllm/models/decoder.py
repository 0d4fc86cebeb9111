"""The one transformer. Every family is this decoder with other numbers: pre-norm, grouped-query attention with rotary
positions over token-granular KV memory, gated MLP. Everything a layer needs is an argument or a field.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenllm_kernels import (
    Attention,
    Linear,
    add_rms_norm,
    attention,
    embed,
    linear,
    rms_norm,
    rope_and_store,
    silu_mul,
)


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

    def __call__(
        self, ids: Tensor, positions: Tensor, slots: Tensor, kv: Sequence[Tensor], plan: Attention, last: Tensor
    ) -> Tensor:
        """Run a ragged batch: ids, positions and slots are [tokens]; `last` [rows] picks the tokens whose logits are
        wanted. Writes K and V of every token to its slot. Returns logits [rows, vocab] in float32.
        """
        rope = self.rope.index_select(0, positions)
        residual = embed(ids, self.embedding, self.dtype)
        x = rms_norm(residual, self.layers[0].input_norm, self.eps)
        following = [layer.input_norm for layer in self.layers[1:]] + [self.norm]
        for layer, memory, next_norm in zip(self.layers, kv, following, strict=True):
            q = rope_and_store(linear(x, layer.qkv), rope, memory, slots, self.heads, layer.qk_norm)
            attended = linear(attention(q, memory, plan), layer.o)
            x, residual = add_rms_norm(attended, residual, layer.post_norm, self.eps)
            fed = linear(silu_mul(linear(x, layer.gate_up)), layer.down)
            x, residual = add_rms_norm(fed, residual, next_norm, self.eps)
        return linear(x.index_select(0, last), self.head).float()
