"""Inode numbers, given out once. Not thread-safe: under the lock of the index.

They are reserved on disk in blocks before any of a block is given out: a crash skips numbers and never repeats one.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

import msgspec

from weightfs.index.files import IndexFiles
from weightfs.index.opening import Transaction, read_meta, write_meta
from weightfs.index.schema import SERIALS, inode_number, new_epoch
from weightfs.index.seals import seal, unseal

_BLOCK: Final = 1 << 16  # numbers reserved by one small commit
_FIRST_SERIAL: Final = 2
"""0 is no inode and 1 the root, whose number every FUSE mount fixes."""


class NumberKeeper(Protocol):
    """Where the numbers still to be given out are noted. Outlives the process."""

    def numbers(self) -> tuple[int, int, int]:
        """Epoch, next serial, end of the reserved block; zeros when there are none."""

    def note_numbers(self, epoch: int, following: int, reserved: int) -> None:
        """Serials from `following` to `reserved`, exclusive, are still to be given out."""


class Numbers:
    """The block of numbers that this process gives out.

    Attributes:
        epoch: high bits of the numbers it gives out.
    """

    def __init__(self, files: IndexFiles, keeper: NumberKeeper | None) -> None:
        """`keeper`: what a predecessor left of its block, and where this process leaves its own in turn."""
        self._files = files
        self._keeper = keeper
        self._next, self._reserved = 0, 0
        self.epoch = 0

    def has(self, count: int) -> bool:
        """Whether a run of `count` is left of the block."""
        return self._next + count <= self._reserved

    def take(self, count: int) -> int:
        """Give out a run that the block has; gives its first."""
        first = inode_number(self.epoch, self._next)
        self._next += count
        self.note()
        return first

    def note(self) -> None:
        """Tell the keeper what is left."""
        if self._keeper is not None:
            self._keeper.note_numbers(self.epoch, self._next, self._reserved)

    def take_over(self, epoch: int) -> bool:
        """Go on under an epoch: where the predecessor's block was left, if it was of this epoch; else False."""
        self.epoch = epoch
        before, following, reserved = self._keeper.numbers() if self._keeper is not None else (0, 0, 0)
        if before != epoch:
            return False
        self._next, self._reserved = following, reserved
        return True

    def reserve(self, txn: Transaction, room: Any, count: int) -> None:
        """Begin a block that has at least `count`; `room` is `meta`, and `txn` writes."""
        raw = txn.get(b"next", db=room)
        start = int.from_bytes(unseal(b"meta", b"next", bytes(raw)), "big") if raw is not None else _FIRST_SERIAL
        size = max(_BLOCK, count)
        # Read each time: another daemon that shares the index may have begun an epoch.
        meta = read_meta(txn, room)
        assert meta is not None, "written when the index was made"
        if start + size > SERIALS:
            # Records hold whole numbers, so those of past epochs stay what they are.
            meta = msgspec.structs.replace(meta, epoch=new_epoch(max(meta.epoch, self._files.last_epoch())))
            write_meta(txn, room, meta)
            start = _FIRST_SERIAL
        self.epoch = meta.epoch
        self._files.note_epoch(self.epoch)
        txn.put(b"next", seal(b"meta", b"next", (start + size).to_bytes(8, "big")), db=room)
        self._next, self._reserved = start, start + size

    def give_up(self) -> None:
        """Nothing on disk says that this block is taken: none of it must be given out."""
        self._next = self._reserved = 0
