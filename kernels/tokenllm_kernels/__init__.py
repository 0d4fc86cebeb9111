"""What the GPU does, each function once as plain torch (`reference.py`): its definition, its oracle, the CPU path."""

from tokenllm_kernels.reference import (
    Attention,
    Linear,
    LogitsRule,
    add_rms_norm,
    attention,
    embed,
    linear,
    philox_uniform,
    plan_attention,
    prepare_linear,
    rms_norm,
    rope_and_store,
    rope_table,
    sample,
    silu_mul,
    top_logprobs,
)

__all__ = [
    "Attention",
    "Linear",
    "LogitsRule",
    "add_rms_norm",
    "attention",
    "embed",
    "linear",
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
