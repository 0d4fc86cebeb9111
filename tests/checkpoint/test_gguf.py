"""Tensors equal the format's definition, value by value; a file that lies or ends early is refused by name."""

import hashlib
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenllm.checkpoint import CheckpointError
from tokenllm.checkpoint.gguf import KINDS, LAYOUTS, read_gguf

F32 = np.float32


def half(block: bytes, at: int) -> np.float32:
    return F32(np.frombuffer(block, np.float16, 1, at)[0])


def nibble(packed: bytes, i: int) -> int:
    return packed[i % 16] >> 4 * (i // 16) & 15


def fifth_bit(packed: bytes, i: int) -> int:
    return int.from_bytes(packed, "little") >> i & 1


def six_bits(packed: bytes, group: int, minimum: bool) -> int:
    if group < 4:
        return packed[group + 4 * minimum] & 63
    low = packed[group + 4] >> 4 if minimum else packed[group + 4] & 15
    return low | packed[group - 4 + 4 * minimum] >> 6 << 4


def q4_k(block: bytes, i: int) -> np.float32:
    group = i // 32
    quant = block[16 + 32 * (group // 2) + i % 32] >> 4 * (group % 2) & 15
    step = half(block, 0) * F32(six_bits(block[4:16], group, False))
    return step * F32(quant) - half(block, 2) * F32(six_bits(block[4:16], group, True))


def q6_k(block: bytes, i: int) -> np.float32:
    part, quarter, place = i // 128, i % 128 // 32, i % 32
    low = block[64 * part + 32 * (quarter % 2) + place] >> 4 * (quarter // 2) & 15
    high = block[128 + 32 * part + place] >> 2 * quarter & 3
    (scale,) = struct.unpack_from("b", block, 192 + i // 16)
    return half(block, 208) * F32(scale) * F32((low | high << 4) - 32)


DEFINITIONS: dict[str, Callable[[bytes, int], np.float32]] = {
    "F32": lambda block, i: np.frombuffer(block, np.float32)[i],
    "F16": lambda block, i: half(block, 0),
    "BF16": lambda block, i: np.frombuffer(b"\0\0" + block, np.float32)[i],
    "Q4_0": lambda block, i: F32(nibble(block[2:], i) - 8) * half(block, 0),
    "Q4_1": lambda block, i: F32(nibble(block[4:], i)) * half(block, 0) + half(block, 2),
    "Q5_0": lambda block, i: F32((nibble(block[6:], i) | fifth_bit(block[2:6], i) << 4) - 16) * half(block, 0),
    "Q5_1": lambda block, i: (
        F32(nibble(block[8:], i) | fifth_bit(block[4:8], i) << 4) * half(block, 0) + half(block, 2)
    ),
    "Q8_0": lambda block, i: F32(struct.unpack_from("b", block, 2 + i)[0]) * half(block, 0),
    "Q4_K": q4_k,
    "Q6_K": q6_k,
}


def finite_blocks(kind: str, count: int) -> bytes:
    """Random blocks with finite scales."""
    layout = LAYOUTS[kind]
    raw = np.random.default_rng(len(kind) + layout.block_bytes).integers(
        0, 256, (count, layout.block_bytes), dtype=np.uint8
    )
    scales = {"Q4_1": (1, 3), "Q5_1": (1, 3), "Q4_K": (1, 3), "Q6_K": (209,), "F32": (3,)}.get(kind, (1,))
    for at in scales:
        raw[:, at] &= 0b10111011
    return raw.tobytes()


@pytest.mark.parametrize("kind_id", KINDS)
def test_a_tensor_is_what_the_format_defines(kind_id: int, write_gguf: Callable[..., Path]) -> None:
    kind = KINDS[kind_id]
    layout, data = LAYOUTS[kind], finite_blocks(kind, 6)
    path = write_gguf({}, [("pad", (1,), 0, b"1234"), ("some.weight", (2, 3 * layout.block_values), kind_id, data)])
    values = read_gguf(path).dequantize("some.weight")
    blocks = [data[at : at + layout.block_bytes] for at in range(0, len(data), layout.block_bytes)]
    expected = [DEFINITIONS[kind](block, i) for block in blocks for i in range(layout.block_values)]
    assert values.shape == (2, 3 * layout.block_values)
    assert values.dtype == np.float32
    assert values.tobytes() == np.array(expected, np.float32).tobytes()


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("blk.29.ffn_down.weight", "c19605745425a11e704e305ce3d27b632c406195d39eb3377e9cfb140ac643d1"),
        ("blk.7.attn_k.weight", "fb3e621ad5171f74deb4334b93c111ea657875d1742b9f234c80a4b546d6b46e"),
        ("output_norm.weight", "3b87f8e27335e67fc08f159cabfd2d18f205d6c5b225a6f978153552bf01d559"),
    ],
)
def test_the_default_model_is_read_as_the_gguf_package_0_19_reads_it(
    default_model: Path, name: str, digest: str
) -> None:
    assert hashlib.sha256(read_gguf(default_model).dequantize(name).tobytes()).hexdigest() == digest


METADATA = {"a.word": "Wörter", "a.number": 7, "a.flag": True, "a.list": ["x", "", "é"], "ids": [1, -2, 3]}


def test_metadata_and_places(write_gguf: Callable[..., Path]) -> None:
    found = read_gguf(write_gguf(METADATA, [("w", (2, 3), 0, bytes(24))]))
    assert found.metadata == METADATA
    assert found.tensors["w"].shape == (2, 3)
    assert found.tensors["w"].offset % 32 == 0
    with pytest.raises(CheckpointError, match=r"small\.gguf: tensor 'other' is missing"):
        found.dequantize("other")


def test_every_truncation_is_refused(make_gguf: Callable[..., bytes], tmp_path: Path) -> None:
    whole = make_gguf(METADATA, [("first", (32,), 3, bytes(20)), ("last", (4,), 0, bytes(16))])
    words_only = make_gguf({"words": ["one", "two"]}, []).rstrip(b"\0")
    path = tmp_path / "cut.gguf"
    for cut in [whole[:length] for length in range(len(whole))] + [words_only[:end] for end in range(len(words_only))]:
        path.write_bytes(cut)
        with pytest.raises(CheckpointError, match=r"cut\.gguf: "):
            read_gguf(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="tensor 'last' needs 16 bytes"):
        read_gguf(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_spoilt_file_is_read_or_refused(
    make_gguf: Callable[..., bytes], tmp_path: Path, changes: list[tuple[int, int]]
) -> None:
    content = bytearray(make_gguf(METADATA, [("w", (2, 32), 2, bytes(36)), ("v", (3,), 0, bytes(12))]))
    for at, byte in changes:
        content[at % len(content)] = byte
    path = tmp_path / "spoilt.gguf"
    path.write_bytes(content)
    try:
        found = read_gguf(path)
    except CheckpointError as error:
        assert "spoilt.gguf" in str(error)
    else:
        assert all(found.dequantize(name).shape == tensor.shape for name, tensor in found.tensors.items())


@pytest.mark.parametrize(
    ("tensor", "complaint"),
    [
        (("w", (2, 31), 2, bytes(36)), "'w' of shape .2, 31. is not made of whole blocks"),
        (("w", (0,), 0, b""), "'w' of shape .0,. is not made of whole blocks"),
        (("w", (1,) * 5, 0, bytes(4)), "'w' has 5 dimensions"),
        (("w", (32,), 20, bytes(18)), "'w' has ggml type 20; supported are F32"),
        (("w", (1 << 62, 1 << 62), 0, bytes(4)), "tensor 'w' needs"),
    ],
)
def test_lies_about_a_tensor(
    write_gguf: Callable[..., Path], tensor: tuple[str, tuple[int, ...], int, bytes], complaint: str
) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        read_gguf(write_gguf({}, [tensor]))


def test_no_gguf_at_all(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("once upon a time")
    (tmp_path / "old.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    (tmp_path / "empty.gguf").write_bytes(b"")
    for name, complaint in {"text": "not a GGUF", "old": "version 1", "empty": "empty", "none": "No such"}.items():
        with pytest.raises(CheckpointError, match=complaint):
            read_gguf(tmp_path / f"{name}.gguf")
