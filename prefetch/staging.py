"""Bytes of files onto a GPU at the speed of its bus: whatever is in the page cache, and whatever is not yet.

What torch does for memory that is not pinned reaches 4 to 8 GB/s where the bus gives 53; copies from pinned memory
reach the bus, so pinned buffers are what files are read into (see `prefetch.ring`), by several threads at once.

`shared` gives the one pool that a process has for a device. Everything the driver is asked for happens in threads of
this room: the caller's thread keeps the CUDA context it has.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Literal

from prefetch.devices import Driver
from prefetch.errors import CopyCancelledError, NoDeviceError, StagingError
from prefetch.pieces import Job, Piece, jobs_of
from prefetch.reading import fill
from prefetch.ring import Feed, Lane, close_all

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

_THREADS: Final = 12

Way = Literal["ring"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StagingConfig:
    """How much memory and how many threads a pool may take.

    Attributes:
        threads: the most that read at once; by default 12, or three quarters of the processors where those are fewer.
        buffers: of each thread.
        buffer_bytes: of each buffer, a multiple of the page size. All of them are pinned memory: 576 MiB by default.
    """

    threads: int | None = None
    buffers: int = 3
    buffer_bytes: int = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """What a copy did.

    Attributes:
        nbytes: bytes that are on the device now.
        seconds: how long it took.
        way: how they came there.
        threads: that took part.
        waited_s: how long each of them waited for the GPU, on average; near 0 where reading is what takes so long.
    """

    nbytes: int
    seconds: float
    way: Way
    threads: int
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
        self._lanes: dict[int, Lane] = {}
        self._closed = False
        self._most_threads = self._config.threads or max(1, min(_THREADS, len(os.sched_getaffinity(0)) * 3 // 4))
        driver.retain(device)

    def copy(self, pieces: Iterable[Piece], *, cancelled: Callable[[], bool] | None = None) -> Copied:
        """Copy bytes of files to the device; returns once all of them are there, and begins them in their order.

        The memory at the pieces' addresses must be ready: whoever has work of the GPU under way that still uses it, as
        torch may on a stream of its own, waits for that first.

        Args:
            pieces: what goes where.
            cancelled: asked before each read, in any thread; once it says yes the copy ends, some of it done.

        Raises:
            ShortReadError: a file ends before a piece of it does.
            CopyCancelledError: it was called off.
            StagingError: the driver failed, or the pool is closed.
            OSError: a file can't be read.
            ValueError: a piece makes no sense.
        """
        jobs = jobs_of(pieces, self._config.buffer_bytes)
        with self._turn:
            if self._closed:
                raise StagingError("the pool is closed")
            if any(lane.is_lost for lane in self._lanes.values()):
                raise StagingError("the GPU failed in an earlier copy", mend="start the process anew; nvidia-smi")
            started = time.perf_counter()
            feed = Feed(jobs, cancelled)
            threads = min(self._most_threads, len(jobs))
            waited_s = self._waited_s()
            _together(lambda number: self._work(number, feed), threads, feed)
            if feed.error is not None:
                raise feed.error
            return Copied(
                nbytes=sum(span.nbytes for job in jobs for span in job.spans),
                seconds=time.perf_counter() - started,
                way="ring",
                threads=threads,
                waited_s=(self._waited_s() - waited_s) / max(threads, 1),
            )

    def close(self) -> None:
        """Give all memory back, once a copy that is under way has ended; a second call does nothing.

        Raises:
            StagingError: the driver failed.
        """
        with self._turn:
            if self._closed:
                return
            self._closed = True
            feed = Feed((), None)
            _together(lambda _: self._give_back(), 1, feed)
            if feed.error is not None:
                raise feed.error

    def _waited_s(self) -> float:
        return sum(lane.waited_s for lane in self._lanes.values())

    def _give_back(self) -> None:
        self._driver.use(self._device)
        try:
            close_all(list(self._lanes.values()))
        finally:
            self._lanes.clear()
            self._driver.release(self._device)

    def _work(self, number: int, feed: Feed) -> None:
        self._driver.use(self._device)
        if (lane := self._lanes.get(number)) is None:
            # Made by its own thread, so that memory is pinned by all at once, and near to who writes it.
            lane = self._lanes[number] = Lane(self._driver, self._config.buffers, self._config.buffer_bytes)
        lane.run(feed, _read)


def _read(job: Job, memory: memoryview) -> None:
    fill(job.fd, memory[: job.nbytes], job.offset)


def _together(work: Callable[[int], None], threads: int, feed: Feed) -> None:
    """Have threads work and wait for all of them, whatever comes; the first error goes to the feed.

    Ctrl-C ends the feed as an error does and is raised once no thread works any more: until then the GPU may read.
    """

    def one(number: int) -> None:
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001  handed on by the feed
            feed.fail(error)

    started = []
    interruption: BaseException | None = None
    try:
        for number in range(threads):
            thread = threading.Thread(target=one, args=(number,), name=f"staging-{number}", daemon=True)
            thread.start()
            started.append(thread)
    except BaseException as error:  # noqa: BLE001  raised below
        feed.fail(error)
        interruption = error
    while started:
        try:
            started[-1].join()
            started.pop()
        except BaseException as error:  # noqa: BLE001  raised below
            feed.fail(error)
            interruption = interruption or error
    if interruption is not None:
        raise interruption


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
