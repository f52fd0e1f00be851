"""Reads of one copy: from the page cache what is in it, past it (O_DIRECT) what is not.

A read past the cache is of a whole buffer, so that as many of them as there are threads keep a disk's queue full: 192
MiB with 12 threads of 16 MiB. It costs no copy of the processor's, and leaves nothing in the cache.

Whether a job is in memory is asked of a few of its pages, by mincore(2), which also tells of the backing file through a
passthrough mount; wrong guesses cost time only. Whoever may not know (mincore says yes to others than the owner and
who may write), and every filesystem that refuses O_DIRECT, has its files read through the cache.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Final

from prefetch.pieces import PAGE_BYTES, Job, Piece
from prefetch.reading import fill
from weightfs import linux

_JOB_SAMPLES: Final = 4
_SAMPLES: Final = 64
"""Of all files together; each is asked at 4 places at least. One takes 5 to 20 us."""
_REFUSED: Final = frozenset({errno.EINVAL, errno.EOPNOTSUPP})


class Reads:
    """What fills the buffers of one copy, in many threads; to be closed after the last one.

    Args:
        pieces: what will be read.
        past_cache: whether what is not in memory is read past the page cache.

    Attributes:
        all_resident: whether all of it seems to be in memory, as far as that can be told.
    """

    def __init__(self, pieces: Iterable[Piece], *, past_cache: bool) -> None:
        self._turn = threading.Lock()
        self._direct: dict[int, int | None] = {}  # by the pieces' descriptor; None where it can't be
        self.past_cache_bytes = 0
        """How much was read past the cache."""
        ranges: dict[int, tuple[int, int]] = {}
        for piece in pieces:
            if piece.nbytes:
                start, end = ranges.get(piece.fd, (piece.offset, 0))
                ranges[piece.fd] = min(start, piece.offset), max(end, piece.offset + piece.nbytes)
        samples = max(_JOB_SAMPLES, _SAMPLES // max(len(ranges), 1))
        absent = [fd for fd, (start, end) in ranges.items() if _resident_share(fd, start, end, samples) < 1]
        self.all_resident = not absent
        self._asked = frozenset(absent if past_cache else ())

    def __enter__(self) -> Reads:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for fd in self._direct.values():
            if fd is not None:
                os.close(fd)
        self._direct.clear()

    def read(self, job: Job, memory: memoryview) -> None:
        """Fill the beginning of a buffer, on page boundaries, with a job's bytes.

        Raises:
            ShortReadError: the file ends before.
            OSError: it can't be read.
        """
        done = 0
        if job.fd in self._asked and _resident_share(job.fd, job.offset, job.offset + job.nbytes, _JOB_SAMPLES) < 0.5:
            done = self._read_past(job, memory)
        if done < job.nbytes:
            fill(job.fd, memory[done : job.nbytes], job.offset + done)

    def _read_past(self, job: Job, memory: memoryview) -> int:
        """Bytes of the job that came past the cache: fewer than all at the file's end, 0 where it can't be."""
        fd = self._open(job.fd)
        if fd is None:
            return 0
        whole = -(-job.nbytes // PAGE_BYTES) * PAGE_BYTES
        try:
            done = min(os.preadv(fd, (memory[:whole],), job.offset), job.nbytes)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            return 0  # of a device with larger blocks than a page
        with self._turn:
            self.past_cache_bytes += done
        return done

    def _open(self, fd: int) -> int | None:
        with self._turn:
            if fd not in self._direct:
                self._direct[fd] = None
                with contextlib.suppress(OSError):  # a filesystem that can't, or a file that this user may not reopen
                    self._direct[fd] = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
            return self._direct[fd]


def _resident_share(fd: int, start: int, end: int, samples: int) -> float:
    """About how much of a range is in memory, 1 where the kernel can't tell."""
    first, last = start // PAGE_BYTES, max(start, end - 1) // PAGE_BYTES
    pages = {first + (last - first) * number // max(samples - 1, 1) for number in range(samples)}
    try:
        return sum(linux.mincore(fd, page * PAGE_BYTES, PAGE_BYTES) for page in pages) / len(pages)
    except OSError:
        return 1
