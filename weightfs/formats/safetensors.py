"""The header of a `.safetensors` file.

Source: https://github.com/huggingface/safetensors (the format's README, and `Metadata::validate` of the Rust crate).
This is never laxer than the crate about where a tensor's bytes are; `tests/property/test_formats.py` lists the headers
on which the two disagree, and why.

    bytes 0 to 8        N, the header's length, little-endian
    bytes 8 to 8 + N    JSON object: tensor name -> {dtype, shape, data_offsets: [begin, end)}, and `__metadata__`
    the rest            the data section, where data_offsets count from; the tensors tile it without hole or overlap

Reasons of the FormatErrors raised, and the byte each one points at:

    header-length     N is over the format's limit                                  0
    header-truncated  the file ends within the header                               end of file
    header-start      the header does not begin with `{`                            8
    header-utf8       the header is not UTF-8                                       the offending byte
    header-json       not JSON, or an entry is not what the format says             where it broke, as near as known
    too-many-tensors  over MAX_TENSORS                                              8
    duplicate-tensor  a tensor, or a field of one, occurs twice                     its entry in the header
    unknown-dtype     a dtype the format does not have                              its entry in the header
    shape             negative, or too large to count                               its entry in the header
    offsets           begin > end, or the range does not fit dtype and shape        its entry in the header
    tensor-overlap    the tensor begins before the one before it ends               the tensor's first byte
    tensor-gap        bytes between two tensors belong to none                      first such byte
    data-truncated    the file ends before the last tensor does                     end of file
    data-trailing     bytes after the last tensor                                   first such byte
"""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec

from weightfs.errors import FormatError
from weightfs.formats.layout import ReadAt, TensorExtent, WeightLayout
from weightfs.formats.roles import classify
from weightfs.formats.shapes import element_count

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit on N."""

MAX_TENSORS = 1 << 20
"""Tensors in one file; the largest published shards have a few hundred thousand. Bounds memory, like the next line."""

DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits of one element of each dtype of the format (safetensors 0.8)."""

_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_FIELDS = ("dtype", "shape", "data_offsets")
_BYTE = re.compile(r"\(byte ([0-9]+)\)")


class _Entry(msgspec.Struct, gc=False):
    """A tensor, or `__metadata__`, whose own keys may be called `shape`: hence the strings and the unset fields.

    Typed decoding fails at the first entry of another form, so that 100 MB of `{"a":1,"b":1,...` never become
    14 million Python objects.
    """

    dtype: str | msgspec.UnsetType = msgspec.UNSET
    shape: tuple[int, ...] | str | msgspec.UnsetType = msgspec.UNSET
    data_offsets: tuple[int, int] | str | msgspec.UnsetType = msgspec.UNSET


class _Head(msgspec.Struct):
    metadata: dict[str, str] | None = msgspec.field(name=_METADATA, default=None)


_decode_entries = msgspec.json.Decoder(dict[str, _Entry | None]).decode
_decode_head = msgspec.json.Decoder(_Head).decode


def parse_safetensors(file: str, size: int, read: ReadAt) -> WeightLayout:
    """Reads and validates the header of one file.

    Args:
        file: the file's name within its folder, for `TensorExtent.file`.
        size: the file's length in bytes; the tensors must end exactly there.
        read: reads the file; called twice, for at most `MAX_HEADER_BYTES` bytes.

    Returns:
        The tensors by offset, ties (tensors of no bytes) by end, then name; `metadata` is `__metadata__`.

    Raises:
        FormatError: for the reasons listed at the top of the module.
        ShortReadError: from `read`.
    """
    if size < _LENGTH_BYTES:
        raise FormatError("header-truncated", f"{size} bytes can't hold a header's length", offset=size)
    length = int.from_bytes(read(0, _LENGTH_BYTES), "little")
    if length > MAX_HEADER_BYTES:
        raise FormatError("header-length", f"header of {length} bytes exceeds {MAX_HEADER_BYTES}", offset=0)
    data_start = _LENGTH_BYTES + length
    if data_start > size:
        raise FormatError("header-truncated", f"header ends at byte {data_start}, the file at {size}", offset=size)
    header = read(_LENGTH_BYTES, length)
    entries, metadata = _parse(header)
    tensors = _extents(file, header, entries, data_start)
    end = tensors[-1].offset + tensors[-1].nbytes if tensors else data_start
    if end > size:
        raise FormatError("data-truncated", f"tensors end at byte {end}, the file at {size}", offset=size)
    if end < size:
        raise FormatError("data-trailing", f"{size - end} bytes after the last tensor", offset=end)
    return WeightLayout("safetensors", (file,), tensors, metadata)


def _parse(header: bytes) -> tuple[dict[str, _Entry | None], dict[str, str]]:
    # Demanded by the format; the crate only started to when writing, and still reads a header that begins with a space.
    if not header.startswith(b"{"):
        raise FormatError("header-start", "header does not begin with '{'", offset=_LENGTH_BYTES)
    # msgspec validates only the strings it keeps.
    if not header.isascii():
        try:
            header.decode()
        except UnicodeDecodeError as error:
            raise FormatError("header-utf8", "header is not UTF-8", offset=_LENGTH_BYTES + error.start) from error
    if header.count(b'"data_offsets"') > MAX_TENSORS:
        raise _too_many()
    try:
        entries = _decode_entries(header)
        metadata = _decode_head(header).metadata or {}
        entries.pop(_METADATA, None)
        if _may_repeat(header, len(entries)):
            _refuse_repeats(header)
    except RecursionError as error:
        raise FormatError("header-json", "header is nested too deeply", offset=_LENGTH_BYTES) from error
    except (msgspec.DecodeError, ValueError) as error:
        offset = _LENGTH_BYTES + _broke_at(error, len(header))
        raise FormatError("header-json", f"header can't be decoded: {error}", offset=offset) from error
    if len(entries) > MAX_TENSORS:
        raise _too_many()
    return entries, metadata


def _may_repeat(header: bytes, tensors: int) -> bool:
    """Tells whether a key may occur twice, which no fast decoder reports: the last one silently wins.

    Each tensor spells its three fields once, so more spellings than tensors mean a repetition, or merely a string that
    looks like a field; fewer are possible only with `\\u` escapes, which could hide a repetition.
    """
    return (
        b"\\u" in header
        or header.count(b'"__metadata__"') > 1
        or any(header.count(f'"{field}"'.encode()) != tensors for field in _FIELDS)
    )


def _refuse_repeats(header: bytes) -> None:
    """Looks for repeated keys exactly, at several times the cost of the decoding above.

    Raises:
        FormatError: a tensor, a field of one, or `__metadata__` occurs twice. Keys within `__metadata__`, and fields
            the format does not have, may repeat, as with the crate. (The crate lets a repeated *tensor* pass; its
            bytes would then depend on who reads the header.)
    """
    # Numbers stay text: their values do not matter here, and Python refuses to convert one of thousands of digits.
    top: tuple[tuple[str, Any], ...] = json.loads(
        header.decode(), object_pairs_hook=tuple, parse_int=str, parse_float=str
    )
    seen: set[str] = set()
    for name, pairs in top:
        if name in seen:
            raise FormatError("duplicate-tensor", f"{name!r} occurs twice", offset=_entry_offset(header, name))
        seen.add(name)
        fields = [key for key, _ in pairs or () if key in _FIELDS]
        if name != _METADATA and len(fields) > len(_FIELDS):
            raise FormatError(
                "duplicate-tensor", f"a field of {name!r} occurs twice", offset=_entry_offset(header, name)
            )


def _extents(file: str, header: bytes, entries: dict[str, _Entry | None], data_start: int) -> tuple[TensorExtent, ...]:
    found: list[tuple[int, int, str, str, tuple[int, ...]]] = []
    for name, entry in entries.items():
        if (
            entry is None
            or not isinstance(dtype := entry.dtype, str)
            or not isinstance(shape := entry.shape, tuple)
            or not isinstance(offsets := entry.data_offsets, tuple)
        ):
            raise FormatError(
                "header-json", f"{name!r} lacks dtype, shape or data_offsets", offset=_entry_offset(header, name)
            )
        begin, end = offsets
        bits = DTYPE_BITS.get(dtype)
        if bits is None:
            raise FormatError(
                "unknown-dtype", f"{name!r} has the unknown dtype {dtype!r}", offset=_entry_offset(header, name)
            )
        elements = element_count(shape)
        if elements is None:
            raise FormatError(
                "shape", f"{name!r} has an impossible shape {list(shape[:8])}", offset=_entry_offset(header, name)
            )
        # Compared in bits, so that a sub-byte tensor that ends within a byte fits nothing.
        if begin < 0 or (end - begin) * 8 != elements * bits:
            raise FormatError(
                "offsets",
                f"{name!r} takes {elements * bits / 8:g} bytes, its data_offsets are [{begin}, {end})",
                offset=_entry_offset(header, name),
            )
        found.append((begin, end, name, dtype, shape))
    found.sort()
    tensors: list[TensorExtent] = []
    expected = 0
    for begin, end, name, dtype, shape in found:
        if begin < expected:
            raise FormatError(
                "tensor-overlap",
                f"{name!r} begins {expected - begin} bytes before the tensor before it ends",
                offset=data_start + begin,
            )
        if begin > expected:
            raise FormatError(
                "tensor-gap",
                f"{begin - expected} bytes before {name!r} belong to no tensor",
                offset=data_start + expected,
            )
        expected = end
        role, layer = classify(name)
        tensors.append(TensorExtent(name, dtype, shape, file, data_start + begin, end - begin, layer, role))
    return tuple(tensors)


def _broke_at(error: Exception, length: int) -> int:
    """Tells where in the header decoding failed, which msgspec says in its message, if at all."""
    if at := _BYTE.search(str(error)):
        return int(at[1])
    # Sound JSON of another form has no position; what remains is JSON that ends too early, or an escape that does.
    return length if type(error) is msgspec.DecodeError else 0


def _entry_offset(header: bytes, name: str) -> int:
    """Finds an entry by its name as writers spell it; the header's start if it is spelled with other escapes."""
    return _LENGTH_BYTES + max(header.find(msgspec.json.encode(name)), 0)


def _too_many() -> FormatError:
    return FormatError("too-many-tensors", f"more than {MAX_TENSORS} tensors", offset=_LENGTH_BYTES)
