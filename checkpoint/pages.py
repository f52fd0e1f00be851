"""Where the bytes of CRIU's page images come from: a file with all of them, or a recipe.

Everything here may be used by many threads at once. Reads drop the GIL.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from checkpoint.digests import Identity
from checkpoint.errors import CorruptError
from checkpoint.extents import ChunkBytes, Recipe, WeightBytes, Zero
from checkpoint.userfaultfd import PAGE_BYTES

LEAST_ZERO_BYTES: Final = 64 << 10
"""Fewer zeros are copied along with what is around them: a call of its own costs more."""
_ANEW: Final = "make the snapshot anew"


class PageImage(Protocol):
    """An image of pages, open.

    Attributes:
        path: for errors.
    """

    path: str

    def read(self, view: memoryview, offset: int) -> None:
        """Fill `view` with what the image has at `offset`.

        Raises:
            CorruptError: it ends before, is not what was written, or can't be read.
        """

    def zeros(self, offset: int, nbytes: int) -> tuple[bool, int]:
        """Whether the image is known to begin with zeros at `offset`, and for how many of the next `nbytes` that is so.

        Always a multiple of `PAGE_BYTES`, if `nbytes` is one.
        """

    def close(self) -> None:
        """Let go of it."""


class Chunks(Protocol):
    """What gives chunks by id: `checkpoint.chunks.packs.Packs`."""

    def get(self, id_: bytes, /) -> bytes:
        """A whole chunk, verified."""


class PlainPages:
    """An image that is a file.

    Args:
        path: of the file.

    Raises:
        OSError: it can't be opened.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, view: memoryview, offset: int) -> None:
        """See `PageImage`."""
        _read(self._fd, view, offset, self.path)

    def zeros(self, offset: int, nbytes: int) -> tuple[bool, int]:
        """See `PageImage`: nothing is known."""
        del offset
        return False, nbytes

    def close(self) -> None:
        """See `PageImage`."""
        os.close(self._fd)


class Sources:
    """Weight files and chunks, which the recipes of a snapshot refer to; a context manager.

    Args:
        weights: paths of the weight files, in the order of `Manifest.weights`, each with the identity that it had when
            its bytes were compared with those of the snapshot.
        chunks: the store's.

    Raises:
        CorruptError: a weight file is another one by now.
    """

    def __init__(self, weights: Mapping[str, Identity], chunks: Chunks) -> None:
        self._paths: Final = tuple(weights)
        self._identities: Final = tuple(weights.values())
        self._fds: dict[int, int] = {}
        self._lock = threading.Lock()
        self._chunks = chunks
        self._last = threading.local()

    def __enter__(self) -> Sources:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            while self._fds:
                os.close(self._fds.popitem()[1])

    def weight(self, number: int, view: memoryview, offset: int) -> None:
        """Fill `view` from a weight file; errors are those of `PageImage.read`."""
        _read(self._opened(number), view, offset, self._paths[number])

    def chunk(self, id_: bytes, view: memoryview, at: int) -> None:
        """Fill `view` from a chunk; errors are those of `PageImage.read`.

        A thread remembers its last chunk: runs and faults end anywhere within one.
        """
        known: tuple[bytes, bytes] | None = getattr(self._last, "chunk", None)
        if known is None or known[0] != id_:
            known = self._last.chunk = id_, self._chunks.get(id_)
        content = known[1]
        if len(content) < at + len(view):
            raise CorruptError(f"needs a chunk of more than {len(content)} bytes", mend=_ANEW)
        view[:] = memoryview(content)[at : at + len(view)]

    def _opened(self, number: int) -> int:
        fd = self._fds.get(number)
        if fd is not None:
            return fd
        path = self._paths[number]
        with self._lock:
            if number not in self._fds:
                try:
                    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as e:
                    raise CorruptError(f"can't be read: {os.strerror(e.errno or 0)}", path=path) from e
                self._fds[number] = fd  # closed with the others, whatever comes
                if Identity.of(os.fstat(fd)) != self._identities[number]:
                    raise CorruptError("changed meanwhile", path=path, mend=_ANEW)
            return self._fds[number]


class RecipePages:
    """An image that is a recipe.

    Args:
        path: for errors.
        recipe: what it is made of.
        sources: what the recipe refers to.
    """

    def __init__(self, path: str, recipe: Recipe, sources: Sources) -> None:
        self.path = path
        self._recipe = recipe
        self._sources = sources

    def read(self, view: memoryview, offset: int) -> None:
        """See `PageImage`."""
        at = 0
        if offset + len(view) > self._recipe.nbytes:
            raise CorruptError(f"has only {self._recipe.nbytes} bytes", path=self.path, mend=_ANEW)
        for extent in self._recipe.part(offset, offset + len(view)):
            part = view[at : at + extent.nbytes]
            if isinstance(extent, WeightBytes):
                self._sources.weight(extent.file, part, extent.offset)
            elif isinstance(extent, ChunkBytes):
                self._sources.chunk(extent.id, part, extent.at)
            else:
                part[:] = bytes(extent.nbytes)
            at += extent.nbytes

    def zeros(self, offset: int, nbytes: int) -> tuple[bool, int]:
        """See `PageImage`."""
        found = 0
        for extent in self._recipe.part(offset, offset + nbytes):
            is_long = isinstance(extent, Zero) and extent.nbytes >= LEAST_ZERO_BYTES
            if is_long and not (found % PAGE_BYTES or extent.nbytes % PAGE_BYTES):
                return (True, extent.nbytes) if not found else (False, found)
            found += extent.nbytes
        return False, nbytes

    def close(self) -> None:
        """See `PageImage`: what it refers to is its owner's."""


def whole(paths: Sequence[str]) -> dict[str, PageImage]:
    """Images that are files, open; whoever gets them closes them.

    Raises:
        OSError: one can't be opened; the others are closed again.
    """
    found: dict[str, PageImage] = {}
    try:
        for path in dict.fromkeys(paths):
            found[path] = PlainPages(path)
    except BaseException:
        for one in found.values():
            one.close()
        raise
    return found


def _read(fd: int, view: memoryview, offset: int, path: str) -> None:
    done = 0
    while done < len(view):
        try:
            count = os.preadv(fd, [view[done:]], offset + done)
        except OSError as e:
            raise CorruptError(f"can't be read: {e.strerror}", path=path, mend="see the kernel's log") from e
        if not count:
            raise CorruptError("was cut short while it was read", path=path, mend=_ANEW)
        done += count
