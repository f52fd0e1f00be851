"""What changes in the folders of a source, told by inotify. Mechanism only: knows neither inode numbers nor FUSE.

One thread reads the kernel's queue, merges what it says of one name, and hands batches to the trio thread, one at a
time: while a batch is being worked on the next one grows here, and what is more than can be held becomes "everything
may have changed". A file that is being written is told of a few times a second, however many writes there are.

The table of mounts is watched as well: what is mounted over a folder of the source changes what lies below it, and
inotify does not say so.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import logging
import os
import select
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import trio

from weightfs import linux

log = logging.getLogger(__name__)

_MASK: Final = (
    linux.IN_MODIFY
    | linux.IN_ATTRIB
    | linux.IN_CLOSE_WRITE  # also the end of a writer that wrote through a mapping, which sends no IN_MODIFY
    | linux.IN_MOVED_FROM
    | linux.IN_MOVED_TO
    | linux.IN_CREATE
    | linux.IN_DELETE
    | linux.IN_DELETE_SELF
    | linux.IN_MOVE_SELF
    | linux.IN_ONLYDIR
    | linux.IN_EXCL_UNLINK
)
_NAMES: Final = linux.IN_MOVED_FROM | linux.IN_MOVED_TO | linux.IN_CREATE | linux.IN_DELETE
_READ_BYTES: Final = 256 << 10
_GATHER_S: Final = 0.005
"""After each read, so that what belongs together (create, write, close) comes in one batch."""
_PACE_S: Final = 0.1
"""Between two tellings of one folder, the first of which goes at once: each takes the folder's lock in the kernel."""
_AGAIN_S: Final = 0.25
"""Between two tellings of writes to one file."""
_MOST_PENDING: Final = 1 << 16  # names, about 20 MiB
_REPEAT_S: Final = 1.0
_RETRY_S: Final = 10.0
"""How long no more watches are asked for after the system's limit was met."""


class Kind(enum.IntFlag):
    """What happened to a name, or (empty name) to a folder itself."""

    NAME = 1
    """It means another file, or none, or a new one."""
    CONTENT = 2
    """The bytes, size and times of what it means may be others."""
    ATTRIBUTES = 4
    """Mode, owner, times, extended attributes."""
    ENDED = 8
    """The folder is not watched any more."""


@dataclass(slots=True)
class Batch:
    """What changed since the last one.

    Attributes:
        names: by the watched folder's key and the name in it, empty for the folder itself.
        everything: more than could be told: any name of any watched folder.
    """

    names: dict[tuple[bytes, bytes], Kind] = field(default_factory=dict)
    everything: bool = False


@dataclass(slots=True)
class _Watch:
    wd: int
    place: tuple[int, int]


class Watcher:
    """Watches of folders, each under a key that its caller chose. Thread-safe.

    Args:
        root: absolute path of the source; only mounts below it matter.
        most: how many folders to watch at most. A watch keeps its folder's inode in the kernel's memory, about 1 KiB.

    Attributes:
        batches, overflows: how many were told of.
    """

    def __init__(self, root: str, *, most: int = 1 << 16) -> None:
        """Open the queue.

        Raises:
            OSError: no inotify, or this user has too many queues (fs.inotify.max_user_instances).
        """
        self._root = os.fsencode(root)
        self._most = most
        self._lock = threading.Lock()
        self._by_key: dict[bytes, _Watch] = {}
        self._by_wd: dict[int, bytes] = {}
        self._by_place: dict[tuple[int, int], bytes] = {}
        self._refused: dict[tuple[int, int], str] = {}
        self._full_until = 0.0
        self._has_failed = False
        self._repeat_at: float | None = None
        self._pending = Batch()
        self._told_at: dict[tuple[bytes, bytes], float] = {}
        self._is_taken = threading.Event()
        self._is_taken.set()
        self._is_closing = False
        self.batches = 0
        self.overflows = 0
        self._queue = linux.inotify()
        self._wake_reader, self._wake_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._mount_table = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        self.mounts_below = self._read_mounts()
        self._thread: threading.Thread | None = None

    def start(self, deliver: Callable[[Batch], None], token: trio.lowlevel.TrioToken) -> None:
        """Begin to tell: `deliver` is called on the trio thread with each batch."""
        self._thread = threading.Thread(target=self._run, args=(deliver, token), name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End all watches."""
        self._is_closing = True
        os.write(self._wake_writer, b"x")
        self._is_taken.set()
        if self._thread is not None:
            self._thread.join()
        for fd in (self._queue, self._wake_reader, self._wake_writer, self._mount_table):
            os.close(fd)

    # Watches

    def __len__(self) -> int:
        return len(self._by_key)

    def __contains__(self, key: bytes) -> bool:
        return key in self._by_key

    def key_of(self, place: tuple[int, int]) -> bytes | None:
        """The key of a watched folder by device and inode: a watched inode lives, so its number is nobody else's."""
        return self._by_place.get(place)

    def refused(self) -> dict[str, int]:
        """How many of the folders asked for are not watched, by reason."""
        with self._lock:
            return dict(Counter(self._refused.values()))

    def add(self, fd: int, place: tuple[int, int], key: bytes) -> bool:
        """Watch the folder behind a descriptor; False where that is not to be had."""
        with self._lock:
            if key in self._by_key:
                return True
            reason = self._why_not(place)
            if reason is None:
                try:
                    # Under the lock: the thread that reads must not meet the number before it is known.
                    wd = linux.inotify_add(self._queue, fd, _MASK)
                except OSError as e:
                    reason = "fs.inotify.max_user_watches" if e.errno == errno.ENOSPC else os.strerror(e.errno or 0)
                    if e.errno == errno.ENOSPC:
                        self._full_until = time.monotonic() + _RETRY_S
                        log.warning("no more inotify watches: %d folders are watched", len(self._by_key))
                else:
                    self._by_key[key] = _Watch(wd, place)
                    self._by_wd[wd] = key
                    self._by_place[place] = key
                    self._refused.pop(place, None)
                    return True
            self._note_refusal(place, reason)
            return False

    def refuse(self, place: tuple[int, int], reason: str) -> None:
        """Note that a folder can't be watched for a reason only the caller knows."""
        with self._lock:
            self._note_refusal(place, reason)

    def is_refused(self, place: tuple[int, int]) -> bool:
        """Whether `refuse` or `add` has said no to a folder before."""
        return place in self._refused

    def _note_refusal(self, place: tuple[int, int], reason: str) -> None:
        self._refused[place] = reason
        while len(self._refused) > _MOST_PENDING:
            del self._refused[next(iter(self._refused))]

    def _why_not(self, place: tuple[int, int]) -> str | None:
        if self._has_failed:
            return "watching has failed, see the log"
        if len(self._by_key) >= self._most:
            return f"more than {self._most} folders"
        if time.monotonic() < self._full_until:
            return "fs.inotify.max_user_watches"
        return None

    def remove(self, key: bytes) -> None:
        """End the watch of a folder, if there is one."""
        with self._lock:
            watch = self._by_key.get(key)
            if watch is None:
                return
            self._drop(key, watch)
            try:
                linux.inotify_remove(self._queue, watch.wd)
            except OSError as e:
                log.debug("a watch had ended by itself: %s", e.strerror)

    def _drop(self, key: bytes, watch: _Watch) -> None:
        del self._by_key[key], self._by_wd[watch.wd]
        self._by_place.pop(watch.place, None)

    # The thread

    def _run(self, deliver: Callable[[Batch], None], token: trio.lowlevel.TrioToken) -> None:
        try:
            self._tell(deliver, token)
        except trio.RunFinishedError:
            log.debug("the trio thread has ended first")
        except Exception:
            log.exception("folders are not watched any more")
            self._fail()
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(deliver, Batch(everything=True))

    def _fail(self) -> None:
        """From now on nothing is watched: what is not told must not be believed."""
        with self._lock:
            self._has_failed = True
            for key, watch in list(self._by_key.items()):
                self._drop(key, watch)

    def _tell(self, deliver: Callable[[Batch], None], token: trio.lowlevel.TrioToken) -> None:
        poll = select.poll()
        poll.register(self._queue, select.POLLIN)
        poll.register(self._mount_table, select.POLLPRI)
        poll.register(self._wake_reader, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll(_PACE_S * 500 if self._is_waiting() else None)}
            if self._repeat_at is not None and time.monotonic() > self._repeat_at:
                self._repeat_at = None
                self._pending = Batch(everything=True)
            if self._is_closing:
                return
            if self._mount_table in ready:
                self._compare_mounts()
            self._take()
            if self._wake_reader in ready:
                os.read(self._wake_reader, 4096)
            if self._is_taken.is_set() and (batch := self._due()) is not None:
                self._is_taken.clear()
                token.run_sync_soon(self._hand_over, deliver, batch)
            time.sleep(_GATHER_S)

    def _is_waiting(self) -> bool:
        return bool(self._pending.names) or self._pending.everything or self._repeat_at is not None

    def _hand_over(self, deliver: Callable[[Batch], None], batch: Batch) -> None:
        self.batches += 1
        try:
            deliver(batch)
        except Exception:
            log.exception("changes could not be told: folders are not watched any more")
            self._fail()
            deliver(Batch(everything=True))
        finally:
            self._is_taken.set()
            if not self._is_closing:
                os.write(self._wake_writer, b"x")

    def _due(self) -> Batch | None:
        """What is to be told now: everything but what was told of a moment ago."""
        now = time.monotonic()
        with self._lock:
            pending = self._pending
            if pending.everything:
                self._pending = Batch()
                self._told_at.clear()
                return pending
            told = self._told_at
            due = {
                (folder, name): kind
                for (folder, name), kind in pending.names.items()
                if now - told.get((folder, b""), 0.0) >= _PACE_S
                and (kind != Kind.CONTENT or now - told.get((folder, name), 0.0) >= _AGAIN_S)
            }
            if not due:
                return None
            self._pending = Batch({name: kind for name, kind in pending.names.items() if name not in due})
            self._told_at = {name: at for name, at in told.items() if now - at < _AGAIN_S}
            self._told_at |= {name: now for name, kind in due.items() if kind & Kind.CONTENT}
            self._told_at |= {(folder, b""): now for folder, _ in due}
            return Batch(due)

    def _take(self) -> None:
        """Read all there is in the queue."""
        while True:
            try:
                raw = os.read(self._queue, _READ_BYTES)
            except BlockingIOError:
                return
            at = 0
            with self._lock:
                while at < len(raw):
                    wd, mask, _, length = linux.INOTIFY_EVENT.unpack_from(raw, at)
                    at += linux.INOTIFY_EVENT.size
                    self._note(wd, mask, raw[at : at + length].rstrip(b"\0"))
                    at += length

    def _note(self, wd: int, mask: int, name: bytes) -> None:
        if mask & linux.IN_Q_OVERFLOW:
            self._everything("the kernel's queue was full")
            return
        key = self._by_wd.get(wd)
        if key is None:
            return
        kind = Kind(0)
        if mask & (linux.IN_IGNORED | linux.IN_DELETE_SELF):
            kind |= Kind.ENDED
            if mask & linux.IN_IGNORED:
                self._drop(key, self._by_key[key])
        if mask & _NAMES:
            kind |= Kind.NAME
        if mask & (linux.IN_MODIFY | linux.IN_CLOSE_WRITE):
            kind |= Kind.CONTENT
        if mask & (linux.IN_ATTRIB | linux.IN_MOVE_SELF):
            kind |= Kind.ATTRIBUTES
        if kind and not self._pending.everything:
            names = self._pending.names
            names[key, name] = names.get((key, name), Kind(0)) | kind
            if len(names) > _MOST_PENDING:
                self._everything("more changes than can be held")

    def _everything(self, why: str) -> None:
        log.warning("all names are asked for anew: %s", why)
        self.overflows += 1
        # And once more: an answer that was on its way to the kernel then may have made it believe an old name again.
        self._repeat_at = time.monotonic() + _REPEAT_S
        self._pending = Batch(everything=True)

    # Mounts inside the source

    def _read_mounts(self) -> frozenset[bytes]:
        prefix = self._root.rstrip(b"/") + b"/"
        os.lseek(self._mount_table, 0, os.SEEK_SET)
        raw = b""
        while part := os.read(self._mount_table, 1 << 16):
            raw += part
        places = (line.split(b" ")[4] for line in raw.splitlines())
        decoded = (place.decode("unicode_escape").encode("latin-1") if b"\\" in place else place for place in places)
        return frozenset(place[len(prefix) :] for place in decoded if place.startswith(prefix))

    def _compare_mounts(self) -> None:
        now = self._read_mounts()
        if now != self.mounts_below:
            self.mounts_below = now
            with self._lock:
                self._everything("something was mounted or unmounted inside the source")
