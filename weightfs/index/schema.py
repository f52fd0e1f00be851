"""What the index holds, and the numbers it gives out. Pure.

An inode number is `epoch << 32 | serial`: 31 bits of epoch, 32 bits of serial. The epoch is the second in which an
index was made, counted from 2026 and always larger than its predecessor's, so that a number means one thing for ever.
Serials are given out once and never again; when an epoch has none left, which a library of a million tensors that is
replaced ten times a day reaches in seven months, the index goes on under a new one.

Entries of the source (files, folders, symlinks) take one serial each. Views take none of their own: a parsed file
reserves a run of `2 * n` serials, and its tensor `i` is `base + 2 * i` as `.tensors/` file and `base + 2 * i + 1` as
`.npy/` file. A million tensors therefore cost ten thousand records, and a nodeid leads back to its tensor by one
ordered look-up. A run belongs to one *identity* of the file: changed content has other numbers.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from weightfs.formats.layout import Role, TensorExtent, WeightLayout

SCHEMA: Final = 1
MIGRATIONS: Final[Mapping[int, Callable[[bytes, bytes], bytes]]] = {}
"""By schema: from a room's name and a record's encoding to that of the next schema. A step is added with each new
schema, so that a version takes over from the one before it without any number changing its meaning."""
ROOMS: Final = (b"meta", b"keys", b"entries", b"files", b"bases", b"history")
"""`meta`: Meta and the next serial. `keys`: inode key -> number. `entries`: number -> EntryRecord. `files`: identity
and format -> FileRecord. `bases`: first number of a run of views -> identity, path, name. `history`: see
`history.py`."""
SPARE: Final = frozenset({b"history"})
"""Rooms that an index of this schema may lack, since it was made before them, and whose damage condemns nothing else: a
version that does not know them opens the index and leaves them alone."""
ROOT_INODE: Final = 1
IDENTITY_BYTES: Final = 16
_SERIAL_BITS: Final = 32
SERIALS: Final = 1 << _SERIAL_BITS
_EPOCH_ZERO: Final = 1767225600  # 2026-01-01T00:00:00Z


def new_epoch(after: int = 0) -> int:
    """An epoch larger than `after` and than any index made before this second."""
    return max(after + 1, int(time.time()) - _EPOCH_ZERO, 1)


def inode_number(epoch: int, serial: int) -> int:
    """The number for one serial of one epoch."""
    return epoch << _SERIAL_BITS | serial


def epoch_of(inode: int) -> int:
    """The epoch a number was given out in; 0 for the root."""
    return inode >> _SERIAL_BITS


def serial_of(inode: int) -> int:
    """The inverse of `inode_number`, epoch dropped."""
    return inode & ((1 << _SERIAL_BITS) - 1)


class Kind(enum.IntEnum):
    """What an inode number stands for."""

    SOURCE = 0
    VIEW_ROOT = 1
    VIEW_SET = 2
    STATE = 3


class Meta(msgspec.Struct, frozen=True):
    """Whose index it is.

    Attributes:
        product: `weightfs`.
        schema: of the records.
        source: absolute path or URL of what it tells of.
        epoch: of the numbers it gives out.
    """

    product: str
    schema: int
    source: str
    epoch: int


class EntryRecord(msgspec.Struct, frozen=True, array_like=True):
    """How to find an inode again after the process that gave out its number is gone.

    Attributes:
        kind: see `Kind`.
        parent: inode number of the folder.
        name: within that folder.
        key: the source's inode key; empty for virtual entries.
    """

    kind: Kind
    parent: int
    name: bytes
    key: bytes


class FileRecord(msgspec.Struct, frozen=True, array_like=True):
    """One content of one weight file: what its header said, or why it said nothing usable.

    Attributes:
        base: first number of its views, 0 when there are none.
        format: `safetensors` or `gguf`.
        tensors: name, dtype, shape, offset, nbytes, layer, role of each.
        metadata: the header's text entries.
        big_endian: whether the elements are stored that way round.
        fault: reason, message and offset of the FormatError, or None.
    """

    base: int
    format: str
    tensors: list[tuple[str, str, tuple[int, ...], int, int, int | None, Role]]
    metadata: dict[str, str]
    big_endian: bool
    fault: tuple[str, str, int] | None

    @staticmethod
    def numbered(encoded: bytes, base: int) -> bytes:
        """The MessagePack form of a record without numbers, with `base` put in: 100 tensors are not decoded for it."""
        if encoded[:2] != b"\x96\x00":  # an array of six, the first of them 0
            raise ValueError("no record without numbers")
        return encoded[:1] + msgspec.msgpack.encode(base) + encoded[2:]

    def layout(self, file: str) -> WeightLayout:
        """The layout, for a file now called `file`."""
        extents = tuple(
            TensorExtent(name, dtype, shape, file, offset, nbytes, layer, role)
            for name, dtype, shape, offset, nbytes, layer, role in self.tensors
        )
        return WeightLayout(self.format, (file,), extents, self.metadata, "big" if self.big_endian else "little")

    @classmethod
    def of(cls, base: int, layout: WeightLayout) -> FileRecord:
        """The record of a parsed header."""
        tensors = [(t.name, t.dtype, t.shape, t.offset, t.nbytes, t.layer, t.role) for t in layout.tensors]
        return cls(base, layout.format, tensors, dict(layout.metadata), layout.byte_order == "big", None)
