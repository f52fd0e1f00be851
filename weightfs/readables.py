"""What READ requests are answered from: whole files, tensors, live state. Blocking; the channel's threads call it."""

from __future__ import annotations

import os
from collections.abc import Callable

from weightfs.errors import ShortReadError, StaleError
from weightfs.handles import Place
from weightfs.source.base import Source


def _fill(fd: int, buffer: memoryview, offset: int) -> int:
    """preadv until `buffer` is full or the file ends."""
    filled = 0
    while filled < len(buffer):
        got = os.preadv(fd, [buffer[filled:]], offset + filled)
        if not got:
            break
        filled += got
    return filled


class WholeFile:
    """A file of the source, byte for byte. Owns its descriptor.

    Attributes:
        path: where it was found, relative to the root.
        fd, promise: see `Readable`.
    """

    def __init__(self, source: Source, path: bytes, fd: int, promise: tuple[int, int]) -> None:
        self.path = path
        self.fd = fd
        self.promise = promise
        self._source = source
        self._first = promise

    def renew(self, promise: tuple[int, int]) -> None:
        """The file was opened anew, after it had been cut, say: what that open found is what readers may expect.

        Whoever had it open before is then told of the file's end as it is, as on the bare file.
        """
        self.promise = promise

    def in_page_cache(self, offset: int, nbytes: int) -> Place | None:
        """See `Readable`. The end, and a file that has shrunk, are left to `read_into`."""
        return Place(self.fd, offset, nbytes) if offset + nbytes <= self.promise[0] else None

    def read_into(self, handle: int, buffer: memoryview, offset: int) -> int:
        """See `Readable`. Ends where the file ends now, but never before the size it had at its last open."""
        filled = _fill(self.fd, buffer, offset)
        promised, mtime_ns = self.promise
        if filled < len(buffer) and offset + filled < promised:
            now = self._source.fstat(self.fd)
            if now.size < promised:
                raise StaleError(f"was cut from {promised} to {now.size} bytes while it was open")
            if now.mtime_ns != mtime_ns:
                raise StaleError("was cut, and has grown again, while it was read")
            raise ShortReadError(f"gave {filled} of {len(buffer)} bytes at {offset}, well before its end")
        return filled

    def has_changed(self) -> bool:
        """Whether the file was written to since it was opened. Handles see the new bytes, as on the bare file."""
        now = self._source.fstat(self.fd)
        return (now.size, now.mtime_ns) != self._first

    def forget(self, handle: int) -> None:
        """See `Readable`."""

    def close(self) -> None:
        """See `Readable`."""
        os.close(self.fd)


class Extent:
    """A tensor: a prefix made up (the `.npy` header, or nothing), then a range of a file. Owns its descriptor."""

    def __init__(self, source: Source, fd: int, identity: bytes, prefix: bytes, offset: int, nbytes: int) -> None:
        self._source = source
        self.fd = fd
        self.promise = (0, 0)
        self._identity = identity
        self._prefix = prefix
        self._offset = offset
        self._nbytes = nbytes

    def in_page_cache(self, offset: int, nbytes: int) -> Place | None:
        """See `Readable`."""
        return None

    def read_into(self, handle: int, buffer: memoryview, offset: int) -> int:
        """See `Readable`. The file is examined after its bytes were read, so that no changed byte is passed on."""
        wanted = buffer[: max(0, min(len(buffer), len(self._prefix) + self._nbytes - offset))]
        head = self._prefix[offset : offset + len(wanted)]
        wanted[: len(head)] = head
        rest = wanted[len(head) :]
        filled = _fill(self.fd, rest, self._offset + offset + len(head) - len(self._prefix)) if len(rest) else 0
        if self._source.fstat(self.fd).identity != self._identity:
            raise StaleError("its file has changed")
        if filled < len(rest):
            raise ShortReadError(f"gave {filled} of {len(rest)} bytes of a tensor")
        return len(wanted)

    def forget(self, handle: int) -> None:
        """See `Readable`."""

    def close(self) -> None:
        """See `Readable`."""
        os.close(self.fd)


class LiveText:
    """Text made anew for each handle at its first read, so that no reader sees two states mixed."""

    def __init__(self, make: Callable[[], bytes]) -> None:
        self._make = make
        self.fd = None
        self.promise = (0, 0)
        self._texts: dict[int, bytes] = {}

    def in_page_cache(self, offset: int, nbytes: int) -> Place | None:
        """See `Readable`."""
        return None

    def read_into(self, handle: int, buffer: memoryview, offset: int) -> int:
        """See `Readable`. A handle that began to read in a predecessor is at its end: its text was there, whole."""
        text = self._texts.get(handle)
        if text is None and offset:
            return 0
        if text is None:
            text = self._texts.setdefault(handle, self._make())  # the first of several threads decides
        part = text[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        return len(part)

    def forget(self, handle: int) -> None:
        """See `Readable`."""
        self._texts.pop(handle, None)

    def close(self) -> None:
        """See `Readable`."""
