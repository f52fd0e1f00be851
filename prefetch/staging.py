"""Bytes of files onto a GPU at the speed of its bus: whatever is in the page cache, and whatever is not yet.

What torch does for memory that is not pinned reaches 4 to 8 GB/s where the bus gives 53; copies from pinned memory
reach the bus. There are two ways to have weights in such memory: several threads read them into buffers that are pinned
already (`prefetch.ring`), or the pages they are in are pinned where they are (`prefetch.windows`). Both can go on at
once, on different parts: neither alone keeps the bus busy.

`shared` gives the one pool that a process has for a device. Everything the driver is asked for happens in threads of
this room: the caller's thread keeps the CUDA context it has.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Final, TypeVar

from prefetch.devices import Driver
from prefetch.direct import Reads
from prefetch.errors import CopyCancelledError, NoDeviceError, StagingError
from prefetch.feed import Feed, together
from prefetch.near import processors_near, stay_near
from prefetch.pieces import Piece, jobs_of, split
from prefetch.reading import Sources
from prefetch.ring import RingLane
from prefetch.ways import Copied, Rates, StagingConfig, Way
from prefetch.windows import RefusedError, Retirement, WindowLane

T = TypeVar("T")

log = logging.getLogger(__name__)

__all__ = [
    "Copied",
    "CopyCancelledError",
    "Driver",
    "NoDeviceError",
    "Piece",
    "Rates",
    "Staging",
    "StagingConfig",
    "StagingError",
    "Way",
    "close_shared",
    "opened",
    "shared",
]

_RING_THREADS: Final = 12
_TRIAL_BYTES: Final = 768 << 20
"""What a way is tried with: 20 ms of a bus of 53 GB/s, and a few buffers or windows for every thread."""
_TRIAL_FROM_BYTES: Final = 4 * _TRIAL_BYTES
_PROBE_BYTES: Final = 512 << 20
_WAY: Final[Way] = "both"
"""Until it is known which is faster."""
_WAYS: Final[tuple[Way, ...]] = ("ring", "windows", "both")
_TRIED: Final[tuple[Way, ...]] = ("both", "both", "ring")
"""The first time counts for nothing: it pins the buffers."""
_SCATTERED_BYTES: Final = 4 << 20
"""Of a window on average. Smaller ones cost more to pin than to read."""


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
        self._refusal: str | None = None
        driver.retain(device)
        self._near = processors_near(driver.pci_address(device))
        processors = len(os.sched_getaffinity(0) if self._near is None else self._near)
        self._ring_threads = self._config.threads or max(1, min(_RING_THREADS, processors * 3 // 4))
        self._way = self._config.way or _measured.get(device)
        if self._way != "ring" and not driver.can_register(device):
            self._way = "ring"
            self._refusal = "this GPU reads no memory that is mapped for reading only"

    def copy(
        self, pieces: Iterable[Piece], *, cancelled: Callable[[], bool] | None = None, past_cache: bool = True
    ) -> Copied:
        """Copy bytes of files to the device; returns once all of them are there, and begins them in their order.

        What is in memory comes in the way that is faster here. Where this process has not found out yet, the first
        2.25 GiB of a copy of 3 GiB or more are a trial.

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
        with self._ready():
            started = time.perf_counter()
            sources = Sources(pieces)
            with Reads(pieces, past_cache=past_cache) as reads:
                try:
                    copied = self._whichever(pieces, reads, cancelled)
                except RefusedError as error:
                    sources.check()  # pages of a file that has ended can't be pinned either
                    self._refuse(error)
                    copied = self._copy(pieces, "ring", reads, cancelled)
                finally:
                    self._retirement.begin()
            sources.check()
            nbytes = sum(piece.nbytes for piece in pieces)
            return replace(copied, nbytes=nbytes, seconds=time.perf_counter() - started)

    def probe(self) -> Rates:
        """Try every way with memory of its own, for 0.1 s once that is there; `copy` uses the fastest from then on.

        Raises:
            StagingError: the driver failed, or the device has no 512 MiB left.
        """
        with self._ready(), open(os.memfd_create("staging-probe"), "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, _PROBE_BYTES)
            address = self._call(lambda: self._driver.allocate_device(_PROBE_BYTES))
            rates: dict[Way, float] = {}
            try:
                pieces = [Piece(file.fileno(), 0, _PROBE_BYTES, address)]
                try:
                    for way in _WAYS if self._refusal is None else _WAYS[:1]:
                        rates[way] = self._rate(way, pieces)
                except RefusedError as error:
                    self._refuse(error)
                finally:
                    self._retirement.finish()
            finally:
                self._call(lambda: self._driver.free_device(address))
            found = Rates(bytes_per_s=rates, refusal=self._refusal)
            if self._config.way is None:
                self._way = _measured[self._device] = found.way
            return found

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
            self._call(self._give_back)

    @contextlib.contextmanager
    def _ready(self) -> Iterator[None]:
        """Have the pool for oneself.

        Raises:
            StagingError: it can't be used any more.
        """
        with self._turn:
            if self._closed:
                raise StagingError("the pool is closed")
            if any(lane.is_lost for lane in self._lanes()):
                raise StagingError("the GPU failed in an earlier copy", mend="start the process anew; nvidia-smi")
            yield

    def _whichever(self, pieces: list[Piece], reads: Reads, cancelled: Callable[[], bool] | None) -> Copied:
        """Copy in the faster way; where none is known to be, the first of many bytes are a trial of both."""
        if not reads.all_resident:
            return self._copy(pieces, "ring", reads, cancelled)
        if self._way is None and sum(piece.nbytes for piece in pieces) >= _TRIAL_FROM_BYTES:
            rates: dict[Way, float] = {}
            for way in _TRIED:
                part, pieces = split(pieces, _TRIAL_BYTES)
                rates[way] = self._timed(part, way, reads, cancelled)
            self._way = _measured[self._device] = Rates(bytes_per_s=rates).way
            log.info("%s is the faster way: %s bytes a second", self._way, rates)
        return self._copy(pieces, self._way or _WAY, reads, cancelled)

    def _rate(self, way: Way, pieces: list[Piece]) -> float:
        """The better of two copies, the first of which pins what is needed, in bytes a second."""
        rates = []
        with Reads(pieces, past_cache=False) as reads:
            for _ in range(2):
                rates.append(self._timed(pieces, way, reads, None))
                self._retirement.finish()
        return max(rates)

    def _timed(self, pieces: list[Piece], way: Way, reads: Reads, cancelled: Callable[[], bool] | None) -> float:
        started = time.perf_counter()
        copied = self._copy(pieces, way, reads, cancelled)
        return copied.nbytes / (time.perf_counter() - started)

    def _refuse(self, error: RefusedError) -> None:
        """Use no windows any more."""
        self._way, self._refusal = "ring", error.message
        if self._config.way is None:
            _measured[self._device] = "ring"
        log.info("the driver pins no mapped files here, buffers are used: %s", error)

    def _call(self, action: Callable[[], T]) -> T:
        """Something of the driver's, in a thread of its own: the caller's keeps its context."""
        feed = Feed()
        results: list[T] = []

        def work(_: int) -> None:
            self._driver.use(self._device)
            results.append(action())

        together(work, 1, feed)
        if feed.error is not None:
            raise feed.error
        return results[0]

    def _copy(self, pieces: list[Piece], way: Way, reads: Reads, cancelled: Callable[[], bool] | None) -> Copied:
        """Copy in one way, with as many threads as there are jobs for."""
        config = self._config
        nbytes = sum(piece.nbytes for piece in pieces)
        jobs = jobs_of(pieces, config.window_bytes)
        kept = config.window_threads if way == "both" else 0
        scattered = len(jobs) > 1 and nbytes < len(jobs) * min(_SCATTERED_BYTES, config.window_bytes // 2)
        if scattered or len(jobs) <= kept:
            way = "ring"
        of_windows = 0 if way == "ring" else min(config.window_threads, max(0, len(jobs) - kept))
        buffers = sum(-(-job.nbytes // config.buffer_bytes) for job in jobs)
        # A disk wants as many reads under way as may be, whatever processors there are.
        most = self._ring_threads if reads.all_resident else max(self._ring_threads, _RING_THREADS)
        of_ring = 0 if way == "windows" else min(self._config.threads or most, buffers)
        feed = Feed(jobs, buffer_bytes=config.buffer_bytes, kept=kept, cancelled=cancelled)
        waited_s = self._waited_s()

        def work(number: int) -> None:
            stay_near(self._near)
            self._driver.use(self._device)
            if number < of_ring:
                self._ring_lane(number).run(feed, reads.read)
            else:
                self._window_lane(number - of_ring).run(feed)

        together(work, of_ring + of_windows, feed)
        if feed.error is not None:
            raise feed.error
        return Copied(
            nbytes=nbytes,
            seconds=0,
            way=way,
            threads=of_ring + of_windows,
            past_cache_bytes=reads.past_cache_bytes,
            waited_s=(self._waited_s() - waited_s) / max(of_ring, 1),
        )

    def _ring_lane(self, number: int) -> RingLane:
        """Made by the thread that works with it: memory is pinned by all of them at once, and near to who writes it."""
        lane = self._ring.get(number)
        if lane is None:
            lane = self._ring[number] = RingLane(self._driver, self._config.buffers, self._config.buffer_bytes)
        return lane

    def _window_lane(self, number: int) -> WindowLane:
        lane = self._windows.get(number)
        if lane is None:
            lane = self._windows[number] = WindowLane(self._driver, self._retirement.add)
        return lane

    def _lanes(self) -> list[RingLane | WindowLane]:
        return [*self._ring.values(), *self._windows.values()]

    def _waited_s(self) -> float:
        return sum(lane.waited_s for lane in self._ring.values())

    def _give_back(self) -> None:
        try:
            for lane in self._lanes():
                lane.close()
        finally:
            self._ring.clear()
            self._windows.clear()
            self._driver.release(self._device)


def opened(device: int = 0, config: StagingConfig | None = None) -> Staging:
    """A pool of the caller's own, who closes it; for one that wants it otherwise than `shared` has it.

    Raises:
        NoDeviceError: no GPU can be used; says why, and what to install.
    """
    from prefetch.pinned import Driver as PinnedDriver

    return Staging(PinnedDriver(), device=device, config=config)


_measured: dict[int, Way] = {}
"""The faster way to each device, as this process has found it."""

_shared: dict[int, Staging] = {}
_shared_turn = threading.Lock()


def shared(device: int = 0) -> Staging:
    """The pool of this process for a device, made at the first call.

    Raises:
        NoDeviceError: no GPU can be used; says why, and what to install.
    """
    with _shared_turn:
        if (found := _shared.get(device)) is None:
            found = _shared[device] = opened(device)
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
