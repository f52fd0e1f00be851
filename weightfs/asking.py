"""Asking the source from the trio thread: at once where that needs no waiting, else in a thread with a deadline."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import trio

from weightfs.entries import Attributes
from weightfs.errors import DeadlineError, ForbiddenError, StaleError
from weightfs.source.base import Source, SourceStat, WouldBlockError

P = ParamSpec("P")
T = TypeVar("T")


class Asking:
    """Questions to one source. Runs on one trio thread.

    Args:
        deadline_s: a call that the source has not answered by then fails.
        threads: how many calls may wait for the source at once.
    """

    def __init__(self, source: Source, *, deadline_s: float, threads: int) -> None:
        self._source = source
        self._deadline_s = deadline_s
        self._limiter = trio.CapacityLimiter(threads)

    async def lstat(self, path: bytes) -> SourceStat:
        """`Source.lstat`.

        Raises:
            FileNotFoundError, StaleError, DeadlineError, OSError.
        """
        return await self.ask(self._source.lstat, path)

    async def attributes(self, inode: int, path: bytes, entry: SourceStat) -> Attributes:
        """An entry of the source as its inode shows; `path` is asked for a symlink's target only."""
        size = entry.size
        if entry.is_symlink:
            # The size of what readlink will say; its own where that says nothing.
            with contextlib.suppress(OSError, ForbiddenError):
                size = len(await self.wait(self._source.readlink, path))
        return Attributes(
            inode=inode,
            mode=entry.mode,
            nlink=entry.nlink,
            uid=entry.uid,
            gid=entry.gid,
            rdev=entry.rdev,
            size=size,
            blocks=entry.blocks,
            block_bytes=entry.block_bytes,
            atime_ns=entry.atime_ns,
            mtime_ns=entry.mtime_ns,
            ctime_ns=entry.ctime_ns,
        )

    async def ask(self, question: Callable[..., T], path: bytes, *more: bytes) -> T:
        """Call with `cached_only`, and where that would wait without it in a thread.

        Raises:
            FileNotFoundError: also where a folder above has become a file.
            StaleError: a folder above was replaced by a symlink.
            DeadlineError, OSError.
        """
        try:
            try:
                return question(path, *more, cached_only=True)
            except WouldBlockError:
                return await self.wait(question, path, *more)
        except NotADirectoryError:  # a folder above has become a file
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from None
        except OSError as e:
            if e.errno in (errno.ELOOP, errno.EXDEV):
                raise StaleError("a folder above it was replaced", path=os.fsdecode(path)) from None
            raise

    async def open(self, path: bytes) -> tuple[int, SourceStat]:
        """`Source.open` in a thread: a descriptor that comes after the deadline is closed by the thread that got it.

        Raises:
            UnsupportedError, DeadlineError, OSError.
        """
        lock = threading.Lock()
        late = [False]
        got: list[int] = []

        def open_file() -> tuple[int, SourceStat]:
            fd, entry = self._source.open(path)
            with lock:
                got.append(fd)
                if late[0]:
                    os.close(fd)
            return fd, entry

        try:
            return await self.wait(open_file)
        except (DeadlineError, trio.Cancelled):
            with lock:
                late[0] = True
                for fd in got:
                    os.close(fd)
            raise

    async def wait(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call in a thread; a source that does not answer costs that thread, not the caller.

        Raises:
            DeadlineError: it has not answered in time; and what the function raises.
        """
        with trio.move_on_after(self._deadline_s):
            return await trio.to_thread.run_sync(
                lambda: function(*args, **kwargs), limiter=self._limiter, abandon_on_cancel=True
            )
        raise DeadlineError(f"the source did not answer within {self._deadline_s:g} s")
