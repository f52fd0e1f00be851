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

if TYPE_CHECKING:
    from checkpoint.chunks.packs import Packs

MOST_OPENERS: Final = 12
SLOT_BYTES: Final = 4 << 20
"""Of memory that an opener shares with whoever asks it. Chunks that need more are opened by whoever asked."""
_ID_BYTES: Final = 32
_MOST_IDS: Final = 2048
_LENGTH_BYTES: Final = 4
_FAILED: Final = b"\0"


class Openers:
    """Opens chunks of packs, in processes of its own once it has begun. Any thread may use it.

    Args:
        packs: has the chunks.
        count: of processes; by default one a processor, `MOST_OPENERS` at most, and none where there are but two.
    """

    def __init__(self, packs: Packs, *, count: int | None = None) -> None:
        processors = len(os.sched_getaffinity(0))
        self._packs = packs
        self._count = count if count is not None else min(processors, MOST_OPENERS) if processors > 2 else 0
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
            _begin(self._packs, self._memory, [theirs for _, theirs in pairs], [ours for ours, _ in pairs])
        self._first = first
        for number, (ours, theirs) in enumerate(pairs):
            theirs.close()
            self._ends.append(ours)
            self._idle.put((number, ours))

    def close(self) -> None:
        """End the processes, once nobody uses them any more; a second call does nothing."""
        for end in self._ends:
            end.close()
        self._ends.clear()
        if self._first:
            with contextlib.suppress(ChildProcessError):  # whoever reaps all children was first
                os.waitpid(self._first, 0)
            self._first = 0

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
        lengths = _ask(end, ids)
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
    """How many bytes each of these chunks has, now that they are in the slot; None where they are not."""
    try:
        end.send(b"".join(ids))
        answer = end.recv(_LENGTH_BYTES * _MOST_IDS)
    except OSError:
        return None
    if len(answer) != _LENGTH_BYTES * len(ids):  # it failed, or has ended
        return None
    return list(memoryview(answer).cast("I"))


def _begin(packs: Packs, memory: mmap.mmap, ends: list[socket.socket], others: list[socket.socket]) -> None:
    """Be the first opener, and fork the rest; never returns.

    The parent is not kept waiting by more than one fork.
    """
    try:
        signal.set_wakeup_fd(-1)
        for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(one, signal.SIG_IGN)  # whoever asks ends this by closing its end
        gc.disable()
        for end in others:
            end.close()
        mine = 0
        for number in range(1, len(ends)):
            if not os.fork():
                mine = number
                break
        for number, end in enumerate(ends):
            if number != mine:
                end.close()
        _open_all(packs, memoryview(memory)[mine * SLOT_BYTES : (mine + 1) * SLOT_BYTES], ends[mine])
        while not mine:
            try:
                os.wait()
            except ChildProcessError:
                break
    finally:
        os._exit(0)


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
