"""Every kind of config comes out as the same description, or is refused by file and key."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenllm.checkpoint import CheckpointError
from tokenllm.checkpoint.description import SamplingDefaults, describe

DATA = Path(__file__).parents[1] / "data"
LLAMA, QWEN3 = (json.loads((DATA / f"{name}-config.json").read_text()) for name in ("llama-3.1-8b", "qwen3-0.6b"))


def folder(path: Path, **files: dict[str, Any]) -> Path:
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def without(config: dict[str, Any], *keys: str, **others: Any) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys} | others


def test_llama(tmp_path: Path) -> None:
    found = describe(folder(tmp_path, config=LLAMA))
    assert (found.architecture, found.layers, found.heads, found.kv_heads) == ("llama", 32, 32, 8)
    assert (found.hidden_size, found.head_dim, found.intermediate_size, found.vocab_size) == (4096, 128, 14336, 128256)
    assert (found.rope_theta, found.max_position_embeddings, found.rms_norm_eps) == (500000.0, 131072, 1e-5)
    assert found.rope_scaling == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert (found.tie_word_embeddings, found.sliding_window) == (False, None)
    assert (found.eos_ids, found.bos_id) == ({128001, 128008, 128009}, 128000)
    assert not found.interleaved_rope_weights


def test_qwen3_has_heads_wider_than_its_share(tmp_path: Path) -> None:
    found = describe(folder(tmp_path, config=QWEN3))
    assert (found.head_dim, found.hidden_size // found.heads) == (128, 64)
    assert (found.tie_word_embeddings, found.rope_scaling) == (True, None)
    assert describe(folder(tmp_path, config=without(QWEN3, "head_dim"))).head_dim == 128


def test_the_default_model(default_model: Path) -> None:
    found = describe(default_model)
    assert (found.layers, found.heads, found.kv_heads, found.head_dim, found.hidden_size) == (30, 9, 3, 64, 576)
    assert (found.vocab_size, found.max_position_embeddings, found.rope_theta) == (49152, 8192, 1e5)
    assert (found.tie_word_embeddings, found.interleaved_rope_weights) == (True, True)
    assert (found.eos_ids, found.bos_id) == ({2}, 1)


def test_transformers_5_writes_rope_and_dtype_elsewhere(tmp_path: Path) -> None:
    rope = LLAMA["rope_scaling"] | {"rope_theta": LLAMA["rope_theta"]}
    renamed = without(LLAMA, "rope_scaling", "rope_theta", "torch_dtype", rope_parameters=rope, dtype="bfloat16")
    before = describe(folder(tmp_path, config=LLAMA))
    assert describe(folder(tmp_path, config=renamed)) == before
    plain = describe(
        folder(tmp_path, config=without(renamed, rope_parameters={"rope_type": "default", "rope_theta": 7}))
    )
    assert (plain.rope_theta, plain.rope_scaling) == (7.0, None)


def test_old_rope_scaling_says_type(tmp_path: Path) -> None:
    config = without(LLAMA, rope_scaling={"type": "linear", "factor": 2})
    assert describe(folder(tmp_path, config=config)).rope_scaling == {"rope_type": "linear", "factor": 2}


def test_ends_come_from_everywhere(tmp_path: Path) -> None:
    found = describe(
        folder(
            tmp_path,
            config=without(LLAMA, "bos_token_id", eos_token_id=5),
            generation_config={"eos_token_id": [6, 7], "temperature": 0.6, "top_p": 0.9, "top_k": 20},
            tokenizer_config={"eos_token": {"content": "<end>"}, "bos_token": "<begin>"},
            tokenizer={"added_tokens": [{"id": 8, "content": "<end>"}, {"id": 3, "content": "<begin>"}]},
        )
    )
    assert (found.eos_ids, found.bos_id) == ({5, 6, 7, 8}, 3)
    assert found.sampling == SamplingDefaults(temperature=0.6, top_p=0.9, top_k=20)
    numbered = {"eos_token": "<end>", "added_tokens_decoder": {"9": {"content": "<end>"}}}
    assert 9 in describe(folder(tmp_path, tokenizer_config=numbered)).eos_ids


def test_windows(tmp_path: Path) -> None:
    def window(**entries: object) -> int | None:
        return describe(folder(tmp_path, config=without(LLAMA, **entries))).sliding_window

    assert window(model_type="mistral", sliding_window=512) == 512
    assert window(model_type="mistral", sliding_window=None) is None
    assert window(model_type="mistral") == 4096
    assert window(model_type="qwen2", sliding_window=512) is None
    assert window(model_type="qwen2", sliding_window=512, use_sliding_window=True) == 512


REQUIRED = [
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
]


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: {key} is missing"):
        describe(folder(tmp_path, config=without(LLAMA, key)))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.sampled_from([*LLAMA, "head_dim", "sliding_window", "rope_parameters", "quantization_config"]),
    value=st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.lists(st.integers(-1, 9)),
)
def test_a_strange_value_is_understood_or_refused_by_file(tmp_path: Path, key: str, value: object) -> None:
    try:
        found = describe(folder(tmp_path, config=LLAMA | {key: value}))
    except CheckpointError as error:
        assert "config.json: " in str(error)
    else:
        assert min(found.heads, found.kv_heads, found.head_dim, found.layers, found.vocab_size) > 0


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"mlp_bias": True}, "mlp_bias True is not supported"),
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"attention_bias": True, "model_type": "qwen2"}, "attention_bias True is not supported"),
        ({"quantization_config": {}}, "quantization_config: quantized"),
        ({"num_hidden_layers": "12"}, "num_hidden_layers is '12', expected an integer"),
        ({"vocab_size": True}, "vocab_size is True, expected an integer"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0, expected a positive number"),
        ({"eos_token_id": [1, "x"]}, "eos_token_id hold .*'x'"),
        ({"rope_scaling": 3}, "rope_scaling is 3"),
    ],
)
def test_what_the_decoder_cannot_do_is_refused(tmp_path: Path, entry: dict[str, Any], complaint: str) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{complaint}"):
        describe(folder(tmp_path, config=LLAMA | entry))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        describe(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read as JSON"):
        describe(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json: expected a JSON object"):
        describe(tmp_path)
    with pytest.raises(CheckpointError, match=r"generation_config\.json: .*temperature"):
        describe(folder(tmp_path, config=LLAMA, generation_config={"temperature": "hot"}))


SMALL = {
    "general.architecture": "llama",
    "llama.attention.head_count": 4,
    "llama.embedding_length": 32,
    "llama.block_count": 2,
    "llama.feed_forward_length": 64,
    "llama.vocab_size": 100,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.context_length": 128,
}


def test_gguf_defaults_and_scaling(write_gguf: Callable[..., Path]) -> None:
    found = describe(write_gguf(SMALL | {"tokenizer.ggml.eot_token_id": 4, "tokenizer.ggml.eos_token_id": 3}, []))
    assert (found.kv_heads, found.head_dim, found.rope_theta, found.rope_scaling) == (4, 8, 10000.0, None)
    assert (found.eos_ids, found.bos_id) == ({3, 4}, None)
    linear = SMALL | {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert describe(write_gguf(linear, [])).rope_scaling == {"rope_type": "linear", "factor": 4.0}
    factors = ("rope_freqs.weight", (2,), 0, b"\0\0\x80\x3f\0\0\0\x40")
    untied = ("output.weight", (1,), 0, bytes(4))
    described = describe(write_gguf(SMALL, [factors, untied]))
    assert described.rope_scaling == {"rope_type": "factors", "factors": [1.0, 2.0]}
    assert not described.tie_word_embeddings


@pytest.mark.parametrize("key", [key for key in SMALL if key not in ("general.architecture", "llama.vocab_size")])
def test_a_missing_gguf_key_is_named(write_gguf: Callable[..., Path], key: str) -> None:
    with pytest.raises(CheckpointError, match=rf"small\.gguf: {key} is missing"):
        describe(write_gguf(without(SMALL, key), []))


def test_gguf_of_another_kind(write_gguf: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"general\.architecture 'gpt2' is not supported"):
        describe(write_gguf(SMALL | {"general.architecture": "gpt2"}, []))
    with pytest.raises(CheckpointError, match=r"rope\.scaling\.type 'yarn' is not supported"):
        describe(write_gguf(SMALL | {"llama.rope.scaling.type": "yarn"}, []))
    with pytest.raises(CheckpointError, match=r"small\.gguf: blk\.0\.attn_q\.bias"):
        describe(write_gguf(SMALL, [("blk.0.attn_q.bias", (1,), 0, bytes(4))]))
