"""A GGUF file's tokenizer in the form of a Hugging Face tokenizer.json, so that only one form has to be understood."""

from typing import Any

from tokenllm.checkpoint import CheckpointError
from tokenllm.checkpoint.gguf import Gguf
from tokenllm.text.bpe import GPT2, LLAMA3, QWEN2, SMOLLM

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # tokenizer.ggml.token_type; 5: unused
ADDED = (UNKNOWN, CONTROL, USER_DEFINED)
PATTERNS = {"smollm": SMOLLM, "llama-bpe": LLAMA3, "qwen2": QWEN2, "gpt-2": GPT2}  # by tokenizer.ggml.pre
SPACE = "▁"  # how SentencePiece writes a space

Json = dict[str, Any]


def tokenizer_json(gguf: Gguf) -> Json:
    kind, pre = (gguf.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind == "gpt2" and pre in PATTERNS:
        return _common(gguf, begins=pre == "llama-bpe") | _byte_level(gguf, pre)
    if kind == "llama":
        return _common(gguf, begins=True) | _sentence_piece(gguf)
    raise CheckpointError(
        f"{gguf.path}: tokenizer.ggml.model {kind!r} with pre-tokenizer {pre!r} is not supported, only 'llama' "
        f"and 'gpt2' with {', '.join(PATTERNS)}; serve the model's Hugging Face folder instead"
    )


def _common(gguf: Gguf, begins: bool) -> Json:
    """What both kinds have; `begins` says whether a bos token is added where the file does not."""
    adds_bos = gguf.metadata.get("tokenizer.ggml.add_bos_token", begins)
    added = [
        {"id": id_, "content": token, "special": type_ != USER_DEFINED, "normalized": False}
        | dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
        for id_, (token, type_) in enumerate(_tokens(gguf))
        if type_ in ADDED
    ]
    begin = {"type": "TemplateProcessing", "single": [{"SpecialToken": {}}, {"Sequence": {}}]}
    return {"added_tokens": added, "post_processor": begin if adds_bos else None}


def _byte_level(gguf: Gguf, pre: str) -> Json:
    split = {"type": "Split", "pattern": {"Regex": PATTERNS[pre]}, "behavior": "Isolated", "invert": False}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {"type": "BPE", "vocab": _vocabulary(gguf, NORMAL, *ADDED), "merges": _list(gguf, "merges")}
    return {
        "model": model | {"ignore_merges": pre == "llama-bpe"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, to_bytes]},
        "decoder": to_bytes,
    }


def _sentence_piece(gguf: Gguf) -> Json:
    """Any two neighbours that form a token merge, the best score first; what is no token falls back to its bytes.

    Control tokens are left out, for text would become one wherever two tokens make up its literal.
    """
    words, scores = _vocabulary(gguf, NORMAL, USER_DEFINED), _list(gguf, "scores")
    pairs = ((token[:cut], token[cut:]) for token in words for cut in range(1, len(token)))
    merges = sorted(
        (pair for pair in pairs if pair[0] in words and pair[1] in words),
        key=lambda pair: -scores[words[pair[0] + pair[1]]],
    )
    model = {"type": "BPE", "vocab": words | _vocabulary(gguf, BYTE), "merges": merges}
    prefix = gguf.metadata.get("tokenizer.ggml.add_space_prefix", True)
    before = [{"type": "Prepend", "prepend": SPACE}] * prefix
    after = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * prefix
    return {
        "model": model | {"byte_fallback": True},
        "normalizer": {"type": "Sequence", "normalizers": [*before, _replace(" ", SPACE)]},
        "decoder": {
            "type": "Sequence",
            "decoders": [_replace(SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}, *after],
        },
    }


def _replace(old: str, new: str) -> Json:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _vocabulary(gguf: Gguf, *types: int) -> dict[str, int]:
    return {token: id_ for id_, (token, type_) in enumerate(_tokens(gguf)) if type_ in types}


def _tokens(gguf: Gguf) -> list[tuple[str, int]]:
    tokens, types = _list(gguf, "tokens"), _list(gguf, "token_type")
    if len(tokens) != len(types):
        raise CheckpointError(f"{gguf.path}: {len(tokens)} tokenizer.ggml.tokens and {len(types)} token_type")
    return list(zip(tokens, types, strict=True))


def _list(gguf: Gguf, key: str) -> list[Any]:
    if not isinstance(found := gguf.metadata.get(f"tokenizer.ggml.{key}"), list):
        raise CheckpointError(f"{gguf.path}: tokenizer.ggml.{key} is missing")
    return found
