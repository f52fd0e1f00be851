"""Memory of one process that is being filled in: the faults it waits for, and the pieces that are copied ahead."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import time
from collections.abc import Iterator
from typing import Final

from checkpoint import userfaultfd
from checkpoint.errors import CheckpointError
from checkpoint.gate import Gate
from checkpoint.page_plan import Plan, Run
from checkpoint.pagemap import Memory
from checkpoint.pages import PageImage
from checkpoint.userfaultfd import PAGE_BYTES, Event

PIECE_BYTES: Final = 4 << 20
"""What a thread takes on at once, and its alignment: two threads then never wait for the lock of one page table.

The less it is, the more often is the interpreter needed, of which there is one for all threads.
"""

_BUFFER_BYTES: Final = 2 << 20
"""16 threads filled 13 GB/s with 512 KiB, 19 with 1 MiB, 20 with 2 MiB (Xeon, H100 host)."""

AROUND_BYTES: Final = 64 << 10
"""What is copied along with a page that a process waits for."""

_UNMAPPED_S: Final = 1.0
_LOOK_S: Final = 0.0005


class Buffer:
    """A thread's own memory, which is read into and copied from what can't be copied from where it is."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _BUFFER_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._view = memoryview(self._memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    def read(self, pages: PageImage, offset: int, nbytes: int) -> None:
        """Read bytes of an image; errors are those of `PageImage.read`.

        Args:
            pages: the image.
            offset: in it.
            nbytes: `nbytes` of the buffer at most.
        """
        pages.read(self._view[:nbytes], offset)

    @property
    def nbytes(self) -> int:
        """It holds at most."""
        return _BUFFER_BYTES


class Filling:
    """The memory of one process.

    Events are read and faults served by one thread, pieces are copied by many: see `Gate`. A process that is not
    stopped may change its memory at any time. One order the kernel does not promise: of two changes that two threads
    make to the same addresses at once, which is told of first.

    Args:
        memory: what is to be filled in.
        fd: its userfaultfd; `close` closes it.
        pages: the image `memory.pages`, which the caller closes.
        plan: what is left of the plan of the process it was forked from; None for one that was restored.

    Attributes:
        memory: see above.
        fd: see above.
        is_child: it was forked while its parent's memory was filled in.
        has_ended: nobody needs its memory any more.
        bytes_copied, zero_bytes, faults: so far.
        given_up_bytes: of the plan, which the process unmapped or discarded before they were filled in.
    """

    def __init__(self, memory: Memory, fd: int, pages: PageImage, plan: Plan | None = None) -> None:
        self.memory = memory
        self.fd = fd
        self.is_child = plan is not None
        self.has_ended = False
        self.bytes_copied = 0
        self.zero_bytes = 0
        self.given_up_bytes = 0
        self.faults = 0
        self._pages = pages
        self._plan = Plan(memory.runs) if plan is None else plan
        self._gate = Gate()
        self._waiting: list[int] = []
        self._buffer = Buffer()
        self._lock = threading.Lock()  # the plan, of which many threads take what they have filled in; and counts

    def close(self) -> None:
        """Let go of the memory: what is missing of it reads as zeros from now on."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def require_filled(self) -> None:
        """Every page was filled in or given up by the process, once all pieces are done.

        Raises:
            CheckpointError: something else was there before. What it is nobody knows.
        """
        with self._lock:
            left = self._plan.runs
        if left and not self.has_ended:
            nbytes = sum(run.end - run.start for run in left)
            raise CheckpointError(
                f"{nbytes} bytes of the memory of process {self.memory.pid}, from {left[0].start:#x} on, were there "
                "before they were filled in",
                mend="restore with --plain",
            )

    @property
    def is_waited_for(self) -> bool:
        """Whether a fault could not be served yet."""
        return bool(self._waiting)

    def pieces(self) -> list[Run]:
        """What is to be filled in, cut for the threads, the most urgent first."""
        early: list[Run] = []
        late: list[Run] = []
        for run in self._plan.runs:
            is_early = any(start < run.end and run.start < end for start, end in self.memory.early)
            (early if is_early else late).append(run)
        late.sort(key=lambda run: run.start - run.end)
        return [piece for run in early + late for piece in cut(run)]

    def handle(self) -> tuple[list[Filling], list[Run]]:
        """Read what has happened, and serve who waits.

        Returns:
            Children that were forked, whose pieces must be filled in as well, and pieces that lie elsewhere now.

        Raises:
            CheckpointError: see `fill`.
        """
        children: list[Filling] = []
        moved: list[Run] = []
        with self._gate.changing():
            # Whoever changes memory goes on as soon as the event is read. All of a batch are heeded before the gate
            # opens and before a fault of it is served, which may have come before the change.
            for event in userfaultfd.read_events(self.fd):
                self._heed(event, children, moved)
        waiting, self._waiting = self._waiting, []
        for address in waiting:
            if not self.has_ended and not self._serve(address):
                self._waiting.append(address)
        return children, [piece for run in moved for piece in cut(run)]

    def _heed(self, event: Event, children: list[Filling], moved: list[Run]) -> None:
        if event.kind == userfaultfd.PAGEFAULT:
            self.faults += 1
            self._waiting.append(event.start)
        elif event.kind == userfaultfd.FORK:
            children.append(Filling(self.memory, event.fd, self._pages, self._plan.copy()))
        elif event.kind == userfaultfd.REMAP:
            moved += self._plan.move(event.start, event.end, event.to)
        elif event.kind in (userfaultfd.REMOVE, userfaultfd.UNMAP):
            self.given_up_bytes += sum(run.end - run.start for run in self._plan.remove(event.start, event.end))
        else:
            raise CheckpointError(f"userfaultfd told of something unknown ({event.kind:#x})")

    def _serve(self, address: int) -> bool:
        """Fill in a page that is waited for, and some around it; False if an event must be read first."""
        with self._lock:
            run = self._plan.first(address, address + AROUND_BYTES)
        if run is None or run.start > address:
            nbytes = run.start - address if run is not None else AROUND_BYTES
            done, why = userfaultfd.zero(self.fd, address, nbytes)
            if why == errno.ENOENT:  # it reaches beyond the mapping
                done, why = userfaultfd.zero(self.fd, address, PAGE_BYTES)
            self.zero_bytes += done
        else:
            nbytes = run.end - run.start
            self._buffer.read(self._pages, run.offset, nbytes)
            done, why = userfaultfd.copy(self.fd, address, self._buffer.address, nbytes)
            if why == errno.ENOENT:
                done, why = userfaultfd.copy(self.fd, address, self._buffer.address, PAGE_BYTES)
            self._filled(address, done)
        if why == errno.ESRCH:
            self.has_ended = True
        elif why == errno.EAGAIN and not done:
            return False
        elif why and not done and why not in (errno.EEXIST, errno.ENOENT):
            raise self._failed(address, why)
        if not done:
            userfaultfd.wake(self.fd, address, PAGE_BYTES)
        return True

    def fill(self, piece: Run, buffer: Buffer, stopping: threading.Event) -> None:
        """Fill in what the plan still has of these addresses; called by any thread.

        Raises:
            CorruptError: the image can't be read.
            CheckpointError: the memory can't be filled in.
        """
        start = piece.start
        while start < piece.end and not self.has_ended and not stopping.is_set():
            with self._gate.copying(), self._lock:
                run = self._plan.first(start, piece.end)
            if run is None:
                return
            start = run.start
            for part in self._pages.parts(run.offset, run.end - run.start):
                end = start + part.nbytes
                if part.address is None and not part.is_zero:
                    reached = self._read_and_copy(run.part(start, end), buffer, stopping)
                else:
                    reached = self._copy(run.part(start, end), part.address, buffer, stopping)
                start = reached
                if reached < end:
                    break

    def _read_and_copy(self, run: Run, buffer: Buffer, stopping: threading.Event) -> int:
        """As `_copy`, by way of the buffer."""
        start = run.start
        while start < run.end:
            end = min(run.end, start + buffer.nbytes)
            buffer.read(self._pages, run.part(start, end).offset, end - start)
            start = self._copy(run.part(start, end), buffer.address, None, stopping)
            if start < end:
                break
        return start

    def _copy(self, run: Run, address: int | None, buffer: Buffer | None, stopping: threading.Event) -> int:
        """Copy what the plan still has of a run from an address, or zeros where there is none.

        Where that can't be read it is tried again by way of the buffer, if there is one. Gives how far that went until
        the plan changed.
        """
        start, limit = run.start, run.end - run.start
        unmapped_since = None
        while start < run.end and not self.has_ended and not stopping.is_set():
            with self._gate.copying():
                with self._lock:
                    part = self._plan.first(start, run.end)
                if part is None:
                    return run.end
                if part.start - part.offset != run.start - run.offset:  # something else has been moved to there
                    return part.start
                start = part.start
                nbytes = min(part.end - start, limit)
                if address is None:
                    done, why = userfaultfd.zero(self.fd, start, nbytes)
                else:
                    done, why = userfaultfd.copy(self.fd, start, address + start - run.start, nbytes)
                self._filled(start, done, is_zero=address is None)
            start += done
            if done:
                unmapped_since = None
            elif why == errno.EEXIST:
                start += PAGE_BYTES
            elif why == errno.ESRCH:
                self.has_ended = True
            elif why == errno.EFAULT and buffer is not None:
                return self._read_and_copy(run.part(start, run.end), buffer, stopping)
            elif why == errno.ENOENT and nbytes > PAGE_BYTES:
                limit = nbytes // 2 // PAGE_BYTES * PAGE_BYTES  # it may reach beyond the mapping
            elif why == errno.ENOENT:
                # Unmapped, which the plan will say when the event has been read; else it is not CRIU's doing.
                unmapped_since = unmapped_since or time.monotonic()
                if time.monotonic() > unmapped_since + _UNMAPPED_S:
                    raise self._failed(start, why)
                time.sleep(_LOOK_S)
            elif why == errno.EAGAIN:
                time.sleep(_LOOK_S)
            else:
                raise self._failed(start, why)
        return start

    def _filled(self, start: int, nbytes: int, *, is_zero: bool = False) -> None:
        """Pages are there, so they leave the plan: if one is missing later, the process has given it up."""
        if nbytes:
            with self._lock:
                self._plan.remove(start, start + nbytes)
                if is_zero:
                    self.zero_bytes += nbytes
                else:
                    self.bytes_copied += nbytes

    def _failed(self, address: int, why: int) -> CheckpointError:
        return CheckpointError(
            f"the memory of process {self.memory.pid} at {address:#x} can't be filled in: {os.strerror(why)}",
            mend="restore with --plain",
        )


def cut(run: Run) -> Iterator[Run]:
    """Pieces of a run that end where a multiple of `PIECE_BYTES` is, or the run."""
    start = run.start
    while start < run.end:
        end = min(run.end, start - start % PIECE_BYTES + PIECE_BYTES)
        yield run.part(start, end)
        start = end
