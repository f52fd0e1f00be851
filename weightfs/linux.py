"""System calls that Python has no wrapper for, through libc. No policy here.

Every function raises OSError with the kernel's errno. Each drops the GIL while it waits (ctypes does).
Layouts and numbers are those of the kernel's uapi headers (`linux/stat.h`, `linux/openat2.h`, `linux/fs.h`).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import math
import mmap
import os
import re
import resource
import select
import struct
import threading
from typing import Final, NamedTuple, Protocol

MS_RDONLY: Final = 1
MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MNT_FORCE: Final = 1
MNT_DETACH: Final = 2

RESOLVE_NO_MAGICLINKS: Final = 0x02
RESOLVE_NO_SYMLINKS: Final = 0x04
RESOLVE_BENEATH: Final = 0x08
RESOLVE_CACHED: Final = 0x20
"""Answer from the kernel's name cache or fail with EAGAIN: never waits for a device (Linux 5.12)."""

IN_MODIFY: Final = 0x2
IN_ATTRIB: Final = 0x4
IN_CLOSE_WRITE: Final = 0x8
IN_MOVED_FROM: Final = 0x40
IN_MOVED_TO: Final = 0x80
IN_CREATE: Final = 0x100
IN_DELETE: Final = 0x200
IN_DELETE_SELF: Final = 0x400
IN_MOVE_SELF: Final = 0x800
IN_Q_OVERFLOW: Final = 0x4000
IN_IGNORED: Final = 0x8000
IN_ONLYDIR: Final = 0x1000000
IN_EXCL_UNLINK: Final = 0x4000000
INOTIFY_EVENT: Final = struct.Struct("<iIII")
"""wd, mask, cookie, length of the name behind it, which is padded with NUL."""

CAP_NET_ADMIN: Final = 12
CAP_IPC_LOCK: Final = 14
CAP_SYS_ADMIN: Final = 21
CAP_SYS_RESOURCE: Final = 24
CAP_SYS_TIME: Final = 25

OOM_SCORE: Final = -900
"""What a daemon sets for itself: everything that reads weights waits on it, so nearly anything else goes first."""
_INITIAL_USER_NAMESPACE: Final = 0xEFFFFFFD  # PROC_USER_INIT_INO of linux/proc_ns.h

_SYS_OPENAT2: Final = 437
_SYS_CACHESTAT: Final = 451
_SYS_IOPRIO_SET: Final = 30 if os.uname().machine == "aarch64" else 251
_IOPRIO_WHO_PROCESS: Final = 1
_IOPRIO_LAST: Final = 2 << 13 | 7
_IOPRIO_IDLE: Final = 3 << 13
_MAP_FAILED: Final = (1 << 64) - 1
_AT_STATX_DONT_SYNC: Final = 0x4000
_CLONE_NEWNET: Final = 0x40000000
_PR_SET_CHILD_SUBREAPER: Final = 36
_PROT_READ: Final = 1
_BALLOON_REPORTS: Final = 5
_MADV_RANDOM: Final = 1
_MADV_HUGEPAGE: Final = 14
_MADV_POPULATE_READ: Final = 22
_MAP_SHARED: Final = 1
_STATX_FLAGS: Final = 0x1000 | 0x100 | 0x800  # AT_EMPTY_PATH, AT_SYMLINK_NOFOLLOW, AT_NO_AUTOMOUNT
_STATX_BYTES: Final = 256
_STATX_INO: Final = 0x100
_STATX_BASIC_AND_BTIME: Final = 0x0FFF
_RENAME_EXCHANGE: Final = 2
_FS_IOC_GETFSUUID: Final = 0x80111500
_STATX = struct.Struct("<4xI8xIIIH2xQQQ8xqI4xqI4xqI4xqI4xIIII")

_buffers = threading.local()
_libc = ctypes.CDLL(None, use_errno=True)
_libc.statx.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p]
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
_libc.renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]
_libc.inotify_add_watch.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32]
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.setns.argtypes = [ctypes.c_int, ctypes.c_int]
_libc.prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong]
_libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_openat2 = ctypes.CDLL(None, use_errno=True).syscall
_openat2.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t]
_openat2.restype = ctypes.c_long
_cachestat = ctypes.CDLL(None, use_errno=True).syscall
_cachestat.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint]
_cachestat.restype = ctypes.c_long
_ioprio_set = ctypes.CDLL(None, use_errno=True).syscall
_ioprio_set.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_int]
_ioprio_set.restype = ctypes.c_long
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]


def _failed(path: bytes | str | None = None) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), path)


def openat2(dir_fd: int, path: bytes, flags: int, resolve: int) -> int:
    """Open `path` below `dir_fd` under the `RESOLVE_*` rules of openat2(2); the caller owns the descriptor."""
    how = struct.pack("<QQQ", flags | os.O_CLOEXEC, 0, resolve)
    fd: int = _openat2(_SYS_OPENAT2, dir_fd, path, how, len(how))
    if fd < 0:
        raise _failed(path)
    return fd


class HasFileno(Protocol):
    """What has a descriptor: a socket, a file, a link."""

    def fileno(self) -> int:
        """The descriptor."""


class Statx(NamedTuple):
    """What statx(2) says of an inode, as far as it is of use here.

    `btime_s` and `btime_ns` are 0 where the filesystem knows no birth time. Devices come as major and minor.
    """

    block_bytes: int
    nlink: int
    uid: int
    gid: int
    mode: int
    inode: int
    size: int
    blocks: int
    atime_s: int
    atime_ns: int
    btime_s: int
    btime_ns: int
    ctime_s: int
    ctime_ns: int
    mtime_s: int
    mtime_ns: int
    rdev_major: int
    rdev_minor: int
    device_major: int
    device_minor: int


def statx(dir_fd: int, name: bytes) -> Statx:
    """statx(2) of an entry of an open folder, or (empty name) of the descriptor itself; follows no symlink."""
    try:
        buffer = _buffers.statx
    except AttributeError:  # the first call of this thread
        buffer = _buffers.statx = ctypes.create_string_buffer(_STATX_BYTES)
    if _libc.statx(dir_fd, name, _STATX_FLAGS, _STATX_BASIC_AND_BTIME, buffer):
        raise _failed(name)
    return Statx._make(_STATX.unpack_from(buffer))


def known_identity(path: bytes) -> tuple[int, int]:
    """`st_dev` and `st_ino` of what a path leads to, symlinks followed, as the kernel knows them already.

    No filesystem is asked (AT_STATX_DONT_SYNC): for a link below /proc/PID/fd neither a FUSE daemon, this process
    perhaps, nor a server has to answer.
    """
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    if _libc.statx(-1, path, _AT_STATX_DONT_SYNC, _STATX_INO, buffer):
        raise _failed(path)
    found = Statx._make(_STATX.unpack_from(buffer))
    return os.makedev(found.device_major, found.device_minor), found.inode


def filesystem_uuid(fd: int) -> bytes | None:
    """The UUID of the filesystem that holds `fd` (Linux 6.9), or None where it has none to give."""
    try:
        reply = fcntl.ioctl(fd, _FS_IOC_GETFSUUID, bytes(17))
    except OSError:
        return None
    length = reply[0]
    return reply[1 : 1 + length] if length else None


def statfs_raw(fd: int) -> bytes:
    """The 120 bytes of struct statfs: `f_type` at 0, `f_fsid` at 56 (64-bit layouts)."""
    buffer = ctypes.create_string_buffer(120)
    if _libc.fstatfs(fd, buffer):
        raise _failed()
    return buffer.raw


def mount(source: str, target: str, fstype: str, flags: int, options: str) -> None:
    """mount(2)."""
    if _libc.mount(os.fsencode(source), os.fsencode(target), os.fsencode(fstype), flags, os.fsencode(options)):
        raise _failed(target)


def umount(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    if _libc.umount2(os.fsencode(target), flags):
        raise _failed(target)


def adopt_orphans(*, adopt: bool) -> None:
    """prctl(PR_SET_CHILD_SUBREAPER): descendants of this process whose parent ends become its children, or no more."""
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, adopt, 0, 0, 0):
        raise _failed()


def enter_network(fd: int) -> None:
    """setns(2): this thread is in the network namespace `fd` is open for; os.setns came with Python 3.12."""
    if _libc.setns(fd, _CLONE_NEWNET):
        raise _failed()


def has_capability(number: int) -> bool:
    """Whether this process has a capability in its effective set."""
    with open("/proc/self/status") as status:
        effective = next(line for line in status if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) >> number & 1)


def kernel_version() -> tuple[int, int]:
    """Major and minor; (0, 0) where the release says neither."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def in_initial_user_namespace() -> bool:
    """Whether capabilities of this process count for the machine, and not for a container alone."""
    return os.stat("/proc/self/ns/user").st_ino == _INITIAL_USER_NAMESPACE


def raise_file_limit() -> int:
    """Raise the soft limit on descriptors to the hard one; gives the limit that holds now."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def raise_lock_limit() -> int | None:
    """Raise the soft limit on locked memory to the hard one; gives the limit in bytes, None where none holds."""
    if has_capability(CAP_IPC_LOCK) and in_initial_user_namespace():
        return None
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
    return None if hard == resource.RLIM_INFINITY else hard


def locked_bytes() -> int:
    """How much memory this process has locked, in whole pages: what its limit is held against."""
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmLck:")).split()[1]) << 10


def map_shared(fd: int, offset: int, nbytes: int) -> int:
    """mmap(2) of a file, shared and to be read only; gives the address, which `unmap` takes back.

    Whoever touches it where the file has ended is killed by SIGBUS: it is for `lock`, which fails there instead.

    Args:
        fd: may be closed afterwards.
        offset: a multiple of the page size.
        nbytes: more than 0; may reach beyond the file's end.
    """
    address: int | None = _libc.mmap(None, nbytes, _PROT_READ, _MAP_SHARED, fd, offset)
    if address is None or address == ctypes.c_void_p(-1).value:
        raise _failed()
    return address


def unmap(address: int, nbytes: int) -> None:
    """munmap(2); what was locked of it is no longer."""
    if _libc.munmap(address, nbytes):
        raise _failed()


def lock(address: int, nbytes: int) -> None:
    """mlock(2): read it in and keep it in memory; waits for the device.

    ENOMEM is a limit that does not suffice, or a file that has ended; EAGAIN or EPERM that it may not be locked.
    """
    if _libc.mlock(address, nbytes):
        raise _failed()


def huge_page_bytes() -> int | None:
    """How much memory one entry of a page's table maps, None where the kernel was built without."""
    try:
        with open("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size") as setting:
            return int(setting.read())
    except OSError:
        return None


def reports_free_pages(drivers: str = "/sys/bus/virtio/drivers") -> bool:
    """Whether a hypervisor takes back free memory in blocks as large as huge pages.

    A huge page is then memory that the host has to find again, page by page, for the device and for whoever reads it.
    Source: the feature VIRTIO_BALLOON_F_REPORTING of the Virtio specification, 5.5.3.
    """
    try:
        balloons = os.listdir(f"{drivers}/virtio_balloon")
    except OSError:
        return False
    for balloon in balloons:
        with contextlib.suppress(OSError), open(f"{drivers}/virtio_balloon/{balloon}/features") as features:
            if features.read()[_BALLOON_REPORTS : _BALLOON_REPORTS + 1] == "1":
                return True
    return False


def populate_huge(fd: int, offset: int, nbytes: int) -> None:
    """Read a range of a file into the page cache in reads, and pages, of `huge_page_bytes`, and of no byte around them.

    The device sees one read for each, whatever its read-ahead is, where a filesystem can have pages of that size; else
    the same read fills small ones. Before Linux 5.18 the kernel reads page by page: see `mm/filemap.c`,
    do_sync_mmap_readahead.

    Args:
        fd: may be of any file that can be mapped.
        offset: where to begin; what lies before it in the same huge page is read as well.
        nbytes: more than 0, within the file.

    EFAULT is a file that has ended, or a device that fails.
    """
    address = map_shared(fd, offset, nbytes)
    try:
        for advice in (_MADV_HUGEPAGE, _MADV_RANDOM, _MADV_POPULATE_READ):
            if _libc.madvise(address, nbytes, advice):
                raise _failed()
    finally:
        unmap(address, nbytes)


def avoid_oom() -> int:
    """Ask to be ended late when memory runs out, unless somebody has set a score already; gives the score.

    It stays as it is where that can't be: without CAP_SYS_RESOURCE, as a container's root, with a /proc to read only.
    """
    with open("/proc/self/oom_score_adj") as setting:
        score = int(setting.read())
    if score == 0 and has_capability(CAP_SYS_RESOURCE):
        try:
            with open("/proc/self/oom_score_adj", "w") as setting:
                setting.write(str(OOM_SCORE))
        except OSError:
            return score
        return OOM_SCORE
    return score


def is_readable(file: HasFileno | int, timeout_s: float | None = None) -> bool:
    """Wait until something can be read there, or its other end has closed; a pidfd: until that process has ended.

    By poll(2), as select(2) can't name a descriptor above 1,023 and a host of many files has those.

    Args:
        file: what is waited for.
        timeout_s: the longest wait in seconds, None for ever; 0 only looks.

    Returns:
        False when the time is over.
    """
    waiting = select.poll()
    waiting.register(file, select.POLLIN)
    return bool(waiting.poll(None if timeout_s is None else math.ceil(timeout_s * 1000)))


def inotify() -> int:
    """inotify_init1(2), non-blocking; the caller owns the descriptor."""
    fd: int = _libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0:
        raise _failed()
    return fd


def inotify_add(inotify_fd: int, fd: int, mask: int) -> int:
    """Watch the inode behind `fd`, which may be an O_PATH descriptor; gives the watch's number."""
    wd: int = _libc.inotify_add_watch(inotify_fd, b"/proc/self/fd/%d" % fd, mask)
    if wd < 0:
        raise _failed()
    return wd


def inotify_remove(inotify_fd: int, wd: int) -> None:
    """End a watch; EINVAL when it has ended by itself."""
    if _libc.inotify_rm_watch(inotify_fd, wd):
        raise _failed()


def cachestat(fd: int, offset: int, nbytes: int) -> int:
    """How many pages of a range of a file are in the page cache, those being read included (Linux 6.5).

    Asked of a file on FUSE with passthrough it says nothing of the backing file.
    """
    found = ctypes.create_string_buffer(40)  # struct cachestat: cache, dirty, writeback, evicted, recently evicted
    if _cachestat(_SYS_CACHESTAT, fd, struct.pack("<QQ", offset, nbytes), found, 0):
        raise _failed()
    return int(struct.unpack_from("<Q", found)[0])


def mincore(fd: int, offset: int, nbytes: int) -> int:
    """How many pages of a range of a file are in the page cache and up to date; `offset` is a page's start.

    For whoever owns the file or may write it; to others the kernel says that all of it is there.
    """
    start: int | None = _libc.mmap(None, nbytes, 0, mmap.MAP_SHARED, fd, offset)
    if start is None or start == _MAP_FAILED:
        raise _failed()
    present = ctypes.create_string_buffer(-(-nbytes // mmap.PAGESIZE))
    try:
        if _libc.mincore(start, nbytes, present):
            raise _failed()
    finally:
        _libc.munmap(start, nbytes)
    return present.raw[: -(-nbytes // mmap.PAGESIZE)].count(b"\1")


def set_io_priority(*, idle: bool) -> None:
    """Have this thread's reads from now on give way to everyone else's where the disk's scheduler knows priorities.

    Args:
        idle: they wait until nobody else's are under way; else they are merely the last of the usual ones.
    """
    if _ioprio_set(_SYS_IOPRIO_SET, _IOPRIO_WHO_PROCESS, 0, _IOPRIO_IDLE if idle else _IOPRIO_LAST):
        raise _failed()


def exchange(dir_fd: int, one: str, other: str) -> None:
    """Two entries of an open folder change places at once (renameat2(2) with RENAME_EXCHANGE).

    EINVAL where the filesystem can't, as on NFS.
    """
    if _libc.renameat2(dir_fd, os.fsencode(one), dir_fd, os.fsencode(other), _RENAME_EXCHANGE):
        raise _failed(one)
