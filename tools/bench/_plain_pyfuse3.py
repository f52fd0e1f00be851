"""The comparison for `portable.py`: one file, served the way the pyfuse3 manual does it. Nothing of weightfs.

    python _plain_pyfuse3.py FILE MOUNTPOINT        serves until it is unmounted

Default options, and one `read` handler that calls `os.pread`.
"""

from __future__ import annotations

import errno
import os
import sys

import pyfuse3
import trio

_FILE = pyfuse3.InodeT(2)


class Plain(pyfuse3.Operations):
    """A folder with one file in it."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._name = os.fsencode(os.path.basename(path))
        self._fd = os.open(path, os.O_RDONLY)
        self._folder_fd = os.open(os.path.dirname(path), os.O_RDONLY)

    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        if inode not in (pyfuse3.ROOT_INODE, _FILE):
            raise pyfuse3.FUSEError(errno.ENOENT)
        found = os.fstat(self._fd if inode == _FILE else self._folder_fd)
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = pyfuse3.ModeT(found.st_mode)
        entry.st_nlink = found.st_nlink
        entry.st_size = found.st_size
        entry.st_blocks = found.st_blocks
        entry.st_mtime_ns = found.st_mtime_ns
        entry.st_ctime_ns = found.st_ctime_ns
        return entry

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        if name != self._name:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(_FILE, ctx)

    async def open(self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(self._fd))

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        return os.pread(fh, size, off)


def main() -> None:
    """Serve."""
    path, mountpoint = sys.argv[1:]
    pyfuse3.init(Plain(path), mountpoint)
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close()


if __name__ == "__main__":
    main()
