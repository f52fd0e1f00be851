"""The header of a `.gguf` file, versions 2 and 3, of either byte order.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and what the two readers in use accept: llama.cpp's
`gguf.cpp` and gguf-py's `GGUFReader`. Where they differ the laxer one is followed as long as every byte's owner is
certain: gaps between tensors and tensors in any order are taken, as gguf-py does.

    magic `GGUF`, u32 version, u64 tensors, u64 keys
    keys      string key, u32 type, value; a string is a u64 length and bytes, an array u32 type, u64 count, values
    tensors   string name, u32 rank, u64 dimensions innermost first, u32 ggml type, u64 offset from the data section
    padding to `general.alignment` (32), then the data section; every tensor begins at a multiple of the alignment

Reasons of the FormatErrors raised. Each points at the field in the header, except where stated:

    magic             not GGUF
    version           not 2 or 3 in either byte order
    header-truncated  the file ends within the header, or a count does not fit in it
    header-length     over MAX_HEADER_BYTES
    header-utf8       a key or tensor name is not UTF-8
    name-length       a key or tensor name is over MAX_NAME_BYTES
    value-type        a value type the format does not have
    array-nesting     arrays within arrays deeper than MAX_DEPTH, or more than MAX_ARRAYS of them
    too-many-keys     over MAX_KEYS
    too-many-tensors  over MAX_TENSORS
    duplicate-key     a key occurs twice
    duplicate-tensor  a tensor occurs twice
    alignment         general.alignment is not a u32 power of two
    unknown-dtype     a ggml type that the installed gguf package does not know
    shape             over MAX_DIMS dimensions, too large to count, or rows that are no whole number of blocks
    offsets           a tensor does not begin at a multiple of the alignment
    tensor-overlap    a tensor begins before the one before it ends           the tensor's first byte
    data-truncated    the file ends before a tensor does                      end of file
"""

from __future__ import annotations

import functools
from typing import Literal

from weightfs.errors import FormatError
from weightfs.formats.cursor import Cursor
from weightfs.formats.layout import ReadAt, TensorExtent, WeightLayout
from weightfs.formats.roles import classify
from weightfs.formats.shapes import element_count

MAX_HEADER_BYTES = 256 << 20
"""The largest published headers (vocabularies of 260,000 tokens with merges) take 16 MB."""

MAX_TENSORS = 1 << 20
MAX_KEYS = 1 << 20
MAX_ARRAYS = 1 << 20
MAX_DEPTH = 4
"""Arrays within arrays are in the specification, but no file in use has them and llama.cpp refuses them."""

MAX_DIMS = 4
"""GGML_MAX_DIMS."""

MAX_NAME_BYTES = (1 << 16) - 1
"""The specification's limit on keys. Names of tensors have 64 there, but builds of ggml for image models allow more."""

MAX_VALUE_BYTES = 4096
"""Strings over this (chat templates) are left out of the metadata, since half a template is worse than none."""

_MAGIC = b"GGUF"
_HEAD_BYTES = 24
_KEY_BYTES = 8 + 4 + 1
_TENSOR_BYTES = 8 + 4 + 4 + 8
_ALIGNMENT_KEY = "general.alignment"
_DEFAULT_ALIGNMENT = 32
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_SCALAR_BYTES = {"B": 1, "b": 1, "H": 2, "h": 2, "I": 4, "i": 4, "f": 4, "?": 1, "Q": 8, "q": 8, "d": 8}
_UINT32 = 4
_STRING = 8
_ARRAY = 9
_ARRAY_BYTES = 4 + 8


def parse_gguf(file: str, size: int, read: ReadAt) -> WeightLayout:
    """Reads and validates the header of one file.

    Args:
        file: the file's name within its folder, for `TensorExtent.file`.
        size: the file's length in bytes; bytes after the last tensor are allowed, as by every reader.
        read: reads the file, front to back, in windows of at most 4 MiB; long arrays of numbers are not read.

    Returns:
        The tensors by offset, ties (tensors of no bytes) by end, then name; `dtype` is ggml's name. `metadata` holds
        the scalar keys as text: `true` and `false`, numbers as Python's `repr`, strings up to `MAX_VALUE_BYTES` with
        bytes that are not UTF-8 replaced.

    Raises:
        FormatError: for the reasons listed at the top of the module.
        ShortReadError: from `read`.
    """
    if size < _HEAD_BYTES:
        raise FormatError("header-truncated", f"{size} bytes can't hold a header", offset=size)
    head = read(0, _HEAD_BYTES)
    if not head.startswith(_MAGIC):
        raise FormatError("magic", f"file begins with {head[:4]!r}, not with {_MAGIC!r}", offset=0)
    order = _byte_order(head)
    cursor = Cursor(read, size=size, limit=MAX_HEADER_BYTES, order=order)
    cursor.skip(8)
    tensor_count = _count(cursor, "tensors", MAX_TENSORS)
    key_count = _count(cursor, "keys", MAX_KEYS)
    cursor.claim(1, tensor_count * _TENSOR_BYTES + key_count * _KEY_BYTES)
    metadata, alignment = _Keys(cursor).read(key_count)
    tensors = _tensors(file, size, cursor, tensor_count, alignment)
    return WeightLayout("gguf", (file,), tensors, metadata, "little" if order == "<" else "big")


def _byte_order(head: bytes) -> Literal["<", ">"]:
    if int.from_bytes(head[4:8], "little") in (2, 3):
        return "<"
    if int.from_bytes(head[4:8], "big") in (2, 3):
        return ">"
    version = int.from_bytes(head[4:8], "little")
    raise FormatError("version", f"version {version} is neither 2 nor 3", offset=4)


def _count(cursor: Cursor, what: str, most: int) -> int:
    offset = cursor.offset
    count: int = cursor.number("Q")
    if count > most:
        raise FormatError(f"too-many-{what}", f"{count} {what} are more than {most}", offset=offset)
    return count


def _name(cursor: Cursor) -> str:
    offset = cursor.offset
    length: int = cursor.number("Q")
    if length > MAX_NAME_BYTES:
        raise FormatError("name-length", f"name of {length} bytes exceeds {MAX_NAME_BYTES}", offset=offset)
    try:
        return cursor.take(length).decode()
    except UnicodeDecodeError as error:
        raise FormatError("header-utf8", "name is not UTF-8", offset=offset + 8 + error.start) from error


class _Keys:
    """Reads the key-value section."""

    __slots__ = ("_arrays", "_cursor")

    def __init__(self, cursor: Cursor) -> None:
        self._cursor = cursor
        self._arrays = 0

    def read(self, count: int) -> tuple[dict[str, str], int]:
        """Reads `count` pairs; gives the scalars as text, and the alignment."""
        seen: set[str] = set()
        metadata: dict[str, str] = {}
        alignment = _DEFAULT_ALIGNMENT
        for _ in range(count):
            offset = self._cursor.offset
            key = _name(self._cursor)
            if key in seen:
                raise FormatError("duplicate-key", f"key {key!r} occurs twice", offset=offset)
            seen.add(key)
            offset = self._cursor.offset
            kind: int = self._cursor.number("I")
            text = self._value(kind, offset)
            if text is not None:
                metadata[key] = text
            if key == _ALIGNMENT_KEY:
                alignment = _alignment(kind, text, offset)
        return metadata, alignment

    def _value(self, kind: int, offset: int) -> str | None:
        cursor = self._cursor
        if (code := _SCALARS.get(kind)) is not None:
            value = cursor.number(code)
            return str(value).lower() if code == "?" else repr(value)
        if kind == _STRING:
            length: int = cursor.number("Q")
            if length > MAX_VALUE_BYTES:
                cursor.skip(length)
                return None
            return cursor.take(length).decode(errors="replace")
        if kind != _ARRAY:
            raise FormatError("value-type", f"unknown value type {kind}", offset=offset)
        self._skip_array(1)
        return None

    def _skip_array(self, depth: int) -> None:
        cursor = self._cursor
        offset = cursor.offset
        kind: int = cursor.number("I")
        count: int = cursor.number("Q")
        if (code := _SCALARS.get(kind)) is not None:
            cursor.skip(count * _SCALAR_BYTES[code])
        elif kind == _STRING:
            cursor.skip_strings(count)
        elif kind != _ARRAY:
            raise FormatError("value-type", f"unknown value type {kind} in an array", offset=offset)
        else:
            cursor.claim(count, _ARRAY_BYTES)
            # Numbers are skipped at once and strings at 0.1 us each, but an array within an array costs a call.
            self._arrays += count
            if depth >= MAX_DEPTH or self._arrays > MAX_ARRAYS:
                raise FormatError("array-nesting", f"{count} arrays within an array, {depth} deep", offset=offset)
            for _ in range(count):
                self._skip_array(depth + 1)


def _alignment(kind: int, text: str | None, offset: int) -> int:
    """The specification asks for a multiple of 8; both readers take any power of two, as a u32, and so do we."""
    value = int(text) if text is not None and kind == _UINT32 else 0
    if value == 0 or value & (value - 1):
        raise FormatError("alignment", f"{_ALIGNMENT_KEY} is {text}, not a u32 power of two", offset=offset)
    return value


@functools.cache
def _types() -> dict[int, tuple[str, int, int]]:
    """Gives each ggml type's name, elements to a block, and bytes to a block.

    Imported here, since the package brings NumPy and requests: 100 ms that a mount of safetensors never needs.
    """
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    return {
        int(kind): (kind.name, *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType if kind in GGML_QUANT_SIZES
    }


def _tensors(file: str, size: int, cursor: Cursor, count: int, alignment: int) -> tuple[TensorExtent, ...]:
    found: list[tuple[int, int, str, str, tuple[int, ...]]] = []
    names: set[str] = set()
    for _ in range(count):
        offset = cursor.offset
        name = _name(cursor)
        if name in names:
            raise FormatError("duplicate-tensor", f"{name!r} occurs twice", offset=offset)
        names.add(name)
        dtype, shape, nbytes = _shape(cursor, name)
        offset = cursor.offset
        begin: int = cursor.number("Q")
        if begin % alignment:
            raise FormatError("offsets", f"{name!r} begins at {begin}, not a multiple of {alignment}", offset=offset)
        found.append((begin, begin + nbytes, name, dtype, shape))
    data_start = -(-cursor.offset // alignment) * alignment
    found.sort()
    tensors: list[TensorExtent] = []
    taken = 0
    for begin, end, name, dtype, shape in found:
        if begin < taken:
            raise FormatError(
                "tensor-overlap",
                f"{name!r} begins {taken - begin} bytes before the tensor before it ends",
                offset=data_start + begin,
            )
        taken = end
        role, layer = classify(name)
        tensors.append(TensorExtent(name, dtype, shape, file, data_start + begin, end - begin, layer, role))
    if tensors and data_start + taken > size:
        raise FormatError(
            "data-truncated", f"tensors end at byte {data_start + taken}, the file at {size}", offset=size
        )
    return tuple(tensors)


def _shape(cursor: Cursor, name: str) -> tuple[str, tuple[int, ...], int]:
    """Reads a tensor's dimensions and type; gives its dtype, its shape in C order, and its length in bytes."""
    offset = cursor.offset
    rank: int = cursor.number("I")
    if rank > MAX_DIMS:
        raise FormatError("shape", f"{name!r} has {rank} dimensions, ggml allows {MAX_DIMS}", offset=offset)
    dimensions = tuple(cursor.number("Q") for _ in range(rank))
    type_offset = cursor.offset
    kind: int = cursor.number("I")
    known = _types().get(kind)
    if known is None:
        raise FormatError("unknown-dtype", f"{name!r} has the unknown ggml type {kind}", offset=type_offset)
    dtype, block_elements, block_bytes = known
    elements = element_count(dimensions)
    if elements is None:
        raise FormatError("shape", f"{name!r} has an impossible shape {dimensions}", offset=offset)
    # ggml packs rows, the innermost dimension, each on its own; a scalar is a row of one.
    row = dimensions[0] if dimensions else 1
    if row % block_elements:
        raise FormatError("shape", f"{name!r} has rows of {row}, {dtype} packs {block_elements}", offset=offset)
    return dtype, dimensions[::-1], elements // block_elements * block_bytes
