"""Bytes of a file into memory at an address, whole or not at all."""

from __future__ import annotations

import os

from weightfs.errors import ShortReadError


def fill(fd: int, buffer: memoryview, offset: int) -> None:
    """Read until the buffer is full; in threads, as the GIL is given away.

    Raises:
        ShortReadError: the file ends before.
        OSError: it can't be read.
    """
    done, nbytes = 0, len(buffer)
    while done < nbytes:
        count = os.preadv(fd, (buffer[done:] if done else buffer,), offset + done)
        if not count:
            raise ShortReadError(
                f"ends at byte {offset + done}, where {nbytes - done} more were to come", path=path_of(fd)
            )
        done += count


def path_of(fd: int) -> str:
    """What an open file is called, for an error's text."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return f"descriptor {fd}"
