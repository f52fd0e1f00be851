"""Processes that open chunks, for threads that copy them.

A chunk of 84 KiB takes Python as long as zstd needs to decompress it, and of one process only one thread runs Python:
sixteen threads opened 0.4 to 1.2 GB/s (H100 host, 16 cores), whatever each of them does without the GIL. Each opener is
a fork of whoever restores, has the same packs open, and puts what it opens into memory that both share. It answers with
nothing but "opened" or "failed": what fails is opened again by whoever asked, which tells why.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import queue
import signal
import socket
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from weightfs import linux

if TYPE_CHECKING:
    from checkpoint.chunks.packs import Packs

MOST_OPENERS: Final = 16
"""As many as threads copy, so that each finds one."""
SLOT_BYTES: Final = 4 << 20
"""Of memory that an opener shares with whoever asks it. Chunks that need more are opened by whoever asked."""
_ID_BYTES: Final = 32
_MOST_IDS: Final = 2048
_LENGTH_BYTES: Final = 4
_FAILED: Final = b"\0"
_END_S: Final = 2.0
_ANSWER_S: Final = 20.0
"""A disk may be slow; 4 MiB are opened in 10 ms."""


class Openers:
    """Opens chunks of packs, in processes of its own once it has begun. Any thread may use it.

    Args:
        packs: has the chunks.
        count: of processes; by default one a processor, `MOST_OPENERS` at most, and none where there is but one.
    """

    def __init__(self, packs: Packs, *, count: int | None = None) -> None:
        processors = len(os.sched_getaffinity(0))
        self._packs = packs
        self._count = count if count is not None else min(processors, MOST_OPENERS) if processors > 1 else 0
        self._memory: mmap.mmap | None = None
        self._idle: queue.LifoQueue[tuple[int, socket.socket]] = queue.LifoQueue()
        self._ends: list[socket.socket] = []
        self._first = 0

    def begin(self) -> None:
        """Fork the processes; `close` ends them, and so does the end of this process.

        To be called before there are threads that use the packs: what another thread holds locked while this one forks
        would stay so in an opener.
        """
        if not self._count:
            return
        self._packs.digest_key  # noqa: B018  what is in the folder is looked up once, for all of them
        self._memory = mmap.mmap(-1, self._count * SLOT_BYTES)
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(self._count)]
        first = os.fork()
        if not first:
            _begin(self._packs, self._memory, [theirs for _, theirs in pairs])
        self._first = first
        for number, (ours, theirs) in enumerate(pairs):
            theirs.close()
            ours.settimeout(_ANSWER_S)
            self._ends.append(ours)
            self._idle.put((number, ours))

    def close(self) -> None:
        """End the processes, once nobody uses them any more; a second call does nothing."""
        for end in self._ends:
            end.close()
        self._ends.clear()
        if self._first:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):  # whoever reaps all children was first
                self._reap()
            self._first = 0

    def _reap(self) -> None:
        pidfd = os.pidfd_open(self._first)
        try:
            if not linux.is_readable(pidfd, _END_S):  # it waits for a disk
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                linux.is_readable(pidfd, _END_S)
        finally:
            os.close(pidfd)
        os.waitpid(self._first, os.WNOHANG)

    def get(self, id_: bytes) -> bytes:
        """A whole chunk; see `Packs.get`."""
        return self._packs.get(id_)

    @contextlib.contextmanager
    def opened(self, ids: Sequence[bytes]) -> Iterator[list[Any]]:
        """Whole chunks, in that order, each with the buffer protocol, for as long as the context lasts.

        Errors are those of `Packs.read`.
        """
        idle = None
        with contextlib.suppress(queue.Empty):
            idle = self._idle.get_nowait() if len(ids) <= _MOST_IDS else None
        if idle is None:
            yield self._packs.get_all(ids)
            return
        number, end = idle
        try:
            lengths = _ask(end, ids)
        except OSError:  # it has ended, or does not answer: nobody asks it again
            yield self._packs.get_all(ids)
            return
        try:
            if lengths is None:
                yield self._packs.get_all(ids)
            else:
                yield list(self._parts(number, lengths))
        finally:
            self._idle.put(idle)

    def _parts(self, number: int, lengths: Sequence[int]) -> Iterator[memoryview]:
        assert self._memory is not None
        slot = memoryview(self._memory)[number * SLOT_BYTES : (number + 1) * SLOT_BYTES]
        at = 0
        for nbytes in lengths:
            yield slot[at : at + nbytes]
            at += nbytes


def _ask(end: socket.socket, ids: Sequence[bytes]) -> list[int] | None:
    """How many bytes each of these chunks has, now that they are in the slot; None where they can't be opened there.

    Raises:
        OSError: it has ended, or does not answer within `_ANSWER_S`.
    """
    end.send(b"".join(ids))
    answer = end.recv(_LENGTH_BYTES * _MOST_IDS)
    if not answer:
        raise ConnectionResetError
    return None if answer == _FAILED else list(memoryview(answer).cast("I"))


def _begin(packs: Packs, memory: mmap.mmap, ends: list[socket.socket]) -> None:
    """Be the first opener, and fork the rest; never returns.

    The parent is not kept waiting by more than one fork.
    """
    try:
        signal.set_wakeup_fd(-1)
        for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(one, signal.SIG_IGN)  # whoever asks ends this by closing its end
        gc.disable()
        _keep_open(ends)
        mine = 0
        for number in range(1, len(ends)):
            if not os.fork():
                mine = number
                break
        _keep_open(ends[mine : mine + 1])
        _open_all(packs, memoryview(memory)[mine * SLOT_BYTES : (mine + 1) * SLOT_BYTES], ends[mine])
        while not mine:
            try:
                os.wait()
            except ChildProcessError:
                break
    finally:
        os._exit(0)


def _keep_open(ends: list[socket.socket]) -> None:
    """Close every other descriptor of this process but the standard ones.

    A program that another thread of the parent is starting at the moment of the fork is waited for until everybody has
    closed the pipe that tells of its start.
    """
    low = 3
    for kept in sorted(end.fileno() for end in ends):
        os.closerange(low, kept)
        low = kept + 1
    os.closerange(low, 1 << 20)


def _open_all(packs: Packs, slot: memoryview, end: socket.socket) -> None:
    """Open what is asked for until the other end is closed."""
    while ids := end.recv(_ID_BYTES * _MOST_IDS):
        try:
            contents = packs.get_all([ids[at : at + _ID_BYTES] for at in range(0, len(ids), _ID_BYTES)])
            lengths, at = [], 0
            for content in contents:
                nbytes = len(content)
                slot[at : at + nbytes] = memoryview(content)  # ValueError where there is no room
                lengths.append(nbytes)
                at += nbytes
            answer = b"".join(nbytes.to_bytes(_LENGTH_BYTES, "little") for nbytes in lengths)
        except Exception:  # noqa: BLE001  whoever asked finds out why
            answer = _FAILED
        end.send(answer)
