"""Model folders for benchmarks, made from a config.json alone: a byte-level tokenizer of as many tokens as the config
says, and, where a start is to be measured, random weights in shards as the hub has them.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from tokenllm.checkpoint.description import describe
from tokenllm.models.weights import Precision, load_decoder

SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"


def write_model_folder(config: Path, folder: Path) -> Path:
    """What `tokenllm serve --load-format dummy` needs of a model."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(config, folder / "config.json")
    vocab_size = json.loads(config.read_text())["vocab_size"]
    if not (folder / "tokenizer.json").exists():
        _tokenizer(vocab_size).save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages[-1].content }}"}))
    return folder


def _tokenizer(vocab_size: int) -> Tokenizer:
    """Every byte, then words that no text is ever split into, but ids may well stand for."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"Ġ{number:x}" for number in range(vocab_size - len(letters)))]
    tokenizer = Tokenizer(models.BPE(vocab={word: id_ for id_, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


class _Wanted:
    """A source without weights, which notes what a decoder asks it for."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        self.shapes[name] = shape
        return torch.empty(shape, device="meta")


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """By Hugging Face name, whatever the family."""
    wanted = _Wanted()
    load_decoder(wanted, describe(folder), Precision(torch.bfloat16), torch.device("meta"), 1)
    return wanted.shapes


def write_random_weights(folder: Path, device: torch.device) -> int:
    """bfloat16 shards, normal with standard deviation 0.02; norms are one. Returns their bytes. Once is enough."""
    shapes = weight_shapes(folder)
    total = sum(torch.Size(shape).numel() * 2 for shape in shapes.values())
    if (folder / INDEX).exists():
        return total
    file_of = {}
    for number, names in enumerate(_shards(shapes)):
        file = f"model-{number:05}.safetensors"
        save_file({name: _random(name, shapes[name], device) for name in names}, folder / file)
        file_of |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": file_of}))
    return total


def _shards(shapes: dict[str, tuple[int, ...]]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * 2
        if size > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size
    return shards


def _random(name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=0.02).cpu()
