"""Where the bytes of CRIU's page images come from: a file with all of them, or a recipe.

Everything here may be used by many threads at once. Reads drop the GIL.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final, NamedTuple, Protocol

from checkpoint.digests import Identity
from checkpoint.errors import CorruptError
from checkpoint.extents import ChunkBytes, Recipe, WeightBytes, Zero
from checkpoint.mapped import MappedFile
from checkpoint.userfaultfd import PAGE_BYTES

LEAST_ZERO_BYTES: Final = 64 << 10
"""Fewer zeros are written along with what is around them."""
BATCH_BYTES: Final = 2 << 20
"""Chunks are opened so many bytes at once: in as few calls as can be, none of which holds the GIL."""
_ANEW: Final = "make the snapshot anew"


class Part(NamedTuple):
    """Some bytes of an image, `nbytes` of them, in this process's memory.

    `address` is None where they are zeros, and where they must be read first, which tells why they can't be.
    """

    nbytes: int
    address: int | None
    is_zero: bool = False


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

    def parts(self, offset: int, nbytes: int) -> Iterator[Part]:
        """The next `nbytes` at `offset`, as they are best copied from; a part is there until the next is asked for.

        Parts are whole pages, if `nbytes` is that. What is at an address is verified; to copy it may fail with EFAULT,
        and then `read` tells why.

        Raises:
            CorruptError: see `read`.
        """

    def close(self) -> None:
        """Let go of it."""


class Chunks(Protocol):
    """What gives chunks by id: `checkpoint.chunks.openers.Openers`."""

    def get(self, id_: bytes, /) -> bytes:
        """A whole chunk, verified."""

    def opened(self, ids: Sequence[bytes], /) -> AbstractContextManager[list[Any]]:
        """Whole chunks, verified, in that order, while the context lasts; each of any type with the buffer protocol."""


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
        self._mapped = _mapped(self._fd)

    def read(self, view: memoryview, offset: int) -> None:
        """See `PageImage`."""
        _read(self._fd, view, offset, self.path)

    def parts(self, offset: int, nbytes: int) -> Iterator[Part]:
        """See `PageImage`."""
        return _of_file(self._mapped, offset, nbytes)

    def close(self) -> None:
        """See `PageImage`."""
        if self._mapped is not None:
            self._mapped.close()
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
        self._mapped: dict[int, MappedFile | None] = {}
        self._lock = threading.Lock()
        self._chunks = chunks
        self._last = threading.local()

    def __enter__(self) -> Sources:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            while self._mapped:
                if (mapped := self._mapped.popitem()[1]) is not None:
                    mapped.close()
            while self._fds:
                os.close(self._fds.popitem()[1])

    def weight_parts(self, extent: WeightBytes) -> Iterator[Part]:
        """Bytes of a weight file; see `PageImage.parts`."""
        number = extent.file
        if number not in self._mapped:
            fd = self._opened(number)
            with self._lock:
                if number not in self._mapped:
                    self._mapped[number] = _mapped(fd)
        return _of_file(self._mapped[number], extent.offset, extent.nbytes)

    def chunk_parts(self, extents: Sequence[ChunkBytes | Zero]) -> Iterator[Part]:
        """Bytes of chunks, and zeros between them; see `PageImage.parts`.

        What lies one behind the other in memory is one part.
        """
        wanted = [one.id for one in extents if isinstance(one, ChunkBytes)]
        if not wanted:
            yield from (Part(one.nbytes, None, is_zero=True) for one in extents)
            return
        with self._chunks.opened(wanted) as contents:
            yield from _parts_of(extents, contents)

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
            raise _short(len(content))
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

    def parts(self, offset: int, nbytes: int) -> Iterator[Part]:
        """See `PageImage`."""
        if offset + nbytes > self._recipe.nbytes:
            raise CorruptError(f"has only {self._recipe.nbytes} bytes", path=self.path, mend=_ANEW)
        batch: list[ChunkBytes | Zero] = []
        in_batch = 0
        for extent in self._recipe.part(offset, offset + nbytes):
            is_odd = extent.nbytes % PAGE_BYTES != 0
            if isinstance(extent, WeightBytes) or is_odd or in_batch >= BATCH_BYTES:
                yield from self._sources.chunk_parts(batch)
                batch, in_batch = [], 0
            if is_odd:  # which no recipe of ours has before its end
                yield Part(nbytes, None)
                return
            nbytes -= extent.nbytes
            if isinstance(extent, WeightBytes):
                yield from self._sources.weight_parts(extent)
            else:
                batch.append(extent)
                in_batch += extent.nbytes if isinstance(extent, ChunkBytes) else 0
        yield from self._sources.chunk_parts(batch)

    def zeros(self, offset: int, nbytes: int) -> tuple[bool, int]:
        """Whether it begins with zeros at `offset`, and for how many of the next `nbytes` that is so.

        Always a multiple of `PAGE_BYTES`, if `nbytes` is one.
        """
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


class _Buffer(ctypes.Structure):
    """`Py_buffer` of Python's C API."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def _parts_of(extents: Sequence[ChunkBytes | Zero], contents: Sequence[Any]) -> Iterator[Part]:
    """Parts of chunks whose contents are there, and of zeros."""
    places = map(_place, contents)
    start = end = 0
    for extent in extents:
        address = None
        if isinstance(extent, ChunkBytes):
            address, nbytes = next(places)
            if nbytes < extent.at + extent.nbytes:
                raise _short(nbytes)
            address += extent.at
            if address == end:
                end += extent.nbytes
                continue
        if end > start:
            yield Part(end - start, start)
            start = end = 0
        if address is None:
            yield Part(extent.nbytes, None, is_zero=True)
        else:
            start, end = address, address + extent.nbytes
    if end > start:
        yield Part(end - start, start)


def _place(content: Any) -> tuple[int, int]:
    """Where the bytes of something that is not to be written to are, while it is there, and how many."""
    view = _Buffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(content), ctypes.byref(view), 0)
    try:
        return int(view.buf or 0), int(view.len)
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(view))


def _mapped(fd: int) -> MappedFile | None:
    """None where that can't be."""
    try:
        return MappedFile(fd)
    except OSError:
        return None


def _of_file(mapped: MappedFile | None, offset: int, nbytes: int) -> Iterator[Part]:
    if mapped is None or offset + nbytes > mapped.nbytes:
        yield Part(nbytes, None)
        return
    yield Part(nbytes, mapped.address + offset)
    mapped.forget(offset, nbytes)


def _short(nbytes: int) -> CorruptError:
    return CorruptError(f"needs a chunk of more than {nbytes} bytes", mend=_ANEW)


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
