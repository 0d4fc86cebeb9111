"""A model family is a spec: what sets it apart from the one decoder of `decoder.py`. A new one is a few lines here.

Names are those of Hugging Face checkpoints, without `.weight`; `{i}` is the layer.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Where a family keeps its weights, and which of the decoder's options it uses."""

    qkv_bias: bool = False
    qk_norm: bool = False
    embedding: str = "model.embed_tokens"
    layer: str = "model.layers.{i}."
    input_norm: str = "input_layernorm"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    o: str = "self_attn.o_proj"
    post_norm: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    norm: str = "model.norm"
    head: str = "lm_head"


FAMILIES: dict[str, Family] = {
    "llama": Family(),  # Llama 2 and 3, SmolLM2
    "mistral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True),
}


def family_of(architecture: str) -> Family:
    """The spec of a config's `model_type`; a ValueError that lists what is known."""
    if architecture not in FAMILIES:
        raise ValueError(f"model_type {architecture!r} is not served; known: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[architecture]
