"""Reads files into the page cache: several threads, each with a read of its own under way, none of which holds the GIL.

A read is of a huge page: a part of the file is mapped, advised MADV_HUGEPAGE and MADV_RANDOM, and populated
(MADV_POPULATE_READ). The kernel then asks the disk for 2 MiB at once, whatever `read_ahead_kb` is, puts them into one
huge page where the filesystem knows large folios, and reads nothing further ahead: what is needed first comes first,
and what is under way at once is known. A loader that maps such a file has 30 times fewer faults: it reads 14 GB/s
where it reads 8 of small pages. Measured on a disk of 4 GB/s behind virtio, 1.5 GiB cold, `read_ahead_kb` 8192; GB/s
and the processor's seconds a GB:

    huge pages, 1, 2, 4, 16 threads                     3.4  3.9  4.1  4.2    0.05
    sendfile to /dev/null, 16 threads of 4 MiB          2.3 to 3.7            0.20
    MADV_POPULATE_READ alone, 16 of 4 MiB               1.3 to 1.6            0.43
    readahead(2), 16 of 4 MiB                           1.7 to 1.8            0.32
    preadv, 16 of 4 MiB                                 1.0 to 1.4            0.75

All others read small pages, which costs the processor, or copy; and what they have under way beside a read of 4 MiB
may be 16 MiB of read-ahead. sendfile(2), which hands on references to pages, is left for

- a guest whose free memory its hypervisor takes back in blocks of that size: there a huge page is memory that the host
  has to find again. On such a machine the filler took 1.8 s instead of 1.0, and the loader after it read 1.3 GB/s
  instead of 6.5, though 14 the second time;
- parts of less than a quarter of a MiB, read without read-ahead;
- kernels before 5.18, where populating reads page by page.

At `read_ahead_kb` 128 it gives 1.5 to 2.4 GB/s with 8 threads of 4 MiB, and takes 0.12 to 0.16 s a GB; with 8 of 1 MiB
1.0 to 1.4 and 0.3: each begins with small pages. At 8192 one thread is as fast as eight, whose read-ahead meets in the
same pages (1.1 to 1.3 GB/s and 0.15 s, against 0.8 and 0.35, with four times more at work than there are processors):
so as many threads read as have 16 MiB of read-ahead together, each going on with its descriptor (see `Stream`).
What a daemon takes at 8192 fell from 0.53 s a GB to 0.22 by that and by not asking the kernel 40 times a second how
much of the model there is (a third of it: see `prefetch.pace` and `prefetch.underway`).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from prefetch.course import CHUNK_BYTES, Course
from prefetch.pace import Disks, Pace
from prefetch.plan import Extent
from prefetch.residency import is_resident, resident_bytes
from prefetch.stream import Stream
from weightfs import linux

log = logging.getLogger(__name__)

_HUGE_BYTES: Final = 2 << 20
"""Of most processors. Where huge pages are of another size sendfile reads."""
_PIECE_BYTES: Final = 512 << 10
"""What sendfile moves at a time: the pace is to know soon what has come."""
_SMALL_BYTES: Final = 256 << 10
"""A part that is smaller, as orders that were learned have them, is read alone and not with its huge page."""
_UNDER_WAY_BYTES: Final = 16 << 20
"""Under way at once. Who reads beside it waits as long as these take: 5 ms at 3 GB/s."""
_POPULATES_SINCE: Final = 5, 18
_EVERYTHING: Final = 1 << 62
_HELD_S: Final = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class FillerConfig:
    """How hard the disk is driven.

    Attributes:
        depth: reads under way at once. Two of 2 MiB keep a local disk busy; more do that for one far away, but what is
            under way when somebody else begins to read is before them.
        depth_beside_demand: the same while somebody waits for a request that reached user space.
    """

    depth: int = 8
    depth_beside_demand: int = 4


@dataclass(eq=False, slots=True)
class Fill:
    """One model being read in. Counters may be read from any thread.

    Attributes:
        chunks: what to read, a read each.
        fds: a descriptor for each file, by the chunks' names of it, which must stay open until `on_end` is called.
        awaited: whether its loader has the weights open. Then it is read with the usual I/O priority, else with the
            idle one, behind whatever anybody reads.
        on_end: called in a thread of the filler once nothing of it is under way any more, and before `ended` is set.
        submitted_at: when the first read was begun (monotonic), None before.
        filled_bytes: read in so far, by this fill.
        skipped_bytes: found in memory.
        failure: why it ended early, None when it did not.
    """

    chunks: Course
    fds: dict[str, int]
    on_end: Callable[[], None]
    awaited: bool = False
    submitted_at: float | None = None
    filled_bytes: int = 0
    skipped_bytes: int = 0
    failure: str | None = None
    cancelled: bool = False
    exhausted: bool = False
    working: int = 0
    written_off: int = 0
    stream: Stream | None = None
    devices: set[int] = field(default_factory=set)
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
        self._can_populate = linux.kernel_version() >= _POPULATES_SINCE and linux.huge_page_bytes() == _HUGE_BYTES
        self._populates = self._can_populate and not linux.reports_free_pages()
        self._each_bytes = _HUGE_BYTES  # under way for one read
        self._unseen_bytes = _HUGE_BYTES  # of one read, come before the pace is told
        self._disks = Disks()
        self._pace = Pace(self._disks.counters, self._resident)
        self._turn = threading.Condition()
        self._fills: deque[Fill] = deque()
        self._ended: deque[Fill] = deque()  # nothing of them is under way, and nobody was told yet
        self._threads: list[threading.Thread] = []
        self._working = 0
        self._lost = 0  # reads of fills that were cancelled, which may never end
        self._ends = False
        self.halted = False
        self.filled_bytes = 0

    def start(self, fill: Fill) -> None:
        """Read what a fill has, in its order, beside what others have."""
        fill.devices = {os.fstat(fd).st_dev for fd in fill.fds.values()}
        with self._turn:
            self._fills.append(fill)
            self._look_elsewhere()
        self._man()

    def cancel(self, fill: Fill, why: str) -> None:
        """End a fill early."""
        with self._turn:
            fill.cancel(why)
            self._sort_out()
        self._man()

    def _man(self) -> None:
        """As many threads as may read, beside those that may never come back."""
        with self._turn:
            more = range(self._config.depth + self._lost - len(self._threads))
            threads = [threading.Thread(target=self._work, name="filler", daemon=True) for _ in more]
            self._threads += threads
            self._turn.notify_all()
        for thread in threads:  # the first of them reads before the last has begun
            thread.start()

    def lead(self, fill: Fill, place: Extent) -> None:
        """Go on elsewhere; see `Course.lead`."""
        with self._turn:
            fill.chunks.lead(place)

    @property
    def runs_ahead(self) -> bool:
        """Whether the kernel reads hardly further than we do: then what we did not read was read by somebody else."""
        return self._unseen_bytes <= _HUGE_BYTES

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
        with open(os.devnull, "wb", buffering=0) as sink:
            while (taken := self._take()) is not None:
                fill, chunk = taken
                if chunk is None:
                    self._end(fill)
                    continue
                read = 0
                try:
                    # Behind the reads of its own loader, prefetch would be as slow as they are.
                    with contextlib.suppress(OSError):  # some containers may not
                        linux.set_io_priority(idle=self._pace.yields or not fill.awaited)
                    read = self._fill(fill, chunk, sink.fileno())
                except OSError as e:
                    fill.cancel(f"{chunk.file}: {os.strerror(e.errno or 0)}")
                    log.warning("prefetch of %s ends at byte %d: %s", chunk.file, chunk.offset, e.strerror)
                self._done(fill, read)

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
                elif self._working >= self._depth():
                    self._turn.wait()
                elif (wait_s := self._pace.wait_s(self._working, max(self._working, 1) * self._unseen_bytes)) > 0:
                    self._turn.wait(wait_s)
                elif (chosen := self._choose()) is not None:
                    chosen[0].working += 1
                    self._working += 1
                    self._turn.notify()  # who waited until nothing is under way need not wait any more
                    return chosen
                elif not any(fill.exhausted for fill in self._fills):
                    self._turn.wait()
            return None

    def _choose(self) -> tuple[Fill, Extent] | None:
        """The next read in turn. What is under way may put back a part of it: until it ended nothing is exhausted."""
        for fill in list(self._fills):
            if (chunk := next(fill.chunks, None)) is not None:
                self._fills.remove(fill)
                self._fills.append(fill)
                return fill, chunk
            fill.exhausted = not fill.working
        return None

    def _depth(self) -> int:
        """How many reads may be under way: one for each model at least."""
        return min(self._config.depth, max(len(self._fills), _UNDER_WAY_BYTES // self._each_bytes))

    def _sort_out(self) -> None:
        """Take fills of which nothing is left to read out of the turn."""
        for fill in [fill for fill in self._fills if fill.cancelled or fill.exhausted]:
            self._fills.remove(fill)
            self._look_elsewhere()
            fill.exhausted = True
            fill.written_off = fill.working  # what never ends of one that was cancelled holds up nobody else
            self._working -= fill.working
            self._lost += fill.working
            if not fill.working:
                self._ended.append(fill)

    def _look_elsewhere(self) -> None:
        """What is to be read lies on other disks, maybe."""
        self._disks.follow({device for fill in self._fills for device in fill.devices})
        ahead = max(_SMALL_BYTES, 2 * self._disks.read_ahead_bytes())
        self._each_bytes = _HUGE_BYTES if self._populates else ahead
        self._unseen_bytes = _HUGE_BYTES if self._populates else _PIECE_BYTES + ahead
        self._pace.restart()

    def _resident(self) -> int | None:
        """Bytes in memory of all that is being filled. Waits for no device."""
        try:
            return sum(resident_bytes(fd, 0, _EVERYTHING) for fill in self._fills for fd in fill.fds.values())
        except OSError:  # mincore(2) must be told how long a file is
            return None

    def _fill(self, fill: Fill, chunk: Extent, sink: int) -> int:
        """Read a chunk, unless it is there; gives how much the disk has to read for it."""
        fd = fill.fds[chunk.file]
        if fill.submitted_at is None:
            fill.submitted_at = time.monotonic()
        if (stream := self._going_on(fill, chunk)) is not None:
            return self._send(fill, chunk, stream, sink)
        if is_resident(fd, chunk.offset, chunk.nbytes):
            fill.skipped_bytes += chunk.nbytes
            return 0
        # Beside others huge pages are read on any machine: it is known how much of the disk's time that takes.
        populates = self._populates or (self._can_populate and self._pace.yields)
        if populates and chunk.nbytes >= _SMALL_BYTES:
            return self._populate(fill, chunk, fd)
        return self._send(fill, chunk, Stream(fd, chunk, ahead=chunk.nbytes >= _SMALL_BYTES), sink)

    def _going_on(self, fill: Fill, chunk: Extent) -> Stream | None:
        """The stream that leads to a chunk, which is the caller's then."""
        with self._turn:
            stream = fill.stream
            if stream is None or self._pace.yields or not stream.leads_to(chunk):
                return None
            fill.stream = None
        return stream

    def _populate(self, fill: Fill, chunk: Extent, fd: int) -> int:
        start = chunk.offset // _HUGE_BYTES * _HUGE_BYTES
        end = min(-(-chunk.end // _HUGE_BYTES) * _HUGE_BYTES, os.fstat(fd).st_size)
        missing = left = max(0, end - start - resident_bytes(fd, start, end - start))
        try:
            for at in range(start, chunk.end, _HUGE_BYTES):
                until = min(at + _HUGE_BYTES, chunk.end)
                linux.populate_huge(fd, at, until - at)
                self._came(fill, until - max(at, chunk.offset), min(left, _HUGE_BYTES))
                left -= min(left, _HUGE_BYTES)
                if self._stops(fill, chunk, until):
                    break
        except OSError as e:
            if e.errno != errno.EFAULT:
                raise
            if (size := os.fstat(fd).st_size) < chunk.end:
                fill.cancel(f"{chunk.file}: ends at byte {size} now")
                return 0
            raise OSError(errno.EIO, os.strerror(errno.EIO)) from e
        return missing - left

    def _send(self, fill: Fill, chunk: Extent, stream: Stream, sink: int) -> int:
        try:
            while stream.at < chunk.end and not fill.cancelled:
                moved = stream.send(sink, min(chunk.end - stream.at, _PIECE_BYTES))
                if not moved:
                    fill.cancel(f"{chunk.file}: ends at byte {stream.at} now")
                    break
                self._came(fill, moved, moved)
                if self._stops(fill, chunk, stream.at):
                    break
        except BaseException:
            stream.close()
            raise
        read = stream.at - chunk.offset
        self._keep(fill, stream)
        return read

    def _keep(self, fill: Fill, stream: Stream | None) -> None:
        """The next chunk of a fill may go on where a stream ends."""
        with self._turn:
            before, fill.stream = fill.stream, stream
        if before is not None:
            before.close()

    def _stops(self, fill: Fill, chunk: Extent, at: int) -> bool:
        """Whether the rest of a chunk is left for later, because somebody else is to have the disk or the memory."""
        if at % CHUNK_BYTES or at >= chunk.end or not (self.halted or self._pace.holds):
            return False
        with self._turn:
            if fill.cancelled:
                return False
            fill.chunks.put_back(Extent(chunk.file, at, chunk.end - at))
        return True

    def _came(self, fill: Fill, nbytes: int, read_bytes: int) -> None:
        with self._turn:
            fill.filled_bytes += nbytes
            self.filled_bytes += nbytes
            self._pace.came(read_bytes)

    def _done(self, fill: Fill, read_bytes: int) -> None:
        with self._turn:
            self._pace.ended(read_bytes)
            fill.working -= 1
            if fill.written_off:
                fill.written_off -= 1
                self._lost -= 1
            else:
                self._working -= 1
            if fill.exhausted and not fill.working:
                self._ended.append(fill)
            self._turn.notify()

    def _end(self, fill: Fill) -> None:
        """Without the lock: whoever is told may wait for the device."""
        self._keep(fill, None)
        try:
            fill.on_end()
        except Exception:
            log.exception("the end of a prefetch failed")
        fill.ended.set()
