"""From a checkpoint to a `Decoder`: safetensors folders, GGUF files, or random weights of a config's shape.

A source answers one question, the tensor of a name; how the tensors make a decoder is said once, in `load_decoder`.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokenllm.checkpoint import CheckpointError
from tokenllm.checkpoint.description import ModelDescription, read_json
from tokenllm.checkpoint.gguf import read_gguf
from tokenllm.models.decoder import Decoder, Layer
from tokenllm.models.families import Family, family_of
from tokenllm_kernels import Linear, in_half_range, kernels_for, prepare_linear, rope_table

T = TypeVar("T")
Track = Callable[[Iterable[T]], Iterable[T]]  # shows progress over what it passes on
Progress: TypeAlias = Callable[[str], Track[int]]  # by what is being done


@dataclass(frozen=True)
class Precision:
    """How numbers are kept: `activations` also names KV memory; half_weights is FBGEMM's float16 on a CPU."""

    activations: torch.dtype
    half_weights: bool = False


class WeightSource(Protocol):
    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor of a Hugging Face name; a CheckpointError names the file when it is not there or not so shaped."""
        ...


class SafetensorsFolder:
    """One or many `.safetensors` files with an index."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        index = folder / "model.safetensors.index.json"
        if index.exists():
            names = read_json(index).get("weight_map", {})
        else:
            names = dict.fromkeys(self._open(folder / "model.safetensors", device).keys(), "model.safetensors")
        self._folder, self._file_of = folder, names
        self._files = {file: self._open(folder / file, device) for file in sorted(set(names.values()))}

    @staticmethod
    def _open(file: Path, device: torch.device) -> safe_open:
        try:
            return safe_open(file, framework="pt", device=str(device))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: {error}") from error

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        file = self._file_of.get(name)
        if file is None:
            raise CheckpointError(f"{self._folder}: no tensor {name}")
        tensor = self._files[file].get_tensor(name)
        return _of_shape(tensor, shape, f"{self._folder / file}: {name}")


class GgufFile:
    """A GGUF file. Of the llama architecture q and k rows are interleaved for rotary pairs, ours come in halves."""

    NAMES = (
        ("model.embed_tokens", "token_embd"),
        ("model.layers.", "blk."),
        ("input_layernorm", "attn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
    )

    def __init__(self, file: Path, description: ModelDescription) -> None:
        self._file, self._gguf = file, read_gguf(file)
        self._head_dim, self._interleaved = description.head_dim, description.interleaved_rope_weights

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        theirs = name
        for ours, gguf in self.NAMES:
            theirs = theirs.replace(ours, gguf)
        if theirs not in self._gguf.tensors:
            raise CheckpointError(f"{self._file}: no tensor {theirs}")
        tensor = _of_shape(torch.from_numpy(self._gguf.dequantize(theirs)), shape, f"{self._file}: {theirs}")
        if self._interleaved and (".attn_q." in theirs or ".attn_k." in theirs):
            return tensor.unflatten(0, (-1, self._head_dim // 2, 2)).transpose(1, 2).reshape(tensor.shape)
        return tensor


class DummyWeights:
    """Random weights, normal with standard deviation 0.02 (zeros would flatter a GPU's clocks); norms are one."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._generator = torch.Generator(device).manual_seed(0)
        self._device, self._dtype = device, dtype

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if "norm" in name:
            return torch.ones(shape, device=self._device, dtype=self._dtype)
        empty = torch.empty(shape, device=self._device, dtype=self._dtype)
        return empty.normal_(std=0.02, generator=self._generator)


def _of_shape(tensor: Tensor, shape: tuple[int, ...], what: str) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{what} is {list(tensor.shape)}, the config wants {list(shape)}")
    return tensor


def open_weights(
    path: Path, d: ModelDescription, device: torch.device, *, dummy: bool, dtype: torch.dtype
) -> WeightSource:
    """The source that fits the path."""
    if dummy:
        return DummyWeights(device, dtype)
    return GgufFile(path, d) if path.is_file() else SafetensorsFolder(path, device)


def load_decoder(
    source: WeightSource,
    d: ModelDescription,
    precision: Precision,
    device: torch.device,
    max_positions: int,
    track: Track[int] = iter,
) -> Decoder:
    """Read all weights, fuse what is multiplied together, and lay it out for the kernels."""
    family = family_of(d.architecture)
    build = _Builder(source, d, family, precision, device)
    embedding = build.tensor(f"{family.embedding}.weight", d.vocab_size, d.hidden_size)
    if d.tie_word_embeddings:
        head = prepare_linear(embedding, half_weights=precision.half_weights)
    else:
        head = build.linear([family.head], [d.vocab_size], d.hidden_size)
    return Decoder(
        embedding=in_half_range(embedding).half() if precision.half_weights else embedding,
        layers=tuple(build.layer(i) for i in track(range(d.layers))),
        norm=build.tensor(f"{family.norm}.weight", d.hidden_size),
        head=head,
        rope=rope_table(inverse_frequencies(d), max_positions, torch.float32).to(device),
        heads=d.heads,
        kv_heads=d.kv_heads,
        head_dim=d.head_dim,
        eps=d.rms_norm_eps,
        dtype=precision.activations,
        kernels=kernels_for(device),
    )


@dataclass(frozen=True)
class _Builder:
    source: WeightSource
    d: ModelDescription
    family: Family
    precision: Precision
    device: torch.device

    def tensor(self, name: str, *shape: int) -> Tensor:
        read = self.source.get(name, shape)
        if self.precision.activations == torch.float16 and read.dtype != torch.float16:
            in_half_range(read)
        return read.to(self.device, self.precision.activations)

    def linear(self, names: list[str], rows: list[int], columns: int, *, bias: bool = False) -> Linear:
        """Several projections of the same input as one."""
        weight = torch.cat([self.tensor(f"{n}.weight", r, columns) for n, r in zip(names, rows, strict=True)])
        added = torch.cat([self.tensor(f"{n}.bias", r) for n, r in zip(names, rows, strict=True)]) if bias else None
        return prepare_linear(weight, added, half_weights=self.precision.half_weights)

    def layer(self, i: int) -> Layer:
        d, f = self.d, self.family
        at = f.layer.format(i=i)
        q, kv = d.heads * d.head_dim, d.kv_heads * d.head_dim
        return Layer(
            input_norm=self.tensor(f"{at}{f.input_norm}.weight", d.hidden_size),
            qkv=self.linear([at + f.q, at + f.k, at + f.v], [q, kv, kv], d.hidden_size, bias=f.qkv_bias),
            qk_norm=self._qk_norm(at) if f.qk_norm else None,
            o=self.linear([at + f.o], [d.hidden_size], q),
            post_norm=self.tensor(f"{at}{f.post_norm}.weight", d.hidden_size),
            gate_up=self.linear([at + f.gate, at + f.up], [d.intermediate_size] * 2, d.hidden_size),
            down=self.linear([at + f.down], [d.hidden_size], d.intermediate_size),
        )

    def _qk_norm(self, at: str) -> tuple[Tensor, Tensor, float]:
        q, k = (self.tensor(f"{at}{name}.weight", self.d.head_dim) for name in (self.family.q_norm, self.family.k_norm))
        return q, k, self.d.rms_norm_eps


def inverse_frequencies(d: ModelDescription) -> Tensor:
    """RoPE's θ^(-2i/head_dim), [head_dim / 2] float64, after the config's `rope_scaling`."""
    plain = d.rope_theta ** (-torch.arange(0, d.head_dim, 2, dtype=torch.float64) / d.head_dim)
    scaling = d.rope_scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    match kind:
        case "default":
            return plain
        case "linear":
            return plain / scaling["factor"]
        case "llama3":
            return _llama3_frequencies(plain, scaling)
        case "factors":
            return plain / torch.tensor(scaling["factors"], dtype=torch.float64)
        case _:
            raise CheckpointError(f"rope_scaling {kind!r} is not served; known: default, linear, llama3, factors")


def _llama3_frequencies(plain: Tensor, scaling: dict) -> Tensor:
    """Llama 3.1's stretch: long wavelengths divided by `factor`, short ones kept, a ramp between."""
    context, low, high = (
        scaling[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    turns = context * plain / (2 * math.pi)  # how often a frequency turns within the original context
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * kept + plain / scaling["factor"] * (1 - kept)
