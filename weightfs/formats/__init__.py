"""Headers of weight files, and what follows from names: pure, synchronous, no I/O but the `ReadAt` it is given.

Importing this takes milliseconds: the `gguf` package, which brings NumPy and requests (100 ms), is imported by the
first GGUF header only.
"""

from __future__ import annotations

from weightfs.formats.gguf import parse_gguf
from weightfs.formats.layout import ByteOrder, ReadAt, Role, TensorExtent, WeightLayout
from weightfs.formats.names import encode_name
from weightfs.formats.npy import npy_header
from weightfs.formats.roles import classify
from weightfs.formats.safetensors import parse_safetensors
from weightfs.formats.shards import check_shards, format_of, group_shards, merge_shards, parse_weight_map

__all__ = [
    "ByteOrder",
    "ReadAt",
    "Role",
    "TensorExtent",
    "WeightLayout",
    "check_shards",
    "classify",
    "encode_name",
    "format_of",
    "group_shards",
    "merge_shards",
    "npy_header",
    "parse_header",
    "parse_weight_map",
]

_PARSERS = {"safetensors": parse_safetensors, "gguf": parse_gguf}


def parse_header(file: str, size: int, read: ReadAt) -> WeightLayout:
    """Reads and validates the header of one weight file.

    Args:
        file: the file's name within its folder; its suffix decides the format.
        size: the file's length in bytes.
        read: reads the file; only the header is read, in pieces of at most 100 MB.

    Returns:
        Its tensors by offset: each lies within the file, and none overlaps another.

    Raises:
        FormatError: the header does not describe the file; the reasons are listed in `weightfs.formats.safetensors` and
            `weightfs.formats.gguf`.
        ShortReadError: from `read`, as is anything else that it raises.
        ValueError: the suffix is none that `format_of` knows.
    """
    kind = format_of(file)
    if kind is None:
        raise ValueError(f"not a weight file: {file!r}")
    return _PARSERS[kind](file, size, read)
