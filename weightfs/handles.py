"""Which inodes are open, and what their bytes are read from. Pure bookkeeping, shared by channel and filesystem.

A handle is the `unique` number of the OPEN request that made it: it means nothing to any process, so a request that
the kernel sends again to a successor changes nothing. An inode's handles are a set; what serves them (a descriptor, a
backing id) exists once per inode and ends with the last handle. The kernel demands the same: a second backing id, or
a cached open beside a passthrough one, makes its opens fail with EIO.

What a successor must know of it is told to a `Keeper` before the kernel is.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol


class Place(NamedTuple):
    """`nbytes` bytes from `offset` on of an open file: all there at this moment."""

    fd: int
    offset: int
    nbytes: int


class Readable(Protocol):
    """Bytes that READ requests are answered from. Blocking, thread-safe.

    Attributes:
        fd: the descriptor it reads, which it owns; None where there is none.
        promise: size and mtime (ns) of a whole file at its first open; zeros for anything else.
    """

    @property
    def fd(self) -> int | None:
        """See the class."""

    @property
    def promise(self) -> tuple[int, int]:
        """See the class."""

    def in_page_cache(self, offset: int, nbytes: int) -> Place | None:
        """Where the kernel may take such a range by itself, cut at the file's end; None where it must be copied."""

    def read_into(self, handle: int, buffer: memoryview, offset: int) -> int:
        """Fill `buffer` from `offset` on; gives the bytes filled, fewer than asked only at the end of the file.

        Raises:
            ShortReadError: the source gave less than it promised.
            StaleError: the source has changed since the file was opened.
            OSError: the source failed.
        """

    def forget(self, handle: int) -> None:
        """That handle will not read again."""

    def close(self) -> None:
        """No handle will read again."""


class Keeper(Protocol):
    """Keeps what must outlive this process. All calls return at once."""

    def hold(self, inode: int, fd: int) -> None:
        """An inode is read from this descriptor, which stays the caller's."""

    def settle(self, inode: int, backing_id: int | None, promise: tuple[int, int]) -> bool:
        """It is open, and this is how it is served; False when there is no room to note it."""

    def answer(self, inode: int, handle: int) -> bool:
        """The kernel is about to get this handle; False when there is no room to note it."""

    def release(self, inode: int, handle: int) -> None:
        """The kernel has it no more."""

    def end(self, inode: int) -> None:
        """The inode is open no more."""


class OpenInode:
    """What serves the handles of one inode.

    Attributes:
        kept: what a predecessor left: a descriptor of the very file, owned until a readable takes its place, and the
            promise it had made; None where nothing was left, or it is taken.
        readable: None until the OPEN handler has attached it.
        backing_fd: the whole file's descriptor, if the kernel may read it directly; owned by `readable`.
        backing_id: the kernel's number for it, None on the READ path.
        settled: whether the first OPEN has been answered: from then on the way of serving stays as it is.
    """

    __slots__ = ("backing_fd", "backing_id", "handles", "kept", "readable", "settled")

    def __init__(self) -> None:
        self.handles: set[int] = set()
        self.kept: tuple[int, tuple[int, int]] | None = None
        self.readable: Readable | None = None
        self.backing_fd: int | None = None
        self.backing_id: int | None = None
        self.settled = False


class HandleTable:
    """Open inodes by number. Thread-safe.

    Args:
        closing: called with each inode whose last handle is gone, before its readable is closed.
        keeper: is told what a successor must know; None where there will be none.
    """

    def __init__(self, closing: Callable[[OpenInode], None] = lambda _: None, keeper: Keeper | None = None) -> None:
        self._inodes: dict[int, OpenInode] = {}
        self._lock = threading.Lock()
        self._keeper = keeper
        self.closing = closing

    def add(self, inode: int, handle: int) -> None:
        """An OPEN of `inode` has arrived; adding a handle twice changes nothing."""
        with self._lock:
            self._inodes.setdefault(inode, OpenInode()).handles.add(handle)

    def attach(self, inode: int, make: Callable[[], tuple[Readable, int | None]]) -> bool:
        """Give an open inode its readable and backing descriptor, unless it has them.

        Returns:
            False when every OPEN of it was given up meanwhile; nothing was made then.
        """
        with self._lock:
            entry = self._inodes.get(inode)
            if entry is None:
                return False
            if entry.readable is None:
                readable, entry.backing_fd = make()
                if self._keeper is not None and readable.fd is not None:
                    self._keeper.hold(inode, readable.fd)
                if entry.kept is not None:
                    os.close(entry.kept[0])
                    entry.kept = None
                entry.readable = readable
            return True

    def adopt(
        self, inode: int, handles: set[int], fd: int | None, backing_id: int | None, promise: tuple[int, int]
    ) -> None:
        """Take over an open inode from a predecessor, its descriptor included."""
        entry = OpenInode()
        entry.handles |= handles
        entry.kept = (fd, promise) if fd is not None else None
        entry.backing_id = backing_id
        entry.settled = True
        with self._lock:
            self._inodes[inode] = entry

    def settle(self, inode: int, entry: OpenInode) -> bool:
        """The first OPEN of an inode is about to be answered: from now on it is served as it is; False: it can't be."""
        if not entry.settled and self._keeper is not None and entry.readable is not None:
            entry.settled = self._keeper.settle(inode, entry.backing_id, entry.readable.promise)
        else:
            entry.settled = True
        return entry.settled

    def answer(self, inode: int, handle: int) -> bool:
        """The kernel is about to get a handle; False when it must not."""
        return self._keeper is None or self._keeper.answer(inode, handle)

    def get(self, inode: int) -> OpenInode | None:
        """The open inode, or None."""
        return self._inodes.get(inode)

    def discard(self, inode: int, handle: int) -> None:
        """A handle is released, or its OPEN failed; discarding one that is not there changes nothing."""
        with self._lock:
            entry = self._inodes.get(inode)
            if entry is None:
                return
            entry.handles.discard(handle)
            last = not entry.handles
            if last:
                del self._inodes[inode]
        if self._keeper is not None:
            self._keeper.release(inode, handle)
        if entry.readable is not None:
            entry.readable.forget(handle)
        if last:
            self._end(entry)
            if self._keeper is not None:
                self._keeper.end(inode)

    def close(self) -> None:
        """Give everything up."""
        with self._lock:
            entries = list(self._inodes.values())
            self._inodes.clear()
        for entry in entries:
            self._end(entry)

    def _end(self, entry: OpenInode) -> None:
        self.closing(entry)
        if entry.readable is not None:
            entry.readable.close()
        if entry.kept is not None:
            os.close(entry.kept[0])

    def __len__(self) -> int:
        return len(self._inodes)

    def __iter__(self) -> Iterator[int]:
        return iter(list(self._inodes))
