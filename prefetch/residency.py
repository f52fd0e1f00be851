"""How much of a file is in memory, asked of the backing file: through the mount both calls say something else.

cachestat(2) also counts pages whose read is under way; mincore(2), for kernels before 6.5 and for whoever must be sure,
does not, and tells the truth to a file's owner only.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterable
from typing import Final

from prefetch.plan import Extent
from weightfs import linux

_PAGE: Final = mmap.PAGESIZE
_UNKNOWN: Final = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM})


def resident_bytes(fd: int, offset: int, nbytes: int) -> int:
    """Bytes of a range that lie in pages that are in the page cache or on their way there, `nbytes` at most.

    Raises:
        OSError: neither call can tell.
    """
    if nbytes <= 0:
        return 0
    start = offset // _PAGE * _PAGE
    length = offset + nbytes - start
    try:
        pages = linux.cachestat(fd, start, length)
    except OSError as e:
        if e.errno not in _UNKNOWN:
            raise
        pages = linux.mincore(fd, start, length)
    return min(nbytes, pages * _PAGE)


def is_resident(fd: int, offset: int, nbytes: int) -> bool:
    """Whether a range need not be read: every page is there and up to date.

    A page whose read is under way is not: the kernel takes pages that it did not get to read out of the cache again.

    Raises:
        OSError: the kernel can't tell.
    """
    if resident_bytes(fd, offset, nbytes) < nbytes:
        return False
    start = offset // _PAGE * _PAGE
    length = offset + nbytes - start
    return linux.mincore(fd, start, length) * _PAGE >= length


def resident_of(extents: Iterable[Extent], fds: dict[str, int]) -> int:
    """Bytes in memory of extents of several files; a file that is not there any more has none."""
    return sum(resident_bytes(fds[extent.file], extent.offset, extent.nbytes) for extent in extents)


def drop(fd: int) -> None:
    """Give the page cache of a whole file back, but for pages that are mapped or dirty."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
