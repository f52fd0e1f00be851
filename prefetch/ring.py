"""A ring of pinned buffers: each thread reads into its own, and the GPU empties them by itself.

A lane is one thread's: a stream, and a few buffers with an event each. The thread reads a job into a buffer, begins its
copies, puts the event behind them and goes on to its next buffer; before it reads into that, it waits for the event.
So no buffer changes before its copy is over, and a GPU that is slower than the files holds the threads back.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

from prefetch.devices import Driver
from prefetch.feed import Feed
from prefetch.pieces import Job


class _Buffer:
    """Pinned memory and the event that says when it may be written again."""

    def __init__(self, driver: Driver, nbytes: int) -> None:
        self._driver = driver
        self.address = driver.allocate(nbytes)
        try:
            self._event = driver.open_event()
        except BaseException:
            driver.free(self.address)
            raise
        self.memory = memoryview((ctypes.c_ubyte * nbytes).from_address(self.address)).cast("B")
        self._copying = False

    def settle(self) -> None:
        """Wait until nothing is being copied from it."""
        if self._copying:
            self._driver.wait_event(self._event)
            self._copying = False

    def begin(self, job: Job, stream: int) -> None:
        """Begin the copies of a job that lies in it, and put the event behind them."""
        copy, base = self._driver.copy, self.address
        self._copying = True
        for at, nbytes, address in job.spans:
            copy(address, base + at, nbytes, stream)
        self._driver.record(self._event, stream)

    def close(self) -> None:
        self.memory.release()
        self._driver.close_event(self._event)
        self._driver.free(self.address)


class RingLane:
    """One thread's stream and buffers. Its driver's device must be in use by whatever thread calls it.

    Args:
        driver: whose memory it is.
        buffers: how many.
        buffer_bytes: of each.
    """

    def __init__(self, driver: Driver, buffers: int, buffer_bytes: int) -> None:
        self._driver = driver
        self._most = buffers
        self._buffer_bytes = buffer_bytes
        self._buffers: list[_Buffer] = []
        self.waited_s = 0.0
        """How long its thread has waited for the GPU, in all."""
        self.is_lost = False
        """Whether the driver failed while it waited for copies. Then nobody knows what the GPU still reads."""
        self._stream = driver.open_stream()

    def run(self, feed: Feed, read: Callable[[Job, memoryview], None]) -> None:
        """Copy the jobs of a feed, until there are no more; returns once none of its copies is under way.

        Args:
            feed: shared by all lanes of a copy.
            read: fills a buffer's beginning with a job's bytes; called without any lock.

        Raises:
            StagingError: the driver failed.
            Exception: what `read` raised.
        """
        turn = 0
        try:
            for job in feed.buffers():
                if turn == len(self._buffers):  # pinned when it is needed, while the ones before are being copied
                    self._buffers.append(_Buffer(self._driver, self._buffer_bytes))
                buffer = self._buffers[turn]
                turn = (turn + 1) % self._most
                before = time.perf_counter()
                buffer.settle()
                self.waited_s += time.perf_counter() - before
                read(job, buffer.memory)
                buffer.begin(job, self._stream)
        finally:
            self._drain()

    def close(self) -> None:
        """Give everything back. What a lost lane has stays: better memory that is gone than a GPU that reads it."""
        if self.is_lost:
            return
        for buffer in self._buffers:
            buffer.close()
        self._buffers.clear()
        self._driver.close_stream(self._stream)

    def _drain(self) -> None:
        try:
            self._driver.wait_stream(self._stream)
            for buffer in self._buffers:
                buffer.settle()
        except BaseException:
            self.is_lost = True
            raise
