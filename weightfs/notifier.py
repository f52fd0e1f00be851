"""Tells the kernel what it must not believe any longer. Worker threads write to /dev/fuse; no caller ever waits.

An entry's invalidation waits in the kernel for the folder's lock, which a LOOKUP or a listing of that folder holds
until *we* have answered it; dropping a file's pages waits for READs in flight. So this is never done on the thread that
answers, one folder that hangs holds up one of several threads, and a folder in which a request has been waiting for
long is passed over until that is answered: a thread that waited for its lock would keep everybody else out of the
folder as well.

Within one folder the order is names, then attributes: what a look-up in flight is about to make known in the kernel is
known once the names' lock was had, and its old attributes are taken back after.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from weightfs import wire

log = logging.getLogger(__name__)

_LONG_S: Final = 0.1
"""A folder's request that has waited longer may wait for its deadline."""
_AGAIN_S: Final = 0.05
_END_S: Final = 1.0


@dataclass(slots=True)
class _Job:
    """What is to be told of one inode.

    Attributes:
        names: of a folder; True takes the name away, False has it asked for anew at its next use.
        inodes: whose attributes to ask for anew.
        pages: drop what is cached of it (a file's bytes, a folder's listing), and its attributes.
        not_before: on the monotonic clock.
    """

    names: dict[bytes, bool] = field(default_factory=dict)
    inodes: dict[int, None] = field(default_factory=dict)
    pages: bool = False
    not_before: float = 0.0


class Notifier:
    """Threads that write notifications to one mount. Thread-safe.

    What waits here is one job an inode, so no more than the kernel was told of.

    Args:
        kernel_fd: /dev/fuse, mounted; stays the caller's, and open until `close` has returned.
        held_s: for how long the oldest request of a folder has been waiting for our answer; called in any thread.

    Attributes:
        sent: notifications by outcome: `ok`, `unknown` (the kernel did not know it: nothing to do), or an errno.
    """

    def __init__(
        self, kernel_fd: int, held_s: Callable[[int], float] = lambda _: 0.0, *, threads: int = 4, name: str = "notify"
    ) -> None:
        self._kernel = kernel_fd
        self._held_s = held_s
        self._jobs: OrderedDict[int, _Job] = OrderedDict()
        self._busy: set[int] = set()
        self._condition = threading.Condition()
        self._is_closing = False
        self.sent: Counter[str] = Counter()
        # Daemons: one that hangs in the kernel must not keep the interpreter from ending.
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{number}", daemon=True) for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def folder_changed(
        self, folder: int, gone: Iterable[bytes] = (), doubtful: Iterable[bytes] = (), inodes: Iterable[int] = ()
    ) -> None:
        """Names of a folder changed: its listing and its own attributes did as well.

        Args:
            gone: names that mean another file now, or none.
            doubtful: names that may.
            inodes: the files they meant, whose attributes changed.
        """
        self._put(folder, _Job(dict.fromkeys(doubtful, False) | dict.fromkeys(gone, True), dict.fromkeys(inodes), True))

    def files_changed(self, folder: int, files: Iterable[tuple[bytes, int]]) -> None:
        """Attributes of files of a folder changed, given as name and inode; the names mean what they meant."""
        files = tuple(files)
        self._put(folder, _Job({name: False for name, _ in files}, {inode: None for _, inode in files}))

    def attributes_changed(self, inode: int) -> None:
        """Attributes of one inode changed."""
        self._put(inode, _Job(inodes={inode: None}))

    def content_changed(self, inode: int) -> None:
        """The bytes of a file changed: what is cached of it goes, also from under mappings."""
        self._put(inode, _Job(pages=True))

    def sweep(self, entries: Iterable[tuple[int, bytes, int]]) -> None:
        """Have all these entries, given as (folder, name, inode), asked for anew; returns once the kernel was told.

        Blocking, for a worker thread.
        """
        for folder, name, inode in entries:
            while self._held_s(folder) > _LONG_S and not self._is_closing:
                time.sleep(_AGAIN_S)
            if self._is_closing:
                return
            self._write(_entry(folder, name, False))
            self._write(_inode(inode, -1))

    def forget_all_names(self) -> bool:
        """Make every name of the mount be looked up anew (Linux 6.16); False where the kernel can't.

        Files in use lose their path in /proc/PID/maps, which says `(deleted)` behind it: for an index that was lost.
        """
        return self._write(_message(wire.NOTIFY_INC_EPOCH, b""))

    def close(self) -> bool:
        """End the threads; False when one still waits in the kernel, which it does until its folder's lock is free."""
        with self._condition:
            self._is_closing = True
            self._jobs.clear()
            self._condition.notify_all()
        ends = time.monotonic() + _END_S
        for thread in self._threads:
            thread.join(max(0.0, ends - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    @property
    def waiting(self) -> int:
        """Inodes that the kernel is still to be told of."""
        return len(self._jobs) + len(self._busy)

    def _put(self, key: int, job: _Job) -> None:
        with self._condition:
            if self._is_closing:
                return
            before = self._jobs.get(key)
            if before is None:
                self._jobs[key] = job
            else:
                for name, gone in job.names.items():
                    before.names[name] = gone or before.names.get(name, False)
                before.inodes |= job.inodes
                before.pages |= job.pages
            self._condition.notify()

    # The threads

    def _run(self) -> None:
        while (taken := self._take()) is not None:
            key, job = taken
            try:
                if job.names and self._held_s(key) > _LONG_S:
                    for message in _of_attributes(job):  # these need no lock
                        self._write(message)
                    job.not_before = time.monotonic() + _AGAIN_S
                    self._put_back(key, job)
                else:
                    for message in _of(key, job):
                        self._write(message)
            except Exception:  # this thread must live on
                log.exception("the kernel was not told that inode %#x changed", key)
            finally:
                with self._condition:
                    self._busy.discard(key)
                    self._condition.notify()

    def _take(self) -> tuple[int, _Job] | None:
        with self._condition:
            while not self._is_closing:
                now, soonest = time.monotonic(), None
                for key, job in self._jobs.items():
                    if key in self._busy:
                        continue
                    if job.not_before <= now:
                        del self._jobs[key]
                        self._busy.add(key)
                        return key, job
                    soonest = min(soonest or job.not_before, job.not_before)
                self._condition.wait(None if soonest is None else max(0.0, soonest - now))
            return None

    def _put_back(self, key: int, job: _Job) -> None:
        with self._condition:
            newer = self._jobs.pop(key, None)
            self._jobs[key] = job
        if newer is not None:
            self._put(key, newer)

    def _write(self, message: bytes) -> bool:
        try:
            os.write(self._kernel, message)
        except OSError as e:
            if e.errno == errno.ENOENT:
                self.sent["unknown"] += 1
            elif e.errno != errno.ENODEV or not self._is_closing:
                self.sent[errno.errorcode.get(e.errno or 0, "?")] += 1
            return False
        self.sent["ok"] += 1
        return True


def _of(key: int, job: _Job) -> Iterator[bytes]:
    for name, gone in job.names.items():
        yield _entry(key, name, gone)
    yield from _of_attributes(job)
    if job.pages:
        yield _inode(key, 0)


def _of_attributes(job: _Job) -> Iterator[bytes]:
    for inode in job.inodes:
        yield _inode(inode, -1)


def _message(code: int, body: bytes) -> bytes:
    return wire.OUT_HEADER.pack(wire.OUT_HEADER_BYTES + len(body), code, 0) + body


def _entry(folder: int, name: bytes, gone: bool) -> bytes:
    # Expired, a name stays attached to whoever uses it until a look-up says that it means something else: a mapped file
    # whose name is taken away is `(deleted)` in /proc/PID/maps, and can't be dumped by CRIU.
    body = wire.INVAL_ENTRY_OUT.pack(folder, len(name), 0 if gone else wire.FUSE_EXPIRE_ONLY)
    return _message(wire.NOTIFY_INVAL_ENTRY, body + name + b"\0")


def _inode(inode: int, offset: int) -> bytes:
    return _message(wire.NOTIFY_INVAL_INODE, wire.INVAL_INODE_OUT.pack(inode, offset, 0))
