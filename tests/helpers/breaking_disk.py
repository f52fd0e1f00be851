"""A disk on which a process dies at some call that changes it, while the test goes on.

From that call on nothing changes any more, whatever is tried: what `finally` and `except` would mend stays as it is.
Locks go with the descriptors, as they do when a process dies. A file that gets its name before its content was synced
fails the test: a machine that loses power would have an empty one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

CALLS = ("mkdir", "open", "link", "rename", "unlink", "pwritev", "pwrite", "fsync")


class Killed(BaseException):
    """The process would be dead."""


class BreakingDisk:
    """Counts the calls that change the disk.

    Args:
        dies_at: the call that is not made any more; None where all are.
    """

    def __init__(self, dies_at: int | None) -> None:
        self.count = 0
        self._dies_at = dies_at
        self._unsynced: set[int] = set()

    def made(self, name: str, call: Any, *arguments: Any, **named: Any) -> Any:
        if name == "open" and not arguments[1] & (os.O_CREAT | os.O_TRUNC):
            return call(*arguments, **named)
        self.count += 1
        if self._dies_at is not None and self.count > self._dies_at:
            raise Killed
        if name in ("rename", "link"):
            assert os.stat(arguments[0]).st_ino not in self._unsynced, f"{arguments[0]} has its name too early"
        result = call(*arguments, **named)
        if name in ("pwritev", "pwrite"):
            self._unsynced.add(os.fstat(arguments[0]).st_ino)
        elif name == "fsync":
            self._unsynced.discard(os.fstat(arguments[0]).st_ino)
        return result


@contextlib.contextmanager
def breaking_disk(dies_at: int | None) -> Iterator[BreakingDisk]:
    """For as long as this lasts, such a disk; ends quietly where the process died."""
    disk = BreakingDisk(dies_at)

    def counted(name: str) -> Any:
        call = getattr(os, name)
        return lambda *arguments, **named: disk.made(name, call, *arguments, **named)

    with contextlib.ExitStack() as patches, contextlib.suppress(Killed):
        for name in CALLS:
            patches.enter_context(mock.patch.object(os, name, counted(name)))
        yield disk
