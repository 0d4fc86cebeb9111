"""The one normalised description of a model, from a Hugging Face folder's config.json or a GGUF file's metadata.

The models are built from it, and the gateway takes the context length, the end tokens and the sampling
defaults from it. Whatever a config says that the decoder would silently get wrong is refused here.
"""

import json
from pathlib import Path
from typing import Any

import msgspec

from tokenllm.checkpoint import CheckpointError
from tokenllm.checkpoint.gguf import Gguf, read_gguf

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


class SamplingDefaults(msgspec.Struct, frozen=True):
    """What generation_config.json recommends; None where it says nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None


class ModelDescription(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of a decoder and how it is talked to. Names are those of Hugging Face configs, shortened."""

    architecture: str  # one of ARCHITECTURES
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None  # "rope_type" and its numbers; type "factors" divides each frequency
    max_position_embeddings: int
    tie_word_embeddings: bool
    sliding_window: int | None
    eos_ids: frozenset[int]  # whatever config, generation_config or tokenizer call an end
    bos_id: int | None
    sampling: SamplingDefaults = SamplingDefaults()
    # GGUF files of the llama architecture pair rotary dimensions (0, 1), (2, 3), …; Hugging Face halves them
    interleaved_rope_weights: bool = False


def describe(path: Path) -> ModelDescription:
    """Reads the description of a .gguf file or of a folder with config.json."""
    return _of_gguf(read_gguf(path)) if path.suffix == ".gguf" else _of_folder(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; an absent file is an empty one."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


class _Entries(msgspec.Struct, frozen=True):
    """Named values of a file, taken with a check of their type."""

    path: Path
    values: dict[str, Any]

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self._given(key, default)
        if type(value) is not int or value < least:
            raise CheckpointError(f"{self.path}: {key} is {value!r}, expected an integer of at least {least}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._given(key, default)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise CheckpointError(f"{self.path}: {key} is {value!r}, expected a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._given(key, default)
        if type(value) is not bool:
            raise CheckpointError(f"{self.path}: {key} is {value!r}, expected true or false")
        return value

    def ids(self, *keys: str) -> frozenset[int]:
        """Token ids under any of these keys, each of which may be absent, one id, or a list of them."""
        found = [self.values.get(key) for key in keys]
        flat = [i for entry in found for i in (entry if isinstance(entry, list) else [entry]) if i is not None]
        if any(type(i) is not int or i < 0 for i in flat):
            raise CheckpointError(f"{self.path}: {', '.join(keys)} hold {flat!r}, expected token ids")
        return frozenset(flat)

    def expect(self, key: str, *allowed: object) -> None:
        if (value := self.values.get(key)) is not None and value not in allowed:
            raise CheckpointError(f"{self.path}: {key} {value!r} is not supported, only {allowed!r}")

    def _given(self, key: str, default: object) -> Any:
        value = self.values.get(key)
        if value is None and default is None:
            raise CheckpointError(f"{self.path}: {key} is missing")
        return default if value is None else value


def _of_folder(folder: Path) -> ModelDescription:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: holds no config.json")
    config = _Entries(path, read_json(path))
    config.expect("model_type", *ARCHITECTURES)
    config.expect("hidden_act", "silu")
    config.expect("mlp_bias", False)
    config.expect("attention_bias", False)  # one of the output projection too: Qwen2 has its biases without this key
    if "quantization_config" in config.values:
        raise CheckpointError(f"{path}: quantization_config: quantized Hugging Face weights are not supported")
    architecture = config.values.get("model_type")
    if architecture is None:
        raise CheckpointError(f"{path}: model_type is missing")
    generation = _Entries(folder / "generation_config.json", read_json(folder / "generation_config.json"))
    theta, scaling = _rope(config)
    heads = config.integer("num_attention_heads")
    return ModelDescription(
        architecture=architecture,
        hidden_size=config.integer("hidden_size"),
        layers=config.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=config.integer("num_key_value_heads", heads),
        head_dim=config.integer("head_dim", 128 if architecture == "qwen3" else config.integer("hidden_size") // heads),
        intermediate_size=config.integer("intermediate_size"),
        vocab_size=config.integer("vocab_size"),
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=config.integer("max_position_embeddings"),
        tie_word_embeddings=config.flag("tie_word_embeddings", False),
        sliding_window=_sliding_window(config, architecture),
        eos_ids=config.ids("eos_token_id") | generation.ids("eos_token_id") | _tokenizer_ids(folder, "eos_token"),
        bos_id=min(config.ids("bos_token_id") or _tokenizer_ids(folder, "bos_token"), default=None),
        sampling=_sampling(generation),
    )


def _rope(config: _Entries) -> tuple[float, dict[str, Any] | None]:
    """Theta and scaling. transformers 5 writes both into `rope_parameters`, earlier ones into two keys."""
    given = config.values.get("rope_parameters") or config.values.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise CheckpointError(f"{config.path}: rope_scaling is {given!r}, expected an object")
    kind = given.get("rope_type", given.get("type", "default"))
    scaling = {key: value for key, value in given.items() if key not in ("type", "rope_theta")} | {"rope_type": kind}
    theta = _Entries(config.path, config.values | given).number("rope_theta", 10000.0)
    return theta, None if kind == "default" else scaling


def _sliding_window(config: _Entries, architecture: str) -> int | None:
    """Mistral's window is there unless the config says null; the others have a switch, which is off unless set."""
    mistral = architecture == "mistral"
    if not config.flag("use_sliding_window", mistral) or config.values.get("sliding_window", mistral) is None:
        return None
    return config.integer("sliding_window", 4096 if mistral else None)


def _tokenizer_ids(folder: Path, key: str) -> frozenset[int]:
    """The id of a token that tokenizer_config.json names, if tokenizer.json or the config itself numbers it."""
    config = read_json(folder / "tokenizer_config.json")
    named = config.get(key)
    literal = named.get("content") if isinstance(named, dict) else named
    numbered = {entry.get("content"): int(i) for i, entry in config.get("added_tokens_decoder", {}).items()}
    added = read_json(folder / "tokenizer.json").get("added_tokens", []) if literal not in numbered else []
    numbered |= {entry.get("content"): entry.get("id") for entry in added}
    return frozenset({numbered[literal]} if literal in numbered else ())


def _sampling(generation: _Entries) -> SamplingDefaults:
    try:
        return msgspec.convert(generation.values, SamplingDefaults)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{generation.path}: {error}") from error


def _of_gguf(gguf: Gguf) -> ModelDescription:
    entries = _Entries(gguf.path, gguf.metadata)
    entries.expect("general.architecture", "llama")
    if "blk.0.attn_q.bias" in gguf.tensors:
        raise CheckpointError(f"{gguf.path}: blk.0.attn_q.bias: attention with biases is not supported")
    heads = entries.integer("llama.attention.head_count")
    width = entries.integer("llama.embedding_length")
    rotary = entries.integer("llama.rope.dimension_count", width // heads)
    return ModelDescription(
        architecture="llama",
        hidden_size=width,
        layers=entries.integer("llama.block_count"),
        heads=heads,
        kv_heads=entries.integer("llama.attention.head_count_kv", heads),
        head_dim=entries.integer("llama.attention.key_length", rotary),
        intermediate_size=entries.integer("llama.feed_forward_length"),
        vocab_size=entries.integer("llama.vocab_size", len(gguf.metadata.get("tokenizer.ggml.tokens", ()))),
        rms_norm_eps=entries.number("llama.attention.layer_norm_rms_epsilon"),
        rope_theta=entries.number("llama.rope.freq_base", 10000.0),
        rope_scaling=_gguf_rope_scaling(gguf, entries),
        max_position_embeddings=entries.integer("llama.context_length"),
        tie_word_embeddings="output.weight" not in gguf.tensors,
        sliding_window=None,
        eos_ids=entries.ids(*(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))),
        bos_id=min(entries.ids("tokenizer.ggml.bos_token_id"), default=None),
        interleaved_rope_weights=True,
    )


def _gguf_rope_scaling(gguf: Gguf, entries: _Entries) -> dict[str, Any] | None:
    """GGUF keeps llama 3's scaling as one divisor per frequency, and linear scaling as a number."""
    if "rope_freqs.weight" in gguf.tensors:
        return {"rope_type": "factors", "factors": gguf.dequantize("rope_freqs.weight").tolist()}
    entries.expect("llama.rope.scaling.type", "none", "linear")
    if gguf.metadata.get("llama.rope.scaling.type") != "linear":
        return None
    return {"rope_type": "linear", "factor": entries.number("llama.rope.scaling.factor")}
