"""Reads GGUF files, version 2 and 3: metadata, the list of tensors, and their values as float32.

Owns the mapped file. Every size a file claims is checked against the file's length before it is used,
so that a truncated or lying file is a `CheckpointError` and never a crash.

    "GGUF" | version u32 | tensors u64 | metadata u64 | metadata… | tensor infos… | padding | tensor data…
"""

import mmap
import struct
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from tokenllm.checkpoint import CheckpointError

Bytes: TypeAlias = NDArray[Any]  # of uint8, which the type of `packed & 15` would lose
Floats: TypeAlias = NDArray[np.float32]

MAX_DIMENSIONS = 4
STRING, ARRAY = 8, 9
NUMBERS = {kind: struct.Struct("<" + code) for kind, code in zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True)}
LENGTH = NUMBERS[10]


class GgufTensor(msgspec.Struct, frozen=True):
    """Where one tensor lies. `shape` is in numpy's order, the reverse of the file's."""

    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int  # from the start of the file
    nbytes: int


class Gguf(msgspec.Struct, frozen=True, eq=False):
    """A mapped GGUF file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    data: Bytes  # the whole file

    def dequantize(self, name: str) -> Floats:
        """The values of a tensor, in its numpy shape, as a new array."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: tensor {name!r} is missing")
        tensor = self.tensors[name]
        layout = LAYOUTS[tensor.kind]
        blocks = self.data[tensor.offset : tensor.offset + tensor.nbytes].reshape(-1, layout.block_bytes)
        return layout.dequantize(blocks).reshape(tensor.shape)


def read_gguf(path: Path) -> Gguf:
    """Maps a file and reads everything but the tensors' values."""
    try:
        with path.open("rb") as file:
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:  # ValueError: the file is empty
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    cursor = _Cursor(path, view)
    tensor_count, metadata_count = cursor.header()
    metadata = {cursor.string("a metadata key"): cursor.value() for _ in range(metadata_count)}
    infos = [cursor.tensor_info() for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise CheckpointError(f"{path}: general.alignment is {alignment!r}, expected a positive integer")
    start = -(-cursor.at // alignment) * alignment
    tensors = {info.name: _placed(info, start, view.nbytes, path) for info in infos}
    if len(tensors) < tensor_count:
        raise CheckpointError(f"{path}: holds two tensors of the same name")
    return Gguf(path, metadata, tensors, np.frombuffer(view, np.uint8))


class _TensorInfo(msgspec.Struct, frozen=True):
    name: str
    shape: tuple[int, ...]
    kind_id: int
    offset: int  # from the start of the tensor data


class _Cursor:
    """Walks through the head of a file and never beyond its end."""

    def __init__(self, path: Path, view: memoryview):
        self.path, self.view, self.at = path, view, 0

    def header(self) -> tuple[int, int]:
        if self.take(4, "the magic number") != b"GGUF":
            raise CheckpointError(f"{self.path}: is not a GGUF file")
        version = self.number(4, "the version")
        if version not in (2, 3):
            raise CheckpointError(f"{self.path}: GGUF version {version}, only little-endian 2 and 3 can be read")
        return self.number(10, "the number of tensors"), self.number(10, "the number of metadata entries")

    def take(self, nbytes: int, what: str) -> memoryview:
        start, end = self.at, self.at + nbytes
        if end > len(self.view):
            raise CheckpointError(
                f"{self.path}: truncated: {what} needs {nbytes} bytes at {start}, the file ends at {len(self.view)}"
            )
        self.at = end
        return self.view[start:end]

    def number(self, kind: int, what: str) -> Any:
        return NUMBERS[kind].unpack(self.take(NUMBERS[kind].size, what))[0]

    def string(self, what: str) -> str:
        try:
            return str(self.take(self.number(10, what), what), "utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: {what} is not UTF-8: {error}") from error

    def value(self) -> Any:
        kind = self.number(4, "a metadata type")
        return self.array() if kind == ARRAY else self.scalar(kind)

    def scalar(self, kind: int) -> Any:
        if kind == STRING:
            return self.string("a metadata string")
        if kind not in NUMBERS:
            raise CheckpointError(f"{self.path}: metadata type {kind} is unknown")
        return self.number(kind, "a metadata value")

    def array(self) -> list[Any]:
        kind, length = self.number(4, "an array type"), self.number(10, "an array length")
        if kind == STRING:
            return self.strings(length)
        if kind not in NUMBERS:
            raise CheckpointError(f"{self.path}: arrays of metadata type {kind} are not supported")
        code = NUMBERS[kind]
        return [value for (value,) in code.iter_unpack(self.take(length * code.size, "a metadata array"))]

    def strings(self, length: int) -> list[str]:
        # the same as `string` for each, written out: there are a hundred thousand of them
        view, at, end, unpack = self.view, self.at, len(self.view), LENGTH.unpack_from
        found: list[str] = []
        try:
            for _ in range(length):
                (nbytes,) = unpack(view, at)
                if nbytes > end - at - 8:
                    raise CheckpointError(f"{self.path}: truncated: a string of {nbytes} bytes at {at}")
                found.append(str(view[at + 8 : at + 8 + nbytes], "utf-8"))
                at += 8 + nbytes
        except (struct.error, UnicodeDecodeError) as error:
            raise CheckpointError(f"{self.path}: a string at {at}: {error}") from error
        self.at = at
        return found

    def tensor_info(self) -> _TensorInfo:
        name = self.string("a tensor name")
        dimensions = self.number(4, f"tensor {name!r}")
        if dimensions > MAX_DIMENSIONS:
            raise CheckpointError(f"{self.path}: tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self.number(10, f"tensor {name!r}") for _ in range(dimensions))
        return _TensorInfo(name, shape[::-1], self.number(4, f"tensor {name!r}"), self.number(10, f"tensor {name!r}"))


def _placed(info: _TensorInfo, start: int, file_bytes: int, path: Path) -> GgufTensor:
    if info.kind_id not in KINDS:
        raise CheckpointError(
            f"{path}: tensor {info.name!r} has ggml type {info.kind_id}; supported are {', '.join(LAYOUTS)}"
        )
    layout, count = LAYOUTS[KINDS[info.kind_id]], prod(info.shape)
    if not count or (info.shape or (1,))[-1] % layout.block_values:
        raise CheckpointError(f"{path}: tensor {info.name!r} of shape {info.shape} is not made of whole blocks")
    nbytes, offset = count // layout.block_values * layout.block_bytes, start + info.offset
    if offset + nbytes > file_bytes:
        raise CheckpointError(
            f"{path}: truncated: tensor {info.name!r} needs {nbytes} bytes at {offset}, the file ends at {file_bytes}"
        )
    return GgufTensor(info.name, info.shape, KINDS[info.kind_id], offset, nbytes)


class _Layout(msgspec.Struct, frozen=True):
    """How values are packed: blocks of so many values in so many bytes."""

    block_values: int
    block_bytes: int
    dequantize: Callable[[Bytes], Floats]  # uint8 [blocks, block_bytes] → float32 [blocks, block_values]


def _f32(blocks: Bytes) -> Floats:
    return blocks.view(np.float32).copy()


def _f16(blocks: Bytes) -> Floats:
    return blocks.view(np.float16).astype(np.float32)


def _bf16(blocks: Bytes) -> Floats:
    return (blocks.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _scale(blocks: Bytes, at: int) -> Floats:
    return blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32)  # [blocks, 1]


def _q4_0(blocks: Bytes) -> Floats:
    values = np.subtract(_nibbles(blocks[:, 2:]), 8, dtype=np.float32)
    return np.multiply(values, _scale(blocks, 0), out=values)


def _q4_1(blocks: Bytes) -> Floats:
    values = np.multiply(_nibbles(blocks[:, 4:]), _scale(blocks, 0), dtype=np.float32)
    return np.add(values, _scale(blocks, 2), out=values)


def _q5_0(blocks: Bytes) -> Floats:
    values = np.subtract(_nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6]), 16, dtype=np.float32)
    return np.multiply(values, _scale(blocks, 0), out=values)


def _q5_1(blocks: Bytes) -> Floats:
    values = np.multiply(_nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8]), _scale(blocks, 0), dtype=np.float32)
    return np.add(values, _scale(blocks, 2), out=values)


def _q8_0(blocks: Bytes) -> Floats:
    return np.multiply(blocks[:, 2:].view(np.int8), _scale(blocks, 0), dtype=np.float32)


def _q4_k(blocks: Bytes) -> Floats:
    """Eight groups of 32 values, each with a scale and a minimum of six bits."""
    scales, minima = _six_bits(blocks[:, 4:16])
    steps = (_scale(blocks, 0) * scales)[:, :, None]
    floors = (_scale(blocks, 2) * minima)[:, :, None]
    pairs = [_nibbles(blocks[:, at : at + 32]) for at in range(16, 144, 32)]
    values = np.multiply(steps, np.hstack(pairs).reshape(-1, 8, 32), dtype=np.float32)
    return np.subtract(values, floors, out=values).reshape(-1, 256)


def _q6_k(blocks: Bytes) -> Floats:
    """Sixteen groups of 16 values of six bits: four low ones in `low`, two high ones in `high`."""
    low, high = blocks[:, :128].reshape(-1, 2, 64), blocks[:, 128:192].reshape(-1, 2, 1, 32)
    fours = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    twos = high >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    values = (fours | twos << 4).astype(np.int8) - np.int8(32)
    steps = _scale(blocks, 208) * blocks[:, 192:208].view(np.int8)
    return (steps[:, :, None] * values.reshape(-1, 16, 16)).reshape(-1, 256)


def _nibbles(packed: Bytes) -> Bytes:
    """Low halves of all bytes, then their high halves."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _fifth_bits(packed: Bytes) -> Bytes:
    return np.unpackbits(packed, axis=1, bitorder="little") << 4


def _six_bits(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Eight scales and eight minima out of twelve bytes."""
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, rest & 15 | first >> 6 << 4], axis=1)
    minima = np.concatenate([second & 63, rest >> 4 | second >> 6 << 4], axis=1)
    return scales, minima


LAYOUTS = {
    "F32": _Layout(1, 4, _f32),
    "F16": _Layout(1, 2, _f16),
    "BF16": _Layout(1, 2, _bf16),
    "Q4_0": _Layout(32, 18, _q4_0),
    "Q4_1": _Layout(32, 20, _q4_1),
    "Q5_0": _Layout(32, 22, _q5_0),
    "Q5_1": _Layout(32, 24, _q5_1),
    "Q8_0": _Layout(32, 34, _q8_0),
    "Q4_K": _Layout(256, 144, _q4_k),
    "Q6_K": _Layout(256, 210, _q6_k),
}
KINDS = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 12: "Q4_K", 14: "Q6_K", 30: "BF16"}
