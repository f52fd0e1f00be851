"""Parts of files locked in memory: a cache that pressure on the page cache does not touch.

Each is mapped (shared, to be read only) and locked with mlock(2). The mapping is never touched from here, so that a
file that shrinks under it can't end this process with SIGBUS.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass

from weightfs import linux
from weightfs.errors import ShortReadError, UnfitError, WeightfsError
from weightfs.sizes import parse_layers

__all__ = ["Pins", "parse_layers"]

_RAISE = "set LimitMEMLOCK=infinity in the unit, or run `ulimit -l unlimited` before (weightfs doctor: memory-lock)"


@dataclass(frozen=True, slots=True)
class _Mapping:
    address: int
    nbytes: int


class Pins:
    """What is locked, by key; all of it ends with the process at the latest.

    `pin` waits for the device and `release` for a `pin` that runs: both are for worker threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mappings: dict[str, list[_Mapping]] = {}
        self._total_bytes = 0

    @property
    def total_bytes(self) -> int:
        """What is locked, in whole pages: the limit is held against that. From any thread."""
        return self._total_bytes

    def keys(self) -> frozenset[str]:
        """Whose bytes are locked. From any thread."""
        return frozenset(self._mappings)

    def pin(self, key: str, file: str | int, extents: Iterable[tuple[int, int]]) -> int:
        """Read parts of a file into memory and lock them, all or none; gives the bytes locked by this call.

        Args:
            key: what `release` gives back; it may have files and parts already.
            file: path or open descriptor of a backing file; a descriptor is not needed once this returns.
            extents: offset and length of each part; they are widened to whole pages, and may overlap.

        Raises:
            UnfitError: RLIMIT_MEMLOCK does not suffice.
            ShortReadError: a part lies beyond the end of the file, which may have shrunk meanwhile.
            OSError: the file can't be opened, mapped or read.
        """
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC) if isinstance(file, str) else file
        path = file if isinstance(file, str) else None
        try:
            with self._lock:
                return self._pin(key, fd, path, _whole_pages(extents))
        finally:
            if isinstance(file, str):
                os.close(fd)

    def release(self, key: str) -> int:
        """Unlock what a key has, nothing if it has none; gives the bytes."""
        with self._lock:
            freed = _unmap(self._mappings.pop(key, []))
            self._total_bytes -= freed
            return freed

    def _pin(self, key: str, fd: int, path: str | None, parts: list[tuple[int, int]]) -> int:
        nbytes = sum(length for _, length in parts)
        limit = linux.raise_lock_limit()
        if limit is not None and linux.locked_bytes() + nbytes > limit:
            raise UnfitError(
                f"{nbytes} bytes can't be locked beside {linux.locked_bytes()}: the limit is {limit} (RLIMIT_MEMLOCK)",
                path=path,
                mend=_RAISE,
            )
        made: list[_Mapping] = []
        try:
            for offset, length in parts:
                _check_end(fd, path, offset, length)
                made.append(_Mapping(linux.map_shared(fd, offset, length), length))
                linux.lock(made[-1].address, length)
        except OSError as e:
            _unmap(made)
            raise _refused(e, fd, path, parts) from e
        except WeightfsError:
            _unmap(made)
            raise
        self._mappings.setdefault(key, []).extend(made)
        self._total_bytes += nbytes
        return nbytes


def _whole_pages(extents: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Offset and length of each part in whole pages, ascending, none touching another."""
    page = mmap.PAGESIZE
    merged: list[tuple[int, int]] = []
    for offset, nbytes in sorted(extents):
        if nbytes <= 0:
            continue
        start, end = offset // page * page, -(-(offset + nbytes) // page) * page
        if merged and start <= sum(merged[-1]):
            first = merged[-1][0]
            merged[-1] = (first, max(end, sum(merged[-1])) - first)
        else:
            merged.append((start, end - start))
    return merged


def _refused(error: OSError, fd: int, path: str | None, parts: list[tuple[int, int]]) -> Exception:
    """What a call that failed stands for: mlock(2) has one number for a limit and for a file that has shrunk."""
    if error.errno not in (errno.ENOMEM, errno.EAGAIN, errno.EPERM):
        return error
    try:
        for offset, length in parts:
            _check_end(fd, path, offset, length)
    except ShortReadError as e:
        return e
    return UnfitError(f"can't be locked in memory: {os.strerror(error.errno)}", path=path, mend=_RAISE)


def _check_end(fd: int, path: str | None, offset: int, length: int) -> None:
    size = os.fstat(fd).st_size
    if offset + length >= size + mmap.PAGESIZE:  # the last page may be part of one
        raise ShortReadError(
            f"ends at byte {size}, before byte {offset + length} that was to be locked: it has shrunk", path=path
        )


def _unmap(mappings: list[_Mapping]) -> int:
    for mapping in mappings:
        linux.unmap(mapping.address, mapping.nbytes)
    return sum(mapping.nbytes for mapping in mappings)
