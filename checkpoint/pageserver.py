"""Fills the memory of processes that `criu restore --lazy-pages` restores, with many threads.

CRIU connects to `lazy-pages.socket` in its work folder and sends, for each process, its pid (int32) and a userfaultfd
(SCM_RIGHTS), of one that had ended its negative pid alone, and a mark when all are restored. Faults are served from
the first userfaultfd on, for the kernel touches memory of a process that CRIU still works on (its rseq area, its
stack); everything else is copied after the mark, for before it CRIU may still move mappings about.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

import msgspec

from checkpoint.errors import CheckpointError, RetryError
from checkpoint.filling import Buffer, Filling
from checkpoint.page_plan import Run
from checkpoint.pagemap import Memory, memory_of, shared_bytes
from checkpoint.pages import PageImage, whole

SOCKET: Final = "lazy-pages.socket"
"""Its name in the work folder; CRIU has no option for it."""

MOST_THREADS: Final = 16
_MOST_PARTED: Final = 8  # an eighth more memory than before is not worth waiting for
_RESTORED: Final = 0x52535446
_HANDSHAKE_S: Final = 10.0
_RETRY_S: Final = 0.001
_PID: Final = struct.Struct("<i")
Opened: TypeAlias = dict[str, PageImage]
"""By path."""


class Filled(msgspec.Struct, frozen=True, kw_only=True):
    """What was filled in.

    Attributes:
        bytes_copied: from images.
        zero_bytes: with zeros: those of images, and pages that no image has and a process waited for.
        given_up_bytes: that processes unmapped or discarded before they were filled in; none of one that is stopped.
        seconds: from CRIU's mark to the last page.
        faults: pages that a process, or the kernel for it, waited for.
    """

    bytes_copied: int
    zero_bytes: int
    given_up_bytes: int
    seconds: float
    faults: int


class PageServer:
    """Serves one restore, as a context manager: enter it, restore with `lazy_pages`, then `finish`.

    When it leaves its context before everything is filled in, what is missing reads as zeros: whoever restored has to
    end the processes first.

    Args:
        images: folder of CRIU's images.
        work: the work folder given to CRIU.
        threads: how many copy; without, one a processor, `MOST_THREADS` at most.
        opened: gives the page images with these paths; without, they are the files there.

    Raises:
        CorruptError: the images are not as CRIU writes them.
    """

    def __init__(
        self, images: str, work: str, *, threads: int | None = None, opened: Callable[[Sequence[str]], Opened] = whole
    ) -> None:
        self._memories = {memory.pid: memory for memory in memory_of(images)}
        self._work = work
        self._threads = threads or min(len(os.sched_getaffinity(0)), MOST_THREADS)
        self._fillings: list[Filling] = []
        self._opened = opened
        self._pages: Opened = {}
        self._pieces: queue.SimpleQueue[tuple[Filling, Run] | None] = queue.SimpleQueue()
        self._state = threading.Condition()
        self._pending = 0
        self._restored_at: float | None = None
        self._seconds: float | None = None
        self._failure: Exception | None = None
        self._stopping = threading.Event()
        self._wake = -1
        self._listener: socket.socket | None = None
        self._connection: socket.socket | None = None
        self._running: list[threading.Thread] = []

    @property
    def lazy(self) -> dict[str, list[tuple[int, int]]]:
        """What this server fills in: offset and end of each run, by the path of the image."""
        found: dict[str, list[tuple[int, int]]] = {}
        for memory in self._memories.values():
            runs = found.setdefault(memory.pages, [])
            runs += [(run.offset, run.offset + run.end - run.start) for run in memory.runs]
        return found

    @property
    def parts_memory(self) -> bool:
        """Whether processes that share much memory since a fork would each have their own: only CRIU alone shares."""
        memories = list(self._memories.values())
        total = sum(run.end - run.start for memory in memories for run in memory.runs)
        return shared_bytes(memories) * _MOST_PARTED > total

    def __enter__(self) -> PageServer:
        with contextlib.ExitStack() as undo:
            undo.callback(self._close)
            self._pages = self._opened([memory.pages for memory in self._memories.values()])
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._listener = _listening(self._work)
            self._start(self._serve, "page-server")
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        os.eventfd_write(self._wake, 1)
        for _thread in self._running:
            self._pieces.put(None)
        for thread in self._running:
            thread.join()
        self._close()

    def _close(self) -> None:
        for filling in self._fillings:
            filling.close()
        for image in self._pages.values():
            image.close()
        if self._wake >= 0:
            os.close(self._wake)
        for end in (self._connection, self._listener):
            if end is not None:
                end.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self._work, SOCKET))

    def check(self) -> None:
        """Raise, as `finish` does, what keeps memory from being filled in: CRIU then waits in vain, and is to be ended.

        Raises:
            CheckpointError: see `finish`.
        """
        if isinstance(self._failure, CheckpointError):
            raise self._failure
        if self._failure is not None:
            raise CheckpointError(f"the page server failed: {self._failure}") from self._failure

    @property
    def filled_between(self) -> tuple[float, float] | None:
        """When CRIU's mark came and when the last page was there, by time.monotonic(); None before that."""
        if self._restored_at is None or self._seconds is None:
            return None
        return self._restored_at, self._restored_at + self._seconds

    def finish(self, timeout_s: float) -> Filled:
        """Wait until all is filled in, once CRIU has restored; from then on the processes need this server no more.

        Raises:
            CorruptError: an image can't be read any more.
            RetryError: it took too long.
            CheckpointError: a process has ended, or its memory can't be filled in. Whatever is raised, the processes
                are half filled and must be ended, before the context is left.
        """
        with self._state:
            done = self._state.wait_for(lambda: self._failure is not None or self._seconds is not None, timeout_s)
            self.check()
            if not done or self._seconds is None:
                raise RetryError(f"memory was not filled in within {timeout_s:g} s", mend="give it more time")
        self._running[0].join()  # which serves faults, and would go on with what is closed, or is another file by then
        self.check()
        for filling in self._fillings:
            filling.require_filled()
            filling.close()
        return Filled(
            bytes_copied=sum(one.bytes_copied for one in self._fillings),
            zero_bytes=sum(one.zero_bytes for one in self._fillings),
            given_up_bytes=sum(one.given_up_bytes for one in self._fillings),
            seconds=self._seconds,
            faults=sum(one.faults for one in self._fillings),
        )

    def _start(self, what: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=self._guarded, args=(what,), name=name, daemon=True)
        self._running.append(thread)
        thread.start()

    def _guarded(self, what: Callable[[], None]) -> None:
        """Nothing that a thread raises is lost: the restore fails with it."""
        try:
            what()
        except Exception as e:  # noqa: BLE001
            with self._state:
                self._failure = self._failure or e
                self._stopping.set()
                self._state.notify_all()

    def _serve(self) -> None:
        """What one thread does: CRIU's messages, events and faults of all processes."""
        poll = select.poll()
        listener = self._listener
        assert listener is not None
        poll.register(listener, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        by_fd: dict[int, Filling] = {}
        while not self._stopping.is_set():
            again = any(one.is_waited_for for one in by_fd.values())
            ready = {fd for fd, _ in poll.poll(_RETRY_S * 1000 if again else None)}
            if self._connection is not None and self._connection.fileno() in ready:
                self._hear(poll, by_fd)
            if listener.fileno() in ready:
                self._accept(listener, poll)
            for fd, filling in list(by_fd.items()):
                if fd in ready or filling.is_waited_for:
                    self._handle(filling, poll, by_fd)
            if self._seconds is not None:
                return

    def _accept(self, listener: socket.socket, poll: select.poll) -> None:
        connection, _ = listener.accept()
        if self._connection is not None:
            connection.close()
            raise CheckpointError("a second CRIU has connected to the page server", path=self._work)
        connection.settimeout(_HANDSHAKE_S)
        self._connection = connection
        poll.register(connection, select.POLLIN)

    def _hear(self, poll: select.poll, by_fd: dict[int, Filling]) -> None:
        """A message of CRIU."""
        connection = self._connection
        assert connection is not None
        try:
            said = connection.recv(_PID.size, socket.MSG_WAITALL)
        except ConnectionError:
            said = b""
        if len(said) < _PID.size:
            poll.unregister(connection)
            connection.close()
            self._connection = None
            if self._restored_at is None:  # it failed, which it says itself, and may be started again
                for fd, filling in by_fd.items():
                    poll.unregister(fd)
                    filling.close()
                by_fd.clear()
                self._fillings.clear()
            return
        (pid,) = _PID.unpack(said)
        if pid == _RESTORED:
            self._copy_ahead()
        elif pid > 0:
            _, fds, _, _ = socket.recv_fds(connection, 1, 1)
            if len(fds) != 1 or pid not in self._memories:
                raise CheckpointError(f"CRIU restores a process {pid} that the images do not have", path=self._work)
            memory = self._memories[pid]
            self._add(Filling(memory, fds[0], self._pages[memory.pages]), poll, by_fd)

    def _add(self, filling: Filling, poll: select.poll, by_fd: dict[int, Filling]) -> None:
        self._fillings.append(filling)
        by_fd[filling.fd] = filling
        poll.register(filling.fd, select.POLLIN)

    def _handle(self, filling: Filling, poll: select.poll, by_fd: dict[int, Filling]) -> None:
        self._hold()  # what has moved is in no piece until it is put
        children, moved = filling.handle()
        self._put(filling, moved)
        for child in children:
            self._add(child, poll, by_fd)
            self._put(child, child.pieces())
        self._done_with_one()

    def _hold(self) -> None:
        """There is something to do: it is not all filled in before `_done_with_one`."""
        with self._state:
            self._pending += 1

    def _put(self, filling: Filling, pieces: list[Run]) -> None:
        with self._state:
            self._pending += len(pieces)
        for piece in pieces:
            self._pieces.put((filling, piece))

    def _copy_ahead(self) -> None:
        self._restored_at = time.monotonic()
        if missing := self._memories.keys() - {one.memory.pid for one in self._fillings}:
            raise CheckpointError(f"CRIU handed over no memory of process {min(missing)}", path=self._work)
        self._hold()
        for filling in self._fillings:
            self._put(filling, filling.pieces())
        for number in range(self._threads):
            self._start(self._copy, f"page-server-{number}")
        self._done_with_one()

    def _copy(self) -> None:
        """What the other threads do."""
        buffer = Buffer()
        while (piece := self._pieces.get()) is not None and not self._stopping.is_set():
            filling, run = piece
            filling.fill(run, buffer, self._stopping)
            if filling.has_ended and not filling.is_child:
                raise _ended(filling.memory)
            self._done_with_one()

    def _done_with_one(self) -> None:
        with self._state:
            self._pending -= 1
            if not self._pending and self._restored_at is not None and self._failure is None:
                self._seconds = time.monotonic() - self._restored_at
                self._state.notify_all()
                os.eventfd_write(self._wake, 1)


def _ended(memory: Memory) -> CheckpointError:
    return CheckpointError(
        f"process {memory.pid} has ended while its memory was filled in", mend="see the kernel's log (dmesg) for why"
    )


def _listening(work: str) -> socket.socket:
    """The socket CRIU connects to; by a path short enough for any folder's."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    folder = os.open(work, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        listener.bind(f"/proc/self/fd/{folder}/{SOCKET}")
        listener.listen(1)
    except BaseException:
        listener.close()
        raise
    finally:
        os.close(folder)
    return listener
