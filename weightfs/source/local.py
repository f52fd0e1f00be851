"""A folder of this machine as the source.

Every path is resolved by openat2(2) with RESOLVE_BENEATH and RESOLVE_NO_SYMLINKS below one root descriptor: nothing
that is renamed, linked or mounted over meanwhile leads out of the root.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import threading
from typing import Final

from weightfs import linux
from weightfs.errors import ForbiddenError, UnfitError, UnsupportedError, UsageError
from weightfs.source.base import SourceStat, WouldBlockError

_BENEATH: Final = linux.RESOLVE_BENEATH | linux.RESOLVE_NO_SYMLINKS | linux.RESOLVE_NO_MAGICLINKS
_NS: Final = 1_000_000_000
_PATH_ONLY: Final = os.O_PATH | os.O_NOFOLLOW

# Filesystems whose cached entries can be stat-ed without waiting for anything but memory. Others (NFS, CIFS, FUSE)
# revalidate against a server, so they always go to a thread.
_NEVER_WAITS: Final = frozenset({
    0xEF53,  # ext2, ext3, ext4
    0x58465342,  # XFS
    0x9123683E,  # btrfs
    0xF2F52010,  # F2FS
    0x01021994,  # tmpfs
})  # fmt: skip


def _filesystem_type(fd: int) -> int:
    buffer = linux.statfs_raw(fd)
    return int(struct.unpack_from("<q", buffer)[0])


def tells_of_changes(fd: int) -> bool:
    """Whether whatever changes the folder behind a descriptor goes through this machine's kernel, which can tell."""
    return _filesystem_type(fd) in _NEVER_WAITS


class LocalSource:
    """A folder. Thread-safe; owns one descriptor until `close`."""

    def __init__(self, root: str, *, descriptor: int | None = None) -> None:
        """Open `root`, symlinks in the path to it resolved once, here.

        With a `descriptor` that folder is the root whatever lies at its path now (a mount, possibly ours, which must
        not be touched); it is owned from here on, and `root` is resolved already.

        Raises:
            UsageError: there is no such folder.
            UnfitError: the kernel has no openat2 (Linux 5.6).
        """
        self.name = root if descriptor is not None else os.path.realpath(root)
        try:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
            self._root = os.open(self.name, flags) if descriptor is None else descriptor
        except OSError as e:
            raise UsageError(
                f"can't serve it: {os.strerror(e.errno or 0)}", path=root, mend="name an existing folder"
            ) from e
        try:
            os.close(linux.openat2(self._root, b".", _PATH_ONLY, _BENEATH))
        except OSError as e:
            os.close(self._root)
            raise UnfitError(f"openat2 does not work here: {e.strerror}", mend="Linux 5.12 or later is needed") from e
        self.filesystem_type = _filesystem_type(self._root)
        self._cached_is_immediate = self.filesystem_type in _NEVER_WAITS
        self._filesystems: dict[int, bytes] = {}
        self._filesystems_lock = threading.Lock()
        self.fstat(self._root)  # names the filesystem before a symlink, which can't be asked, is the first of it

    @property
    def descriptor(self) -> int:
        """Of the root, for a process that is to inherit it."""
        return self._root

    def close(self) -> None:
        """Give the root descriptor back; descriptors from `open` stay valid."""
        os.close(self._root)

    def lstat(self, path: bytes, *, cached_only: bool = False) -> SourceStat:
        """See `Source`."""
        fd = self._resolve(path, _PATH_ONLY, cached_only)
        try:
            return self.fstat(fd)
        finally:
            os.close(fd)

    def names(self, path: bytes) -> list[bytes]:
        """See `Source`."""
        fd = self._resolve(path, os.O_RDONLY | os.O_DIRECTORY, False)
        try:
            return [os.fsencode(name) for name in os.listdir(fd)]
        finally:
            os.close(fd)

    def entries(self, path: bytes) -> list[tuple[bytes, SourceStat]]:
        """See `Source`."""
        fd = self._resolve(path, os.O_RDONLY | os.O_DIRECTORY, False)
        found = []
        try:
            for name in os.listdir(fd):
                raw = os.fsencode(name)
                try:
                    # One component of a folder that is open already: nothing to resolve, nothing to escape through.
                    found.append((raw, self._stat(fd, raw)))
                except FileNotFoundError:
                    continue
        finally:
            os.close(fd)
        return found

    def open(self, path: bytes, *, cached_only: bool = False) -> tuple[int, SourceStat]:
        """See `Source`."""
        fd = self._resolve(path, _PATH_ONLY, cached_only)
        try:
            entry = self.fstat(fd)
            if not entry.is_file:
                raise UnsupportedError(f"is {_kind(entry.mode)}, not a regular file", path=os.fsdecode(path))
            # Through the descriptor just examined, so that a device can't take the file's place in between.
            return self._reopen(fd, cached_only), entry
        finally:
            os.close(fd)

    def folder(self, path: bytes, *, listing: bool = False, cached_only: bool = False) -> int:
        """A descriptor of a directory, for `child` and, with `listing`, for `os.listdir`; the caller owns it.

        Raises:
            WouldBlockError: see `Source`.
        """
        return self._resolve(path, (os.O_RDONLY if listing else os.O_PATH) | os.O_DIRECTORY, cached_only)

    def child(self, folder_fd: int, name: bytes, *, cached_only: bool = False) -> int:
        """An O_PATH descriptor of an entry of an open folder, a symlink not followed; the caller owns it.

        Raises:
            WouldBlockError: see `Source`.
        """
        return self._openat(folder_fd, name, _PATH_ONLY, cached_only)

    def stat_at(self, folder_fd: int, name: bytes) -> SourceStat:
        """An entry of an open folder. One component: nothing to resolve, nothing to escape through."""
        return self._stat(folder_fd, name)

    def fstat(self, fd: int) -> SourceStat:
        """See `Source`."""
        return self._stat(fd, b"")

    def _stat(self, fd: int, name: bytes) -> SourceStat:
        x = linux.statx(fd, name)
        device = os.makedev(x.device_major, x.device_minor)
        return SourceStat(
            filesystem=self._filesystems.get(device) or self._identify(device, x.mode, fd, name),
            inode=x.inode,
            btime_ns=x.btime_s * _NS + x.btime_ns,
            mode=x.mode,
            nlink=x.nlink,
            uid=x.uid,
            gid=x.gid,
            size=x.size,
            blocks=x.blocks,
            block_bytes=x.block_bytes,
            rdev=os.makedev(x.rdev_major, x.rdev_minor),
            atime_ns=x.atime_s * _NS + x.atime_ns,
            mtime_ns=x.mtime_s * _NS + x.mtime_ns,
            ctime_ns=x.ctime_s * _NS + x.ctime_ns,
        )

    def readlink(self, path: bytes) -> bytes:
        """See `Source`. An absolute target inside the source comes back relative, so that it stays on the mount."""
        fd = self._resolve(path, _PATH_ONLY, False)
        try:
            target = os.readlink(b"", dir_fd=fd)
        except FileNotFoundError:  # what readlinkat says of a descriptor of anything else
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path) from None
        finally:
            os.close(fd)
        root = os.fsencode(self.name)
        folder = os.path.join(root, os.path.dirname(path))
        landing = os.path.realpath(os.path.join(folder, target))  # as the kernel would: `..` after symlinks in between
        if landing != root and not landing.startswith(root.rstrip(b"/") + b"/"):
            raise ForbiddenError(f"symlink leads out of the source, to {os.fsdecode(target)}", path=os.fsdecode(path))
        return os.path.relpath(landing, folder) if _leaves_root(path, target) else target

    def follow(self, path: bytes) -> bytes | None:
        """See `Source`."""
        root = os.fsencode(self.name)
        try:
            landing = os.path.realpath(os.path.join(root, path), strict=True)
        except OSError:
            return None
        if landing == root:
            return b""
        prefix = root.rstrip(b"/") + b"/"
        return landing[len(prefix) :] if landing.startswith(prefix) else None

    def getxattr(self, path: bytes, name: bytes) -> bytes:
        """See `Source`."""
        fd = self._resolve(path, _PATH_ONLY, False)
        try:
            # O_PATH descriptors refuse fgetxattr; /proc leads to the very inode, a symlink itself excepted.
            return os.getxattr(f"/proc/self/fd/{fd}", name)
        finally:
            os.close(fd)

    def listxattr(self, path: bytes) -> list[bytes]:
        """See `Source`."""
        fd = self._resolve(path, _PATH_ONLY, False)
        try:
            return [os.fsencode(name) for name in os.listxattr(f"/proc/self/fd/{fd}")]
        finally:
            os.close(fd)

    def statvfs(self) -> os.statvfs_result:
        """See `Source`."""
        return os.fstatvfs(self._root)

    def _reopen(self, fd: int, cached_only: bool) -> int:
        path = f"/proc/self/fd/{fd}"
        if not cached_only:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except BlockingIOError:  # somebody holds a lease on the file, which may take 45 s to break
            raise WouldBlockError from None

    def _resolve(self, path: bytes, flags: int, cached_only: bool) -> int:
        return self._openat(self._root, path or b".", flags, cached_only)

    def _openat(self, folder_fd: int, path: bytes, flags: int, cached_only: bool) -> int:
        if not cached_only:
            return linux.openat2(folder_fd, path, flags, _BENEATH)
        if not self._cached_is_immediate:
            raise WouldBlockError
        try:
            return linux.openat2(folder_fd, path, flags, _BENEATH | linux.RESOLVE_CACHED)
        except OSError as e:
            if e.errno == errno.EAGAIN:
                raise WouldBlockError from None
            raise

    def _identify(self, device: int, mode: int, fd: int, name: bytes) -> bytes:
        """Name the filesystem behind `device` in a way that survives a reboot, as far as it has such a name."""
        by_number = struct.pack("<Q", device)
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            return by_number  # opening a FIFO or device to ask would do something
        found = _filesystem_name(fd, name) or by_number
        with self._filesystems_lock:
            return self._filesystems.setdefault(device, found)


def _leaves_root(path: bytes, target: bytes) -> bool:
    """Whether a symlink's target leads above the root on its way, to which the mount has nothing above."""
    if target.startswith(b"/"):
        return True
    depth = path.count(b"/")
    for name in target.split(b"/"):
        depth += {b"..": -1, b".": 0, b"": 0}.get(name, 1)
        if depth < 0:
            return True
    return False


def _filesystem_name(fd: int, name: bytes) -> bytes | None:
    """The UUID, else f_fsid (made from the UUID by ext4 and XFS); None where both are unset."""
    place = os.path.join(b"/proc/self/fd/%d" % fd, name) if name else b"/proc/self/fd/%d" % fd
    try:
        readable = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        uuid = linux.filesystem_uuid(readable)
        if uuid and any(uuid):
            return uuid
        fsid = linux.statfs_raw(readable)[56:64]
        return fsid if any(fsid) else None
    finally:
        os.close(readable)


def _kind(mode: int) -> str:
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a directory", stat.S_IFLNK: "a symlink"}
    return kinds.get(stat.S_IFMT(mode), "a device")
