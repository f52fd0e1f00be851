"""What the filesystem asks of the place the bytes come from."""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from typing import Protocol

import msgspec

_KEY = struct.Struct("<QQ")
_IDENTITY = struct.Struct("<QQQQQ")


class SourceStat(msgspec.Struct, frozen=True):
    """One entry of a source, not following symlinks.

    Attributes:
        filesystem: identifies the filesystem across reboots (`st_dev` does not).
        inode: number within that filesystem.
        btime_ns: birth time; 0 where unknown.
        mode, nlink, uid, gid, size, blocks, block_bytes, rdev, atime_ns, mtime_ns, ctime_ns: as in stat(2),
            `blocks` in units of 512 bytes.
    """

    filesystem: bytes
    inode: int
    btime_ns: int
    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    blocks: int
    block_bytes: int
    rdev: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int

    @property
    def inode_key(self) -> bytes:
        """16 bytes that stay the same through chmod, link, chown, rename and in-place writes."""
        packed = _KEY.pack(self.inode, self.btime_ns)
        return hashlib.blake2b(packed, digest_size=16, key=self.filesystem).digest()

    @property
    def identity(self) -> bytes:
        """16 bytes that change whenever the content may have changed."""
        packed = _IDENTITY.pack(self.inode, self.btime_ns, self.size, self.mtime_ns, self.ctime_ns)
        return hashlib.blake2b(packed, digest_size=16, key=self.filesystem).digest()

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file."""
        return stat.S_ISREG(self.mode)

    @property
    def is_symlink(self) -> bool:
        """Whether it is a symbolic link."""
        return stat.S_ISLNK(self.mode)


class Sight(msgspec.Struct, frozen=True):
    """An entry of a folder, examined, and what says later whether it may still be believed: see `weightfs.beliefs`.

    Attributes:
        token: number of the last batch of changes before the examination.
        folder: key of the folder that was examined; None where that is not watched.
        entry: what was found.
    """

    token: int
    folder: bytes | None
    entry: SourceStat


class WouldBlockError(Exception):
    """`cached_only` was asked for, and no cache holds the answer: ask again where waiting is allowed."""


class Source(Protocol):
    """A tree of files. Paths are bytes relative to the root, `b""` is the root itself; none leads out of it.

    All calls block and may be made from any thread. With `cached_only` a call raises WouldBlockError instead of
    waiting for a device; a source that can't promise that always raises it. Absence is FileNotFoundError.
    """

    @property
    def name(self) -> str:
        """What /proc/mounts shows as the source."""

    def lstat(self, path: bytes, *, cached_only: bool = False) -> SourceStat:
        """One entry."""

    def names(self, path: bytes) -> list[bytes]:
        """The names in a directory, without `.` and `..`."""

    def entries(self, path: bytes) -> list[tuple[bytes, SourceStat]]:
        """The entries of a directory, without `.` and `..`; one that vanishes meanwhile is left out."""

    def open(self, path: bytes, *, cached_only: bool = False) -> tuple[int, SourceStat]:
        """A read-only descriptor of a regular file, and what it is now; the caller owns it.

        Raises:
            UnsupportedError: it is no regular file.
        """

    def fstat(self, fd: int) -> SourceStat:
        """What an open descriptor is now, its name gone or not."""

    def readlink(self, path: bytes) -> bytes:
        """The target of a symlink.

        Raises:
            ForbiddenError: it leads out of the source.
        """

    def follow(self, path: bytes) -> bytes | None:
        """`path` with every symlink resolved, if that exists and lies in the source, else None."""

    def getxattr(self, path: bytes, name: bytes) -> bytes:
        """One extended attribute; OSError ENODATA when there is none."""

    def listxattr(self, path: bytes) -> list[bytes]:
        """Names of the extended attributes."""

    def statvfs(self) -> os.statvfs_result:
        """Space and limits of the filesystem underneath."""
