"""Tells supervisor and ledger what a successor must know of the files that are open, and takes it over from them."""

from __future__ import annotations

import os

from weightfs.handles import HandleTable
from weightfs.ledger import Ledger, OpenRow
from weightfs.link import Link


class SupervisedKeeper:
    """A `Keeper`. Runs on one thread."""

    def __init__(self, ledger: Ledger, link: Link) -> None:
        self._ledger = ledger
        self._link = link

    def hold(self, inode: int, fd: int) -> None:
        """See `Keeper`: in flight is as good as held, since a socket outlives its sender."""
        self._link.hold(inode, fd)

    def settle(self, inode: int, backing_id: int | None, promise: tuple[int, int]) -> bool:
        """See `Keeper`."""
        return self._ledger.put_inode(OpenRow(inode, backing_id or 0, *promise))

    def answer(self, inode: int, handle: int) -> bool:
        """See `Keeper`."""
        return self._ledger.add_handle(inode, handle)

    def release(self, inode: int, handle: int) -> None:
        """See `Keeper`."""
        self._ledger.discard_handle(inode, handle)

    def end(self, inode: int) -> None:
        """See `Keeper`."""
        self._ledger.discard_inode(inode)
        self._link.drop(inode)


def adopt(handles: HandleTable, ledger: Ledger, keeper: SupervisedKeeper, held: dict[int, int]) -> list[int]:
    """Fill an empty handle table with what a predecessor had open; `held` are its descriptors, by inode.

    Returns:
        The backing ids of inodes that have no handle any more, for the channel to close: their daemon died between the
        two.
    """
    orphans = []
    open_now = ledger.handles()
    for row in ledger.inodes():
        fd = held.pop(row.inode, None)
        if row.inode in open_now:
            handles.adopt(row.inode, open_now[row.inode], fd, row.backing_id or None, (row.size, row.mtime_ns))
            continue
        if row.backing_id:
            orphans.append(row.backing_id)
        if fd is not None:
            os.close(fd)
        keeper.end(row.inode)
    for inode, fd in held.items():  # opened, and never answered: the OPEN comes again
        os.close(fd)
        keeper.end(inode)
    return orphans
