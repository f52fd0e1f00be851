"""A stretch of a file that is read on and on through a descriptor of its own, without a copy.

What the kernel has under way for it is its read-ahead, which begins with small pages in small windows at each new
descriptor, and in later windows has pages four times as large as in the one before, to those of 2 MiB. So one stretch
is read with one descriptor, as long as that lasts: with `read_ahead_kb` 8192 and one reader (GB/s, the processor's
seconds a GB, and GB/s of a loader that reads it from memory then; on a machine with four times more to do than it has
processors)

    a new descriptor each   4 MiB, eight readers    0.8   0.30   1.3
                            4 MiB                   1.2   0.14   1.2
                           32 MiB                   1.5   0.11   1.2
                           64 MiB                   1.5   0.06   1.3
    one for all             first, then again       0.5, 1.4   0.04   0.4, 2.0

and not much longer: with pages of 2 MiB at last, each is memory that a hypervisor which takes back free memory must
find again, as in the last row, whereas smaller ones come of what programs have used and given back.
"""

from __future__ import annotations

import os
from typing import Final

from prefetch.plan import Extent

_MOST_BYTES: Final = 64 << 20


class Stream:
    """From the beginning of `extent` on.

    Args:
        fd: of its file; one of its own is made.
        extent: where reading begins.
        ahead: whether the kernel reads ahead of it.
    """

    def __init__(self, fd: int, extent: Extent, *, ahead: bool) -> None:
        self._file = extent.file
        self._begun = self.at = extent.offset
        self._ahead = ahead
        self._fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL if ahead else os.POSIX_FADV_RANDOM)

    def leads_to(self, extent: Extent) -> bool:
        """Whether that follows on what was read, and is better read with this than with a new one."""
        is_next = self._file == extent.file and self.at == extent.offset
        return is_next and self._ahead and self.at - self._begun < _MOST_BYTES

    def send(self, sink: int, nbytes: int) -> int:
        """Have the next `nbytes` in memory; gives how many there are, 0 at the end of the file.

        Args:
            sink: a descriptor of /dev/null, which takes references to pages and looks at none.
            nbytes: at most.
        """
        moved = os.sendfile(sink, self._fd, self.at, nbytes)
        self.at += moved
        return moved

    def close(self) -> None:
        """Reading goes on nowhere."""
        os.close(self._fd)
