"""Bytes of files onto a GPU at the speed of its bus: whatever is in the page cache, and whatever is not yet.

What torch does for memory that is not pinned reaches 4 to 8 GB/s where the bus gives 53; copies from pinned memory
reach the bus. There are two ways to have weights in such memory: several threads read them into buffers that are pinned
already (`prefetch.ring`), or the pages they are in are pinned where they are (`prefetch.windows`).

`shared` gives the one pool that a process has for a device. Everything the driver is asked for happens in threads of
this room: the caller's thread keeps the CUDA context it has.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final, Literal

from prefetch.devices import Driver
from prefetch.direct import Reads
from prefetch.errors import CopyCancelledError, NoDeviceError, StagingError
from prefetch.feed import Feed, together
from prefetch.near import processors_near, stay_near
from prefetch.pieces import Piece, jobs_of
from prefetch.reading import Sources
from prefetch.ring import RingLane
from prefetch.windows import RefusedError, Retirement, WindowLane

log = logging.getLogger(__name__)

__all__ = [
    "Copied",
    "CopyCancelledError",
    "Driver",
    "NoDeviceError",
    "Piece",
    "Staging",
    "StagingConfig",
    "StagingError",
    "close_shared",
    "shared",
]

_RING_THREADS: Final = 12

Way = Literal["ring", "windows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StagingConfig:
    """How much memory and how many threads a pool may take.

    Attributes:
        way: how bytes of the page cache are copied; None is whichever is faster here.
        threads: the most that read at once; by default 12, or three quarters of the processors where those are fewer.
        buffers: of each of them.
        buffer_bytes: of each buffer, a multiple of the page size. All of them are pinned memory: 576 MiB by default.
        window_threads: the most that pin windows of the page cache at once.
        window_bytes: of each window, a multiple of the page size.
    """

    way: Way | None = None
    threads: int | None = None
    buffers: int = 3
    buffer_bytes: int = 16 << 20
    window_threads: int = 4
    window_bytes: int = 128 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """What a copy did.

    Attributes:
        nbytes: bytes that are on the device now.
        seconds: how long it took.
        way: how they came there.
        threads: that took part.
        past_cache_bytes: how much was read past the page cache.
        waited_s: how long each of them waited for a buffer that the GPU still read, on average; near 0 where reading is
            what takes so long.
    """

    nbytes: int
    seconds: float
    way: Way
    threads: int
    past_cache_bytes: int
    waited_s: float


class Staging:
    """A pool of pinned memory for one device. Copies of several threads take turns; any thread may call it.

    Args:
        driver: see `prefetch.devices`.
        device: its number, as CUDA counts in this process.
        config: see there.

    Raises:
        NoDeviceError: there is no such device.
    """

    def __init__(self, driver: Driver, *, device: int = 0, config: StagingConfig | None = None) -> None:
        self._driver = driver
        self._device = device
        self._config = config or StagingConfig()
        self._turn = threading.Lock()
        self._ring: dict[int, RingLane] = {}
        self._windows: dict[int, WindowLane] = {}
        self._retirement = Retirement(driver, device)
        self._closed = False
        driver.retain(device)
        self._near = processors_near(driver.pci_address(device))
        processors = len(os.sched_getaffinity(0) if self._near is None else self._near)
        self._ring_threads = self._config.threads or max(1, min(_RING_THREADS, processors * 3 // 4))
        self._way: Way = self._config.way or "ring"
        if self._way == "windows" and not driver.can_register(device):
            self._way = "ring"

    def copy(
        self, pieces: Iterable[Piece], *, cancelled: Callable[[], bool] | None = None, past_cache: bool = True
    ) -> Copied:
        """Copy bytes of files to the device; returns once all of them are there, and begins them in their order.

        The memory at the pieces' addresses must be ready: whoever has work of the GPU under way that still uses it, as
        torch may on a stream of its own, waits for that first.

        Args:
            pieces: what goes where.
            cancelled: asked before each read, in any thread; once it says yes the copy ends, some of it done.
            past_cache: read what is not in memory past the page cache, which is faster and leaves it as it was. False
                is for files that somebody reads into it right now, which would be read twice.

        Raises:
            ShortReadError: a file ends before a piece of it does.
            IntegrityError: a file changed meanwhile.
            CopyCancelledError: it was called off.
            StagingError: the driver failed, or the pool is closed.
            OSError: a file can't be read.
            ValueError: a piece makes no sense.
        """
        pieces = list(pieces)
        with self._turn:
            if self._closed:
                raise StagingError("the pool is closed")
            if any(lane.is_lost for lane in self._lanes()):
                raise StagingError("the GPU failed in an earlier copy", mend="start the process anew; nvidia-smi")
            started = time.perf_counter()
            sources = Sources(pieces)
            with Reads(pieces, past_cache=past_cache) as reads:
                way = self._way if reads.all_resident else "ring"
                try:
                    copied = self._copy(pieces, way, reads, cancelled)
                except RefusedError as error:
                    sources.check()  # pages of a file that has ended can't be pinned either
                    log.info("the driver pins no mapped files here, buffers are used: %s", error)
                    self._way = "ring"
                    copied = self._copy(pieces, "ring", reads, cancelled)
                finally:
                    self._retirement.begin()
            sources.check()
            return replace(copied, seconds=time.perf_counter() - started)

    def close(self) -> None:
        """Give all memory back, once a copy that is under way has ended; a second call does nothing.

        Raises:
            StagingError: the driver failed.
        """
        with self._turn:
            if self._closed:
                return
            self._closed = True
            self._retirement.finish()
            feed = Feed((), None)
            together(lambda _: self._give_back(), 1, feed)
            if feed.error is not None:
                raise feed.error

    def _copy(self, pieces: list[Piece], way: Way, reads: Reads, cancelled: Callable[[], bool] | None) -> Copied:
        config = self._config
        jobs = jobs_of(pieces, config.buffer_bytes if way == "ring" else config.window_bytes)
        threads = min(self._ring_threads if way == "ring" else config.window_threads, len(jobs))
        feed = Feed(jobs, cancelled)
        waited_s = self._waited_s()
        together(lambda number: self._work(way, number, feed, reads), threads, feed)
        if feed.error is not None:
            raise feed.error
        return Copied(
            nbytes=sum(piece.nbytes for piece in pieces),
            seconds=0,
            way=way,
            threads=threads,
            past_cache_bytes=reads.past_cache_bytes,
            waited_s=(self._waited_s() - waited_s) / max(threads, 1),
        )

    def _work(self, way: Way, number: int, feed: Feed, reads: Reads) -> None:
        """What each thread of a copy does. Its lane is its own work, too: memory is pinned by all of them at once."""
        stay_near(self._near)
        self._driver.use(self._device)
        if way == "ring":
            ring = self._ring.get(number)
            if ring is None:
                ring = self._ring[number] = RingLane(self._driver, self._config.buffers, self._config.buffer_bytes)
            ring.run(feed, reads.read)
        else:
            windows = self._windows.get(number)
            if windows is None:
                windows = self._windows[number] = WindowLane(self._driver, self._retirement.add)
            windows.run(feed)

    def _lanes(self) -> list[RingLane | WindowLane]:
        return [*self._ring.values(), *self._windows.values()]

    def _waited_s(self) -> float:
        return sum(lane.waited_s for lane in self._ring.values())

    def _give_back(self) -> None:
        self._driver.use(self._device)
        try:
            for lane in self._lanes():
                lane.close()
        finally:
            self._ring.clear()
            self._windows.clear()
            self._driver.release(self._device)


_shared: dict[int, Staging] = {}
_shared_turn = threading.Lock()


def shared(device: int = 0) -> Staging:
    """The pool of this process for a device, made at the first call.

    Raises:
        NoDeviceError: no GPU can be used; says why, and what to install.
    """
    with _shared_turn:
        if (found := _shared.get(device)) is None:
            from prefetch.pinned import Driver as PinnedDriver

            found = _shared[device] = Staging(PinnedDriver(), device=device)
        return found


def close_shared() -> None:
    """Close every pool that `shared` gave, before a snapshot for example; the next call of `shared` makes a new one.

    Raises:
        StagingError: the driver failed.
    """
    with _shared_turn:
        pools = list(_shared.values())
        _shared.clear()
    for pool in pools:
        pool.close()


def _forget() -> None:
    """In a child after a fork: neither CUDA nor threads are there, and what the parent pinned is not the child's."""
    global _shared_turn
    _shared.clear()
    _shared_turn = threading.Lock()


os.register_at_fork(after_in_child=_forget)
