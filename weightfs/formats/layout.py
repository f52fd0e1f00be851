"""What a weight file is made of: named extents of bytes. Pure data, no I/O."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

ReadAt = Callable[[int, int], bytes]
"""`read(offset, length)` gives exactly `length` bytes of a file, or raises `ShortReadError` or another error."""

ByteOrder = Literal["little", "big"]
"""Of a tensor's elements. Everything is little-endian but a GGUF file written for a big-endian machine."""


class Role(enum.StrEnum):
    """What a tensor is for, as far as its name tells; it decides how early a loader needs it."""

    EMBEDDING = "embedding"
    BLOCK = "block"
    NORM = "norm"
    HEAD = "head"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class TensorExtent:
    """One tensor: the half-open byte range `[offset, offset + nbytes)` of one file.

    Attributes:
        name: as the header spells it; any text, `/` and `..` included.
        dtype: the format's own spelling (`BF16`, `F8_E4M3`; for GGUF the ggml type name, `Q4_K`).
        shape: outermost dimension first (C order), so that GGUF's reversed order is already undone; `()` is a scalar.
        file: name of the file within its folder.
        offset: from the start of the *file*, not of the data section, in bytes.
        nbytes: length in bytes; 0 for a tensor without elements.
        layer: block number for `Role.BLOCK`, else None.
        role: see `Role`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int
    layer: int | None
    role: Role


@dataclass(frozen=True, slots=True)
class WeightLayout:
    """Every tensor of one weight file, or of a set of shards that form one model.

    Attributes:
        format: `safetensors` or `gguf`.
        files: names of the files within their folder, in shard order.
        tensors: in file order, and within a file by offset.
        metadata: the header's own text entries (`__metadata__`; for GGUF the scalar keys, arrays left out).
        byte_order: of the elements of every tensor.
    """

    format: str
    files: tuple[str, ...]
    tensors: tuple[TensorExtent, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    byte_order: ByteOrder = "little"

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together; headers and padding are not counted."""
        return sum(tensor.nbytes for tensor in self.tensors)
