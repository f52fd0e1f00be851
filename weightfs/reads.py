"""READ, answered by threads that hold no GIL while they wait or copy."""

from __future__ import annotations

import errno
import queue
import threading
from array import array
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from weightfs import wire
from weightfs.conduit import Conduit
from weightfs.handles import HandleTable, Place, Readable
from weightfs.kernel import Kernel
from weightfs.outstanding import Outstanding
from weightfs.wire import Opcode

READ_BYTES: Final = 254 << 12
"""Largest READ. A pipe of 1 MiB, the most that every user may have, holds 256 pages: these, a header, and one more for
a range that begins within a page."""


_OBSERVED: Final = 1 << 20
"""READs kept for whoever observes, until he fetches them: 24 MiB of memory."""

_Job = tuple[int, Readable, int, int, int]
"""unique, readable, handle, offset, size."""


class Reads:
    """The READs of one mount.

    Args:
        kernel: is given the replies.
        handles: what is read from.
        outstanding: holds each READ until it is answered.
        reopen: attaches what serves an inode whose handle is known to the kernel but not to this process.
        errno_of: the errno for an exception.

    Attributes:
        bytes_read: bytes given in replies.
        hints: READs of files that the kernel reads by itself.
    """

    def __init__(
        self,
        kernel: Kernel,
        handles: HandleTable,
        outstanding: Outstanding,
        reopen: Callable[[int], Awaitable[object]],
        errno_of: Callable[[BaseException], int],
    ) -> None:
        self._kernel = kernel
        self._handles = handles
        self._outstanding = outstanding
        self._reopen = reopen
        self._errno_of = errno_of
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self.bytes_read = 0
        self.hints = 0
        self._observed: array[int] | None = None
        self._unobserved = 0

    def observed(self, count: int) -> tuple[list[list[int]], int]:
        """READs that have come since the first call of this, in their order, each given once: at most `count`.

        Returns:
            Inode, offset and size of each, and how many were passed over because too many waited. Nothing is kept
            before the first call.
        """
        if self._observed is None:
            self._observed = array("Q")
        taken = self._observed[: 3 * count]
        del self._observed[: 3 * count]
        passed_over, self._unobserved = self._unobserved, 0
        return [taken[at : at + 3].tolist() for at in range(0, len(taken), 3)], passed_over

    def start(self, threads: int) -> None:
        """From now on so many are answered at once."""
        for number in range(threads):
            thread = threading.Thread(target=self._answer, name=f"read-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """Answer those that were taken, and no more. Waits for none of them."""
        for _ in self._threads:
            self._jobs.put(None)

    def take(self, nursery: trio.Nursery, request: bytearray, unique: int, nodeid: int) -> None:
        """A READ has come; whatever must be awaited for it runs in `nursery`."""
        handle, offset, size = wire.READ_IN.unpack_from(request, wire.IN_HEADER_BYTES)
        self._outstanding.add(unique, Opcode.READ, nodeid, 0)
        if self._observed is not None:
            if len(self._observed) < 3 * _OBSERVED:
                self._observed.extend((nodeid, offset, size))
            else:
                self._unobserved += 1
        entry = self._handles.get(nodeid)
        if entry is not None and entry.readable is not None:
            self.hints += entry.backing_id is not None
            self._jobs.put((unique, entry.readable, handle, offset, size))
        else:
            nursery.start_soon(self._reopen_and_read, unique, nodeid, handle, offset, size)

    async def _reopen_and_read(self, unique: int, nodeid: int, handle: int, offset: int, size: int) -> None:
        self._handles.add(nodeid, handle)
        try:
            await self._reopen(nodeid)
        except Exception as e:  # noqa: BLE001 - whatever it is, the reader must hear of it, and the mount go on
            self._fail(unique, e)
            return
        entry = self._handles.get(nodeid)
        if entry is not None and entry.readable is not None:
            self._jobs.put((unique, entry.readable, handle, offset, size))
        elif self._outstanding.settle(unique):
            self._kernel.answer(unique, errno.EIO)

    def _fail(self, unique: int, error: Exception) -> None:
        if self._outstanding.settle(unique):
            self._kernel.answer(unique, self._errno_of(error))

    def _answer(self) -> None:
        """A thread's life: splice, preadv and writev drop the GIL, so these copy in parallel."""
        buffer = memoryview(bytearray(READ_BYTES))
        conduit = Conduit(self._kernel.fd, READ_BYTES)
        while (job := self._jobs.get()) is not None:
            unique, readable, handle, offset, size = job
            try:
                place = readable.in_page_cache(offset, min(size, READ_BYTES))
                if place is not None and conduit.load(wire.OUT_HEADER, unique, place):
                    self._send_spliced(conduit, unique, place)
                    continue
                filled = readable.read_into(handle, buffer[: min(size, READ_BYTES)], offset)
            except Exception as e:  # noqa: BLE001 - this thread must live on, and the reader hear of it
                self._fail(unique, e)
                continue
            if self._outstanding.settle(unique):
                self.bytes_read += filled
                self._kernel.write([wire.OUT_HEADER.pack(wire.OUT_HEADER_BYTES + filled, 0, unique), buffer[:filled]])

    def _send_spliced(self, conduit: Conduit, unique: int, place: Place) -> None:
        if not self._outstanding.settle(unique):
            conduit.drop()
            return
        self.bytes_read += place.nbytes
        try:
            conduit.send()
        except OSError as e:
            self._kernel.refused(e)
