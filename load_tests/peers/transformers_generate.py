"""`transformers.generate` with a static batch, in a process of its own: the same weights in float32.

Reads batches from standard input and answers each with the times of its tokens, one JSON line for one:
    {"prompts": [[id, ...], ...], "output_tokens": 64}  ->  {"token_s": [0.31, 0.36, ...]}
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

from tokenllm.checkpoint.description import ModelDescription, describe
from tokenllm.checkpoint.gguf import Gguf, read_gguf

TOP_NAMES = {"embed_tokens": "token_embd", "norm": "output_norm"}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def config_of(model: ModelDescription) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        max_position_embeddings=model.max_position_embeddings,
        rms_norm_eps=model.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        tie_word_embeddings=True,
    )


def weights_of(gguf: Gguf, model: ModelDescription) -> dict[str, torch.Tensor]:
    """The state dict, float32, of a Llama whose head is its embedding."""
    state = {f"model.{ours}.weight": _tensor(gguf, theirs) for ours, theirs in TOP_NAMES.items()}
    for layer in range(model.layers):
        for ours, theirs in LAYER_NAMES.items():
            weight = _tensor(gguf, f"blk.{layer}.{theirs}")
            if theirs in ("attn_q", "attn_k"):
                weight = _rotary_halves(weight, model.head_dim)
            state[f"model.layers.{layer}.{ours}.weight"] = weight
    return state


def _tensor(gguf: Gguf, name: str) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(f"{name}.weight"))


def _rotary_halves(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """llama.cpp pairs rows (0, 1), (2, 3), ... of a head for its rotation; transformers pairs the head's two halves."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(weight.shape)


def load_llama(path: Path) -> LlamaForCausalLM:
    model = describe(path)
    empty = LlamaForCausalLM(config_of(model))
    missing, unexpected = empty.load_state_dict(weights_of(read_gguf(path), model), strict=False)
    assert missing == ["lm_head.weight"] and not unexpected, (missing, unexpected)  # tied to the embedding
    return empty.eval()


class TokenClock(StoppingCriteria):
    """Asked after every token whether to stop: notes the time and says no."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.token_s: list[float] = []

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.BoolTensor:
        self.token_s.append(time.monotonic() - self.began)
        return torch.BoolTensor([False] * len(input_ids))


def generate(model: Any, prompts: list[list[int]], output_tokens: int) -> tuple[torch.Tensor, list[float]]:
    """Greedy ids, [prompts, output_tokens], and when each column of them was there."""
    clock, ids = TokenClock(), torch.tensor(prompts)
    full = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=GenerationConfig(max_new_tokens=output_tokens, do_sample=False, pad_token_id=0),
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    return full[:, ids.shape[1] :], clock.token_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load_llama(arguments.model)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        batch = json.loads(line)
        _, token_s = generate(model, batch["prompts"], batch["output_tokens"])
        print(json.dumps({"token_s": token_s}), flush=True)


if __name__ == "__main__":
    main()
