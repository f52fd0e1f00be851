"""Builds headers byte by byte, right or wrong, without the libraries that the parsers are compared with."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from typing import Any, Literal

import safetensors as library

from weightfs.errors import ShortReadError
from weightfs.formats import ReadAt

UINT32, STRING, ARRAY = 4, 8, 9


def reader(data: bytes) -> ReadAt:
    def read(offset: int, length: int) -> bytes:
        piece = data[offset : offset + length]
        if len(piece) != length:
            raise ShortReadError(f"{len(piece)} bytes of {length} at {offset}")
        return piece

    return read


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def safetensors(header: dict[str, Any] | bytes, data_bytes: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data_bytes)


def library_tensors(data: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    """What the safetensors library makes of a file: name to dtype, shape and bytes; None if it refuses."""
    deserialize: Any = library.deserialize
    try:
        found = deserialize(data)
    except library.SafetensorError:
        return None
    return {name: (tensor["dtype"], tensor["shape"], bytes(tensor["data"])) for name, tensor in found}


class Gguf:
    """Spells GGUF fields in one byte order."""

    def __init__(self, order: Literal["<", ">"] = "<", version: int = 3) -> None:
        self.order = order
        self.version = version

    def pack(self, codes: str, *values: Any) -> bytes:
        return struct.pack(self.order + codes, *values)

    def string(self, text: str | bytes) -> bytes:
        raw = text.encode() if isinstance(text, str) else text
        return self.pack("Q", len(raw)) + raw

    def key(self, name: str | bytes, kind: int, value: bytes) -> bytes:
        return self.string(name) + self.pack("I", kind) + value

    def array(self, kind: int, count: int, values: bytes) -> bytes:
        return self.pack("IQ", kind, count) + values

    def tensor(self, name: str | bytes, dims: Iterable[int], kind: int, offset: int) -> bytes:
        dimensions = list(dims)
        return self.string(name) + self.pack(f"I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)

    def file(
        self,
        keys: Iterable[bytes] = (),
        tensors: Iterable[bytes] = (),
        data_bytes: int = 0,
        *,
        alignment: int = 32,
        key_count: int | None = None,
        tensor_count: int | None = None,
    ) -> bytes:
        pairs, infos = list(keys), list(tensors)
        head = b"GGUF" + self.pack(
            "IQQ",
            self.version,
            len(infos) if tensor_count is None else tensor_count,
            len(pairs) if key_count is None else key_count,
        )
        header = head + b"".join(pairs) + b"".join(infos)
        return header + bytes(-len(header) % alignment) + bytes(data_bytes)
