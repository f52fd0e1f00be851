"""Reads files into the page cache: several threads, each with a large read under way, none of which holds the GIL.

Each reads by sendfile(2) to /dev/null: the kernel reads the pages in and hands on references to them, so that nothing
is copied and the device sees the large, sequential reads that its read-ahead makes. Measured on a disk of 3.5 GB/s,
1 GiB cold, GB/s and the processor's seconds a GB, at `read_ahead_kb` 128 and 8192:

    sendfile, 16 threads of 4 MiB, a descriptor each    2.8, 0.14    2.1, 0.26
    preadv, the same                                    1.9, 0.76    1.6, 0.68
    MADV_POPULATE_READ, 16 of 2 MiB                     2.2, 0.32    2.4, 0.26
    readahead(2) in windows of 128 KiB, 4 threads       1.8, 0.61    2.1, 0.56
    fio, io_uring, direct, 4 MiB x 16                   1.8          3.2

readahead and WILLNEED read page by page into small folios, which costs the processor; preadv copies. A descriptor of
its own keeps a thread's read-ahead from being confused by the others'.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from prefetch.plan import Extent
from prefetch.residency import is_resident
from weightfs import linux

log = logging.getLogger(__name__)

CHUNK_BYTES: Final = 4 << 20
_HELD_S: Final = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class FillerConfig:
    """How hard the disk is driven.

    Attributes:
        depth: reads under way at once.
        depth_beside_demand: the same while somebody waits for a request that reached user space.
    """

    depth: int = 16
    depth_beside_demand: int = 4


@dataclass(eq=False, slots=True)
class Fill:
    """One model being read in. Counters may be read from any thread.

    Attributes:
        chunks: what to read, a read each; see `cut`.
        fds: a descriptor for each file, by the chunks' names of it, which must stay open until `on_end` is called.
        on_end: called in a thread of the filler once nothing of it is under way any more, and before `ended` is set.
        submitted_at: when the first read was begun (monotonic), None before.
        filled_bytes: read in so far, by this fill.
        skipped_bytes: found in memory.
        failure: why it ended early, None when it did not.
    """

    chunks: Iterator[Extent]
    fds: dict[str, int]
    on_end: Callable[[], None]
    submitted_at: float | None = None
    filled_bytes: int = 0
    skipped_bytes: int = 0
    failure: str | None = None
    cancelled: bool = False
    exhausted: bool = False
    working: int = 0
    ended: threading.Event = field(default_factory=threading.Event)

    def cancel(self, why: str) -> None:
        """Begin no further read; those under way end by themselves."""
        self.failure = self.failure or why
        self.cancelled = True


class Filler:
    """The threads, shared fairly: each next read is the next model's, in turn.

    Args:
        config: see there.
        demand: whether somebody waits for a read in user space; called in any thread.
    """

    def __init__(self, config: FillerConfig, demand: Callable[[], bool] = lambda: False) -> None:
        self._config = config
        self._demand = demand
        self._turn = threading.Condition()
        self._fills: deque[Fill] = deque()
        self._ended: deque[Fill] = deque()  # nothing of them is under way, and nobody was told yet
        self._threads: list[threading.Thread] = []
        self._working = 0
        self._ends = False
        self.halted = False
        self.filled_bytes = 0

    def start(self, fill: Fill) -> None:
        """Read what a fill has, in its order, beside what others have."""
        with self._turn:
            self._fills.append(fill)
            while len(self._threads) < self._config.depth:
                thread = threading.Thread(target=self._work, name="filler", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._turn.notify_all()

    def cancel(self, fill: Fill, why: str) -> None:
        """End a fill early."""
        with self._turn:
            fill.cancel(why)
            self._turn.notify_all()

    def halt(self, halted: bool) -> None:
        """Begin no read for now, or go on."""
        with self._turn:
            self.halted = halted
            self._turn.notify_all()

    def close(self) -> None:
        """Begin no further read, and wait for none: a device may never answer."""
        with self._turn:
            self._ends = True
            for fill in self._fills:
                fill.cancel("the daemon ended")
            self._turn.notify_all()

    def _work(self) -> None:
        try:
            linux.be_idle_io()
        except OSError as e:
            log.debug("no idle priority: %s", e.strerror)
        with open(os.devnull, "wb", buffering=0) as sink:
            while (taken := self._take()) is not None:
                fill, chunk = taken
                if chunk is None:
                    self._end(fill)
                    continue
                try:
                    self._fill(fill, chunk, sink.fileno())
                except OSError as e:
                    fill.cancel(f"{chunk.file}: {os.strerror(e.errno or 0)}")
                    log.warning("prefetch of %s ends at byte %d: %s", chunk.file, chunk.offset, e.strerror)
                self._done(fill)

    def _take(self) -> tuple[Fill, Extent | None] | None:
        """The next read, or a fill to end; None when the filler ends."""
        with self._turn:
            while not self._ends:
                self._sort_out()
                if self._ended:
                    return self._ended.popleft(), None
                if self.halted or not self._fills:
                    self._turn.wait()
                elif self._working >= self._config.depth_beside_demand and self._demand():
                    self._turn.wait(_HELD_S)
                else:
                    fill = self._fills[0]
                    if (chunk := next(fill.chunks, None)) is None:
                        fill.exhausted = True
                        continue
                    self._fills.rotate(-1)
                    fill.working += 1
                    self._working += 1
                    return fill, chunk
            return None

    def _sort_out(self) -> None:
        """Take fills of which nothing is left to begin out of the turn."""
        for fill in [fill for fill in self._fills if fill.cancelled or fill.exhausted]:
            self._fills.remove(fill)
            fill.exhausted = True
            if not fill.working:
                self._ended.append(fill)

    def _fill(self, fill: Fill, chunk: Extent, sink: int) -> None:
        fd = fill.fds[chunk.file]
        if fill.submitted_at is None:
            fill.submitted_at = time.monotonic()
        if is_resident(fd, chunk.offset, chunk.nbytes):
            fill.skipped_bytes += chunk.nbytes
            return
        own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(own, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            at, end = chunk.offset, chunk.offset + chunk.nbytes
            while at < end and not fill.cancelled:
                moved = os.sendfile(sink, own, at, end - at)
                if not moved:
                    fill.cancel(f"{chunk.file}: ends at byte {at} now")
                    return
                at += moved
                fill.filled_bytes += moved
                self.filled_bytes += moved
        finally:
            os.close(own)

    def _done(self, fill: Fill) -> None:
        with self._turn:
            fill.working -= 1
            self._working -= 1
            if fill.exhausted and not fill.working:
                self._ended.append(fill)
            self._turn.notify()

    def _end(self, fill: Fill) -> None:
        """Without the lock: whoever is told may wait for the device."""
        try:
            fill.on_end()
        except Exception:
            log.exception("the end of a prefetch failed")
        fill.ended.set()


def cut(extents: Iterator[Extent], chunk_bytes: int = CHUNK_BYTES) -> Iterator[Extent]:
    """Extents as reads of `chunk_bytes` at most."""
    for extent in extents:
        for start in range(0, extent.nbytes, chunk_bytes):
            yield Extent(extent.file, extent.offset + start, min(chunk_bytes, extent.nbytes - start))
