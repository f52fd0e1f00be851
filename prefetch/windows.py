"""The page cache itself as pinned memory: parts of files are mapped, registered for reading, and copied as they are.

No byte is copied by a processor; what costs is to pin the pages, 30 to 44 GB/s, and to give them up again, which waits
until the copy is over and happens beside whatever comes next.

Nothing here touches the mapping, so a file that is truncated meanwhile raises no SIGBUS: pages that are gone before
they are pinned make the driver refuse, and pages that are pinned stay, but for what the kernel clears of the new last
one. So whoever copies looks at the file's size and time again afterwards: see `prefetch.staging`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final, NamedTuple

from prefetch.devices import Driver
from prefetch.errors import StagingError
from prefetch.feed import Feed
from prefetch.pieces import PAGE_BYTES
from weightfs import linux

log = logging.getLogger(__name__)

_MOST_PINNED_BYTES: Final = 2 << 30
"""Of one thread. Beyond, it waits until its copies are over: pinned pages can't be evicted."""


class Window(NamedTuple):
    """A mapping of a part of a file that the GPU may read."""

    address: int
    nbytes: int


class RefusedError(StagingError):
    """The driver does not take this memory: another way is to be tried."""


class WindowLane:
    """One thread's stream. Its driver's device must be in use by whatever thread calls it.

    Args:
        driver: who pins.
        retire: takes windows from which nothing is being copied any more.
    """

    def __init__(self, driver: Driver, retire: Callable[[list[Window]], None]) -> None:
        self._driver = driver
        self._retire = retire
        self._stream = driver.open_stream()
        self.is_lost = False
        """Whether the driver failed while it waited for copies. Then nobody knows what the GPU still reads."""

    def run(self, feed: Feed) -> None:
        """Copy the jobs of a feed, until there are no more; returns once none of its copies is under way.

        Raises:
            RefusedError: pages can't be pinned: of a file that has ended, or at all.
            StagingError: the driver failed.
            OSError: the file can't be mapped.
        """
        windows: list[Window] = []
        pinned_bytes = 0
        try:
            for job in feed.windows():
                window = self._open(job.fd, job.offset, -(-job.nbytes // PAGE_BYTES) * PAGE_BYTES)
                windows.append(window)
                for at, nbytes, address in job.spans:
                    self._driver.copy(address, window.address + at, nbytes, self._stream)
                pinned_bytes += window.nbytes
                if pinned_bytes > _MOST_PINNED_BYTES:
                    self._drain(windows)
                    windows, pinned_bytes = [], 0
        finally:
            self._drain(windows)

    def close(self) -> None:
        """Give the stream back."""
        if not self.is_lost:
            self._driver.close_stream(self._stream)

    def _open(self, fd: int, offset: int, nbytes: int) -> Window:
        address = linux.map_shared(fd, offset, nbytes)
        try:
            self._driver.register(address, nbytes)
        except BaseException as error:
            linux.unmap(address, nbytes)
            if isinstance(error, StagingError):
                raise RefusedError(error.message, number=error.number) from error
            raise
        return Window(address, nbytes)

    def _drain(self, windows: list[Window]) -> None:
        try:
            self._driver.wait_stream(self._stream)
        except BaseException:
            self.is_lost = True  # and the windows stay
            raise
        self._retire(windows)


class Retirement:
    """Gives windows up in a thread of its own; the mappings stay until then.

    Args:
        driver: who pinned.
        device: that is in use for it.
    """

    def __init__(self, driver: Driver, device: int) -> None:
        self._driver = driver
        self._device = device
        self._turn = threading.Lock()
        self._windows: list[Window] = []
        self._thread: threading.Thread | None = None

    def add(self, windows: list[Window]) -> None:
        """Keep windows for `begin`; from any thread."""
        with self._turn:
            self._windows += windows

    def begin(self) -> None:
        """Give up what there is, beside the caller. An interpreter that ends waits for it."""
        with self._turn:
            windows, self._windows = self._windows, []
        if windows:
            before = self._thread
            self._thread = threading.Thread(target=self._run, args=(windows, before), name="staging-retire")
            self._thread.start()

    def finish(self) -> None:
        """Give up what there is and wait for that."""
        self.begin()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, windows: list[Window], before: threading.Thread | None) -> None:
        if before is not None:
            before.join()
        self._driver.use(self._device)
        for window in windows:
            try:
                self._driver.unregister(window.address)
            except StagingError as error:
                log.warning("a window of %d bytes stays mapped: %s", window.nbytes, error)
                continue
            linux.unmap(window.address, window.nbytes)
