"""Files that the kernel has open: what serves them, what they are now, what the kernel has cached of them."""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from weightfs.handles import HandleTable, Readable
from weightfs.readables import WholeFile
from weightfs.source.base import Source, SourceStat

_MOST_CACHED: Final = 1 << 16


class OpenFiles:
    """The open files of one mount. Runs on one thread, except `changed`."""

    def __init__(self, source: Source, handles: HandleTable) -> None:
        self._source = source
        self._handles = handles
        self._cached_identity: OrderedDict[int, bytes] = OrderedDict()

    def serve(self, inode: int, fd: int, make: Callable[[], tuple[Readable, int | None]]) -> bool:
        """Attach what `make` gives to an inode, unless it has something already or no handle any more.

        `fd` becomes the property of what `make` makes of it, and is closed where that is not wanted; gives whether it
        was.
        """
        made = []

        def once() -> tuple[Readable, int | None]:
            made.append(True)
            return make()

        self._handles.attach(inode, once)
        if not made:  # open already, or given up meanwhile
            os.close(fd)
        return bool(made)

    def renew(self, inode: int, promise: tuple[int, int]) -> None:
        """An inode that is open already was opened anew, and found to have this size and mtime."""
        opened = self._handles.get(inode)
        if opened is not None and isinstance(opened.readable, WholeFile):
            opened.readable.renew(promise)

    def stat(self, inode: int) -> SourceStat | None:
        """What an open inode's file is now, whatever its name means; None where it is not open or has no file."""
        opened = self._handles.get(inode)
        if opened is None:
            return None
        readable = opened.readable
        fd = opened.kept[0] if opened.kept else readable.fd if readable is not None else None
        return self._source.fstat(fd) if fd is not None else None

    def is_cached(self, inode: int, identity: bytes) -> bool:
        """Whether what the kernel cached of an inode, at its last open, was of this identity; notes it."""
        same = self._cached_identity.get(inode) == identity
        self._cached_identity[inode] = identity
        self._cached_identity.move_to_end(inode)
        if len(self._cached_identity) > _MOST_CACHED:
            self._cached_identity.popitem(last=False)
        return same

    def changed(self) -> list[str]:
        """Open files that were written to in place since they were opened. Callable from any thread."""
        found = set()
        for inode in self._handles:
            entry = self._handles.get(inode)
            file = entry.readable if entry is not None else None
            if not isinstance(file, WholeFile):
                continue
            with contextlib.suppress(OSError):  # closed meanwhile
                if file.has_changed() and self._handles.get(inode) is entry:  # else its descriptor may be another's
                    found.add(os.fsdecode(file.path))
        return sorted(found)
