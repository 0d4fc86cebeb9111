"""Every kernel in plain torch. What a kernel means is said here and nowhere else: the Triton kernels are tested
against these functions, and on a CPU these functions are the engine.

Shapes: `tokens` is the ragged batch laid end to end; `slots` count tokens of KV memory; `kv` of one layer is
`[slots + 1, kv_heads, 2, head_dim]`, K and V of one token and head adjacent. Padding reads the last slot.
"""

from tokenllm_kernels.reference.attention import Attention, attention, plan_attention
from tokenllm_kernels.reference.layers import embed, rms_norm, rope_and_store, rope_table, silu_mul
from tokenllm_kernels.reference.linear import (
    Linear,
    in_half_range,
    linear,
    linear_add,
    linear_silu_mul,
    prepare_linear,
)
from tokenllm_kernels.reference.sampling import LogitsRule, philox_uniform, sample, top_logprobs

__all__ = [
    "Attention",
    "Linear",
    "LogitsRule",
    "attention",
    "embed",
    "in_half_range",
    "linear",
    "linear_add",
    "linear_silu_mul",
    "philox_uniform",
    "plan_attention",
    "prepare_linear",
    "rms_norm",
    "rope_and_store",
    "rope_table",
    "sample",
    "silu_mul",
    "top_logprobs",
]
