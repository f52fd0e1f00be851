"""Bytes of a file into memory, whole or not at all, and whether the file is still what it was."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable

from prefetch.pieces import Piece
from weightfs.errors import IntegrityError, ShortReadError


def fill(fd: int, buffer: memoryview, offset: int) -> None:
    """Read until the buffer is full; the GIL is given away meanwhile.

    Raises:
        ShortReadError: the file ends before.
        OSError: it can't be read.
    """
    done, nbytes = 0, len(buffer)
    while done < nbytes:
        count = os.preadv(fd, (buffer[done:] if done else buffer,), offset + done)
        if not count:
            raise _ends(fd, offset + done, offset + nbytes)
        done += count


class Sources:
    """The files of some pieces, as they are now.

    Raises:
        ShortReadError: a file ends before a piece of it does.
        OSError: a descriptor is not open.
    """

    def __init__(self, pieces: Iterable[Piece]) -> None:
        ends: dict[int, int] = {}
        for piece in pieces:
            ends[piece.fd] = max(ends.get(piece.fd, 0), piece.offset + piece.nbytes)
        self._states = {fd: _state(fd) for fd in ends}
        for fd, end in ends.items():
            size, _ = self._states[fd]
            if size is not None and end > size:
                raise _ends(fd, size, end)

    @property
    def fds(self) -> Iterable[int]:
        """Of each file once."""
        return self._states.keys()

    def check(self) -> None:
        """See that no file has another size or time of change by now: parts of it might be of before and after.

        Raises:
            IntegrityError: one has.
        """
        for fd, state in self._states.items():
            if _state(fd) != state:
                raise IntegrityError("changed while it was copied to the GPU", path=path_of(fd), mend="load it again")


def path_of(fd: int) -> str:
    """What an open file is called, for an error's text."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return f"descriptor {fd}"


def _state(fd: int) -> tuple[int | None, int]:
    found = os.fstat(fd)
    return (found.st_size if stat.S_ISREG(found.st_mode) else None), found.st_mtime_ns


def _ends(fd: int, size: int, end: int) -> ShortReadError:
    return ShortReadError(f"ends at byte {size}, where {end - size} more were to come", path=path_of(fd))
