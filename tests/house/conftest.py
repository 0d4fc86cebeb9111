"""A model small enough to start a whole server in a second, and servers that never outlive their test."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from house import House, fake_house


@pytest.fixture
def start(tmp_path: Path, tiny_model: Path) -> Iterator[Callable[..., House]]:
    """Starts servers with the fake scheduler."""
    yield from _starter(tmp_path, tiny_model)


@pytest.fixture(scope="module")
def start_once(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Callable[..., House]]:
    """The same, for servers that several tests use."""
    yield from _starter(tmp_path_factory.mktemp("house"), tiny_model)


def _starter(folder: Path, model: Path) -> Iterator[Callable[..., House]]:
    houses: list[House] = []

    def start_house(environment: Mapping[str, str] = {}, **settings: object) -> House:
        houses.append(fake_house(model, folder / f"house{len(houses)}.log", environment, **settings))
        return houses[-1]

    yield start_house
    for house in houses:
        house.raze()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without weights: a Llama of nearly nothing, and a byte-level tokenizer of 404 tokens."""
    folder = tmp_path_factory.mktemp("tiny-model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=404,
        special_tokens=["<eos>", "<user>", "<assistant>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "the quick brown fox jumps over the lazy dog, då gick räven över ån; 狐は犬を飛び越えた 🦊🐕 "
    tokenizer.train_from_iterator([text * 3, text.upper() * 3, Path(__file__).read_text()], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}<assistant>"
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "chat_template": template}))
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **shape,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
