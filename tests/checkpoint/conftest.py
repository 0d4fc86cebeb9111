"""A writer of small GGUF files."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WriteGguf = Callable[..., Path]


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: Any) -> bytes:
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + _string(value)
        case [str(), *_]:
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
        case list():
            return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)
    raise TypeError(value)


def gguf_bytes(metadata: dict[str, Any], tensors: list[tuple[str, tuple[int, ...], int, bytes]]) -> bytes:
    """A GGUF 3 file. Tensors: name, shape in numpy's order, ggml type, data."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(_string(key) + _value(value) for key, value in metadata.items())
    data = b""
    for name, shape, kind, content in tensors:
        data += b"\0" * (-len(data) % 32)
        head += _string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        head += struct.pack("<IQ", kind, len(data))
        data += content
    return head + b"\0" * (-len(head) % 32) + data


@pytest.fixture
def write_gguf(tmp_path: Path) -> WriteGguf:
    def write(metadata: dict[str, Any], tensors: list[tuple[str, tuple[int, ...], int, bytes]]) -> Path:
        path = tmp_path / "small.gguf"
        path.write_bytes(gguf_bytes(metadata, tensors))
        return path

    return write


@pytest.fixture
def make_gguf() -> Callable[..., bytes]:
    return gguf_bytes
