"""What is said to the kernel through /dev/fuse: replies, and which files it may read by itself. From any thread."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import struct
from collections import Counter

from weightfs import wire

log = logging.getLogger(__name__)


class Kernel:
    """The kernel's end of one mount.

    Attributes:
        fd: /dev/fuse, mounted, non-blocking; whoever made this owns it.
        fallbacks: files the kernel would not read by itself, by errno.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.fallbacks: Counter[int] = Counter()

    def write(self, parts: list[bytes | memoryview]) -> bool:
        """Give it one message; False when it no longer waits for it."""
        try:
            os.writev(self.fd, parts)
        except OSError as e:
            self.refused(e)
            return False
        return True

    def answer(self, unique: int, number: int) -> None:
        """Answer a request with an errno and no more; 0 is success."""
        self.write([wire.OUT_HEADER.pack(wire.OUT_HEADER_BYTES, -number, unique)])

    def refused(self, error: OSError) -> None:
        """It did not take a reply."""
        if error.errno not in (errno.ENOENT, errno.ENODEV):  # these say that nobody waits for it any more
            log.warning("the kernel refused a reply: %s", error)

    def open_backing(self, fd: int) -> int | None:
        """Have it read a file by itself; gives its number for that, None when it won't."""
        try:
            # Mutable, so that Python gives the call's result, which is the id.
            return int(fcntl.ioctl(self.fd, wire.BACKING_OPEN, bytearray(wire.BACKING_MAP.pack(fd, 0, 0))))
        except OSError as e:
            # ELOOP: the file lies on a stacked filesystem. It is served by the READ path instead.
            if not self.fallbacks[e.errno or 0]:
                log.warning("the kernel will not read some files by itself: %s", e.strerror)
            self.fallbacks[e.errno or 0] += 1
            return None

    def close_backing(self, number: int) -> None:
        """Give such a number back; one that it does not know changes nothing."""
        with contextlib.suppress(OSError):  # unmounted: the kernel has closed it itself
            fcntl.ioctl(self.fd, wire.BACKING_CLOSE, struct.pack("<I", number))
