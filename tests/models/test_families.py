"""Every family equals transformers on a random tiny model of its own, read from a Hugging Face folder."""

from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from tokenllm.checkpoint import CheckpointError
from tokenllm.checkpoint.description import describe
from tokenllm.models.decoder import Decoder
from tokenllm.models.weights import Precision, load_decoder, open_weights
from tokenllm_kernels import attention, plan_attention

TINY = dict(
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=211,
    max_position_embeddings=256,
    initializer_range=0.3,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
CPU = torch.device("cpu")
CONFIGS = {
    "llama": transformers.LlamaConfig(**TINY),
    "llama 3.1": transformers.LlamaConfig(
        **TINY, rope_parameters=LLAMA3_ROPE | {"rope_theta": 5e5}, tie_word_embeddings=True
    ),
    "mistral": transformers.MistralConfig(**TINY, sliding_window=None, head_dim=32),
    "qwen2": transformers.Qwen2Config(**TINY),
    "qwen3": transformers.Qwen3Config(**TINY, head_dim=32),
}


def save_random_model(config: transformers.PreTrainedConfig, folder: Path, shard: str = "1GB") -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if "bias" in name or "norm" in name:  # initialised to constants, which would hide a mistake
            torch.nn.init.normal_(parameter, mean=0.5 if "norm" in name else 0.0, std=0.3)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def read(folder: Path, dummy: bool = False) -> Decoder:
    description = describe(folder)
    source = open_weights(folder, description, CPU, dummy=dummy, dtype=torch.float32)
    return load_decoder(source, description, Precision(torch.float32), CPU, description.max_position_embeddings)


@torch.inference_mode()
def logits_of(decoder: Decoder, ids: torch.Tensor, chunk: int) -> torch.Tensor:
    """Logits at every position, the prompt fed in chunks through slots that lie about at random."""
    total = len(ids)
    slots, kv = torch.randperm(total), decoder.kv_memory(total)
    index = torch.full((1, total), total, dtype=torch.int32)
    index[0, :] = slots.int()
    parts = []
    for start in range(0, total, chunk):
        positions = torch.arange(start, min(start + chunk, total))
        plan = plan_attention(index, [0], [start], [len(positions)], total, decoder.dtype)
        x = decoder.hidden(ids[positions], positions, slots[positions], kv, partial(attention, plan=plan))
        parts.append(decoder.logits(x))
    return torch.cat(parts)


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    theirs = save_random_model(CONFIGS[name], tmp_path)
    ids = torch.randint(0, TINY["vocab_size"], (90,))
    expected = theirs(ids[None]).logits[0]
    decoder = read(tmp_path)
    for chunk in (90, 7, 1):
        difference = (logits_of(decoder, ids, chunk) - expected).abs().max() / expected.std()
        assert difference < 1e-3, f"chunks of {chunk}"


def test_shards_are_one_model(tmp_path: Path) -> None:
    save_random_model(CONFIGS["llama"], tmp_path / "one")
    save_random_model(CONFIGS["llama"], tmp_path / "many", shard="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    ids = torch.arange(20)
    assert torch.equal(logits_of(read(tmp_path / "one"), ids, 20), logits_of(read(tmp_path / "many"), ids, 20))


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    save_random_model(CONFIGS["llama"], tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_random_model(CONFIGS["llama"], tmp_path, shard="100KB")
    missing = sorted(tmp_path.glob("*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(CheckpointError, match=missing.name):
        read(tmp_path)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    save_random_model(CONFIGS["qwen3"], tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"intermediate_size": 160', '"intermediate_size": 161'))
    with pytest.raises(CheckpointError, match=r"mlp\.gate_proj\.weight is \[160, 64\], the config wants \[161, 64\]"):
        read(tmp_path)


def test_dummy_weights_need_no_weights(tmp_path: Path) -> None:
    CONFIGS["qwen2"].save_pretrained(tmp_path)
    logits = logits_of(read(tmp_path, dummy=True), torch.arange(9), 9)
    assert logits.isfinite().all() and logits.std() > 0
