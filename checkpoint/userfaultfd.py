"""userfaultfd(2): memory of another process, filled in page by page or in large pieces. No policy here.

Layouts and numbers are those of `linux/userfaultfd.h`; the semantics those of ioctl_userfaultfd(2) and of the kernel's
admin-guide/mm/userfaultfd.rst. Every call drops the GIL while it runs (ctypes does).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import Final

import msgspec

PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")

PAGEFAULT: Final = 0x12
FORK: Final = 0x13
REMAP: Final = 0x14
REMOVE: Final = 0x15
UNMAP: Final = 0x16

_API: Final = 0xAA
_FEATURES: Final = 0x02 | 0x04 | 0x08 | 0x40  # events of fork, remap, remove and unmap
_UFFDIO_API: Final = 0xC018AA3F
_UFFDIO_WAKE: Final = 0x8010AA02
_UFFDIO_COPY: Final = 0xC028AA03
_UFFDIO_ZEROPAGE: Final = 0xC020AA04
_SYS_USERFAULTFD: Final = 282 if os.uname().machine == "aarch64" else 323
_EVENT: Final = struct.Struct("<B7xQQQ")
_BATCH: Final = 64


class _Copy(ctypes.Structure):
    _fields_ = (
        ("dst", ctypes.c_uint64),
        ("src", ctypes.c_uint64),
        ("len", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("copy", ctypes.c_int64),
    )


class _Zero(ctypes.Structure):
    _fields_ = (
        ("start", ctypes.c_uint64),
        ("len", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("zeropage", ctypes.c_int64),
    )


class _Range(ctypes.Structure):
    _fields_ = (("start", ctypes.c_uint64), ("len", ctypes.c_uint64))


_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
_libc.syscall.restype = ctypes.c_long


class Event(msgspec.Struct, frozen=True):
    """What a process has done, or waits for.

    Attributes:
        kind: `PAGEFAULT`, `FORK`, `REMAP`, `REMOVE` or `UNMAP`.
        start, end: the addresses, half-open: of the page that is waited for, of what was removed or unmapped, or of
            what was moved, before.
        to: where `start` is after a `REMAP`.
        fd: of the child's memory after a `FORK`; whoever read the event owns it.
    """

    kind: int
    start: int = 0
    end: int = 0
    to: int = 0
    fd: int = -1


def reason_against() -> str | None:
    """Why this process can't serve memory of another one; None if it can."""
    fd = int(_libc.syscall(ctypes.c_long(_SYS_USERFAULTFD), os.O_CLOEXEC | os.O_NONBLOCK))
    if fd < 0:
        number = ctypes.get_errno()
        if number == errno.EPERM:
            return "userfaultfd(2) is not permitted (vm.unprivileged_userfaultfd, or a container's seccomp profile)"
        return f"userfaultfd(2): {os.strerror(number)}"
    try:
        request = ctypes.create_string_buffer(struct.pack("<QQQ", _API, _FEATURES, 0), 24)
        if _libc.ioctl(fd, _UFFDIO_API, request):
            return f"userfaultfd(2) tells of no forks and changes: {os.strerror(ctypes.get_errno())}"
    finally:
        os.close(fd)
    return None


def read_events(fd: int) -> list[Event]:
    """What has happened, in that order, at most 64 at once; empty if nothing has. Reading lets who changed it go on.

    Raises:
        OSError: the descriptor is no userfaultfd, or the descriptor of a child can't be had (EMFILE).
    """
    try:
        raw = os.read(fd, _EVENT.size * _BATCH)
    except BlockingIOError:
        return []
    return [_event(*values) for values in _EVENT.iter_unpack(raw)]


def _event(kind: int, first: int, second: int, third: int) -> Event:
    if kind == PAGEFAULT:  # flags, address
        start = second - second % PAGE_BYTES
        return Event(kind, start, start + PAGE_BYTES)
    if kind == FORK:
        return Event(kind, fd=first & 0xFFFFFFFF)
    if kind == REMAP:  # from, to, length
        return Event(kind, first, first + third, to=second)
    return Event(kind, first, second)


def copy(fd: int, target: int, source: int, nbytes: int) -> tuple[int, int]:
    """Fill pages that are not there yet, and wake who waits for them; all of it must lie in one mapping.

    Args:
        fd: of the process.
        target: its address, a multiple of `PAGE_BYTES`.
        source: address in this process.
        nbytes: a multiple of `PAGE_BYTES`.

    Returns:
        How many bytes were filled, and why not all: 0 if they were; EEXIST: the next page is there already; ENOENT: the
        next page, or some page of what is left, is not mapped and registered; EAGAIN: a change is under way, whose
        event must be read first, or only a part was done; ESRCH: the process has ended; EFAULT: the source can't be
        read.
    """
    request = _Copy(target, source, nbytes, 0, 0)
    if _libc.ioctl(fd, _UFFDIO_COPY, ctypes.byref(request)) == 0:
        return nbytes, 0
    return max(request.copy, 0), ctypes.get_errno()


def zero(fd: int, target: int, nbytes: int) -> tuple[int, int]:
    """As `copy`, with zeros."""
    request = _Zero(target, nbytes, 0, 0)
    if _libc.ioctl(fd, _UFFDIO_ZEROPAGE, ctypes.byref(request)) == 0:
        return nbytes, 0
    return max(request.zeropage, 0), ctypes.get_errno()


def wake(fd: int, target: int, nbytes: int) -> None:
    """Have who waits for these pages look again. Fails silently: a process that has ended waits for nothing."""
    _libc.ioctl(fd, _UFFDIO_WAKE, ctypes.byref(_Range(target, nbytes)))
