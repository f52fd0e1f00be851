"""A bounded, forward-only reader for binary headers."""

from __future__ import annotations

import struct
from typing import Any, Literal

from weightfs.errors import FormatError
from weightfs.formats.layout import ReadAt

_WINDOW_BYTES = 256 << 10
_LARGEST_WINDOW_BYTES = 4 << 20
"""Windows double: a header without a vocabulary takes one small read, one of 100 MB some thirty."""


class Cursor:
    """Reads a header front to back through windows, and never further than `limit`.

    No count read from the file is believed before `claim` compared it with the bytes that are left, so a hostile one
    costs neither memory nor time. Holds one window, and what a single `take` asks for.

    Args:
        read: reads the file.
        size: the file's length in bytes.
        limit: the most bytes a header may have.
        order: byte order, as in `struct`.
    """

    __slots__ = ("_base", "_data", "_limit", "_pos", "_read", "_size", "_structs", "_window", "order")

    def __init__(self, read: ReadAt, *, size: int, limit: int, order: Literal["<", ">"] = "<") -> None:
        self.order = order
        self._read = read
        self._size = size
        self._limit = min(size, limit)
        self._base = 0
        self._data = b""
        self._pos = 0
        self._window = _WINDOW_BYTES
        self._structs: dict[str, struct.Struct] = {}

    @property
    def offset(self) -> int:
        """The next byte to be read, counted from the start of the file."""
        return self._base + self._pos

    def claim(self, count: int, unit_bytes: int = 1) -> None:
        """Demands that `count` units of at least `unit_bytes` each can still follow.

        Raises:
            FormatError: `header-truncated` if the file ends first, `header-length` if the limit does.
        """
        end = self.offset + count * unit_bytes
        if end <= self._limit:
            return
        if end > self._size:
            raise FormatError(
                "header-truncated", f"header needs {end} bytes or more, the file has {self._size}", offset=self.offset
            )
        raise FormatError("header-length", f"header exceeds {self._limit} bytes", offset=self.offset)

    def number(self, code: str) -> Any:
        """Reads one number.

        Args:
            code: its `struct` format character, without byte order.

        Raises:
            FormatError: see `claim`.
        """
        unpacker = self._structs.get(code)
        if unpacker is None:
            unpacker = self._structs[code] = struct.Struct(self.order + code)
        end = self._pos + unpacker.size
        if end > len(self._data):
            self._fill(unpacker.size)
            end = unpacker.size
        value = unpacker.unpack_from(self._data, self._pos)[0]
        self._pos = end
        return value

    def take(self, nbytes: int) -> bytes:
        """Reads `nbytes` bytes.

        Raises:
            FormatError: see `claim`.
        """
        if self._pos + nbytes > len(self._data):
            self._fill(nbytes)
        start = self._pos
        self._pos += nbytes
        return self._data[start : self._pos]

    def skip(self, nbytes: int) -> None:
        """Goes `nbytes` bytes further without reading them.

        Raises:
            FormatError: see `claim`.
        """
        self.claim(nbytes)
        self._pos += nbytes
        if self._pos > len(self._data):
            self._base += self._pos
            self._data = b""
            self._pos = 0

    def skip_strings(self, count: int) -> None:
        """Goes past `count` strings, each a 64-bit length and that many bytes.

        The one loop whose length is a vocabulary (150,000 and more), so it runs on local variables: 15 ms.

        Raises:
            FormatError: see `claim`.
        """
        self.claim(count, 8)
        unpack = struct.Struct(self.order + "Q").unpack_from
        while count:
            data, pos = self._data, self._pos
            last = len(data) - 8
            while count and pos <= last:
                pos += 8 + unpack(data, pos)[0]
                count -= 1
            self.skip(pos - self._pos)
            if count:
                self._fill(8)

    def _fill(self, nbytes: int) -> None:
        """Reads a window that begins here and holds at least `nbytes` bytes."""
        self.claim(nbytes)
        self._base += self._pos
        self._pos = 0
        self._data = self._read(self._base, min(max(nbytes, self._window), self._limit - self._base))
        self._window = min(2 * self._window, _LARGEST_WINDOW_BYTES)
