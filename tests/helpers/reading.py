"""Every way a program may read a whole file."""

from __future__ import annotations

import errno
import mmap
import os
import socket
import threading
from collections.abc import Callable

from tests.helpers.mounting import tolerating

MIB = 1 << 20


def by_read(fd: int) -> bytes:
    os.lseek(fd, 0, os.SEEK_SET)
    parts = []
    while part := os.read(fd, 3 * MIB + 1):
        parts.append(part)
    return b"".join(parts)


def by_preadv(fd: int) -> bytes:
    found, at = bytearray(), 0
    while True:
        buffers = [bytearray(100_001), bytearray(1), bytearray(MIB)]
        got = os.preadv(fd, buffers, at)
        if not got:
            return bytes(found)
        found += b"".join(buffers)[:got]
        at += got


def by_readv(fd: int) -> bytes:
    os.lseek(fd, 0, os.SEEK_SET)
    buffers = [bytearray(2 * MIB + 1) for _ in range(8)]
    found = bytearray()
    while got := os.readv(fd, buffers):
        found += b"".join(buffers)[:got]
    return bytes(found)


def by_shared_mmap(fd: int) -> bytes:
    with mmap.mmap(fd, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ) as mapped:
        return mapped[:]


def by_private_mmap(fd: int) -> bytes:
    with mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as mapped:
        return mapped[:]


def by_populated_mmap(fd: int) -> bytes:
    with mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE | mmap.MAP_POPULATE, prot=mmap.PROT_READ) as mapped:
        return mapped[:]


def by_sendfile(fd: int) -> bytes:
    ours, theirs = socket.socketpair()

    def send() -> None:
        at = 0
        while sent := os.sendfile(theirs.fileno(), fd, at, 16 * MIB):
            at += sent
        theirs.close()

    thread = threading.Thread(target=send)
    thread.start()
    with ours:
        parts = []
        while part := ours.recv(MIB):
            parts.append(part)
    thread.join()
    return b"".join(parts)


def by_splice(fd: int) -> bytes:
    reader, writer = os.pipe()
    found, at = bytearray(), 0
    try:
        while moved := os.splice(fd, writer, 65536, offset_src=at):
            at += moved
            while moved:
                part = os.read(reader, moved)
                found += part
                moved -= len(part)
    finally:
        os.close(reader)
        os.close(writer)
    return bytes(found)


def by_copy_file_range(fd: int) -> bytes:
    """To a file elsewhere. The kernel may refuse between filesystems (EXDEV), as cp expects; then cp reads."""
    elsewhere = os.memfd_create("elsewhere")
    try:
        at = 0
        with tolerating(errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP):
            while copied := os.copy_file_range(fd, elsewhere, 16 * MIB, offset_src=at):
                at += copied
        while sent := os.sendfile(elsewhere, fd, at, 16 * MIB):
            at += sent
        return os.pread(elsewhere, os.fstat(elsewhere).st_size, 0)
    finally:
        os.close(elsewhere)


def by_direct_read(fd: int) -> bytes:
    """Into an aligned buffer, as O_DIRECT wants it."""
    found, at = bytearray(), 0
    with mmap.mmap(-1, 4 * MIB) as buffer:
        while got := os.preadv(fd, [buffer], at):
            found += buffer[:got]
            at += got
    return bytes(found)


WAYS: dict[str, Callable[[int], bytes]] = {
    way.__name__: way
    for way in (
        by_read, by_preadv, by_readv, by_shared_mmap, by_private_mmap, by_populated_mmap, by_sendfile, by_splice,
        by_copy_file_range,
    )
}  # fmt: skip
