"""The index: records of files and inodes by key, one writer thread, every value sealed (`seals.py`).

Reads are short transactions on the caller's thread and return copies. Writes go into an overlay that reads see at
once, and a thread commits them in groups and syncs, so no caller waits for the disk; a daemon that dies loses at most
the last group, which the next look-up makes again.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Final, Protocol, TypeVar

import msgspec

from weightfs.errors import IndexStoreError
from weightfs.index import young
from weightfs.index.database import Database
from weightfs.index.files import IndexFiles
from weightfs.index.numbers import NumberKeeper, Numbers
from weightfs.index.opening import Transaction
from weightfs.index.schema import IDENTITY_BYTES, EntryRecord, FileRecord, epoch_of
from weightfs.index.seals import seal, unseal

log = logging.getLogger(__name__)

_QUIET_S: Final = 0.25
"""Commit once nothing was put for so long: a commit's loop takes the interpreter from the thread that serves."""
_LONGEST_S: Final = 2.0
_GROUP: Final = 1000  # records a commit: what a look-up may have to wait for, about 2 ms
_Record = TypeVar("_Record", EntryRecord, FileRecord)


class Journal(NumberKeeper, Protocol):
    """Where puts are noted until they are committed, beside the numbers still to be given out. Outlives the process."""

    def append(self, room: bytes, key: bytes, value: bytes) -> bool:
        """Note a record; False when there is no room."""

    def records(self) -> Iterator[tuple[bytes, bytes, bytes]]:
        """Room, key, value of those noted, oldest first."""

    def clear(self) -> None:
        """All are committed."""


class IndexStore:
    """What weightfs remembers of one source. Thread-safe; `close` commits what is pending.

    Attributes:
        database: what is on file.
    """

    def __init__(
        self, folder: str, source: str, *, epoch_after: int = 0, journal: Journal | None = None, check: bool = True
    ) -> None:
        """Open or make the index of `source` in `folder`.

        Args:
            folder: made if missing, mode 0700.
            source: absolute path or URL; an index of another source is foreign.
            epoch_after: a new index gets an epoch larger than this.
            journal: what a predecessor left uncommitted, and where this process leaves it in turn.
            check: whether an index that was not closed may be damaged. A process that is killed damages nothing: what
                it wrote is in the page cache. A machine that stops may, and so may whoever writes into the file.

        Raises:
            IndexStoreError: the folder can't be written.
        """
        self._journal = journal
        self._young = young.YoungFiles(journal.append if journal is not None else lambda *_: None)
        self._wake = threading.Event()
        self._closing = False
        self._puts = 0
        self._overlay: dict[tuple[bytes, bytes], bytes] = {}
        self._pending_bases: list[int] = []  # sorted; those of the overlay's room `bases`
        self._files = IndexFiles(folder)
        self.database = Database(
            self._files, source, Numbers(self._files, journal), epoch_after=epoch_after, may_be_damaged=check
        )
        self._lock = self.database.lock
        self._replay()
        self._writer = threading.Thread(target=self._write, name="index-writer", daemon=True)
        self._writer.start()

    @property
    def epoch(self) -> int:
        """High bits of the numbers it gives out."""
        return self.database.numbers.epoch

    @property
    def set_aside(self) -> tuple[str, str] | None:
        """Where an unusable predecessor was moved, with the reason, or None."""
        return self.database.set_aside

    def _replay(self) -> None:
        """Put again what a predecessor had put and not committed."""
        if self._journal is None:
            return
        for room, key, value in self._journal.records():
            if room == young.ROOM:
                self._young.take_over(key, value)
                continue
            self._overlay[room, key] = value
            if room == b"bases":
                bisect.insort(self._pending_bases, int.from_bytes(key, "big"))
        if self._overlay:
            self._wake.set()

    def take(self, count: int = 1) -> int:
        """Reserve a run of `count` inode numbers and give its first.

        Raises:
            IndexStoreError: the block they come from is used up, and another could not be written.
        """
        return self.database.take_numbers(count)

    # Records

    def number_of(self, key: bytes) -> int | None:
        """The inode number that a source's inode key has, if it ever got one."""
        value = self._get(b"keys", key)
        return int.from_bytes(value, "big") if value is not None else None

    def numbers_of(self, keys: Iterable[bytes]) -> dict[bytes, int]:
        """`number_of` for many keys in one transaction; keys without a number are left out."""

        def read(txn: Transaction) -> dict[bytes, int]:
            values = ((key, self._find(txn, b"keys", key)) for key in keys)
            return {key: int.from_bytes(value, "big") for key, value in values if value is not None}

        return self.database.read(read) or {}

    def entry(self, inode: int) -> EntryRecord | None:
        """How to find an inode; None for a number this index never gave out."""
        return self._record(b"entries", inode.to_bytes(8, "big"), EntryRecord)

    def is_committed(self, inode: int) -> bool:
        """Whether what was put last of an entry is on file: a successor of a killed process will find it.

        What was on a file that had to be set aside is not.
        """
        return epoch_of(inode) == self.epoch and (b"entries", inode.to_bytes(8, "big")) not in self._overlay

    def entries(self) -> Iterator[tuple[int, EntryRecord]]:
        """All entries, a group a transaction; what is put meanwhile may be left out."""
        after = b""
        while True:

            def read(txn: Transaction, after: bytes = after) -> list[tuple[bytes, bytes]]:
                with txn.cursor(db=self.database.rooms[b"entries"]) as cursor:
                    if not cursor.set_range(after):
                        return []
                    group = itertools.islice(cursor, _GROUP)
                    return [(bytes(key), unseal(b"entries", bytes(key), bytes(sealed))) for key, sealed in group]

            found = self.database.read(read)
            if not found:
                return
            for key, value in found:
                yield int.from_bytes(key, "big"), msgspec.msgpack.decode(value, type=EntryRecord)
            after = found[-1][0] + b"\0"

    def put_entry(self, inode: int, entry: EntryRecord) -> None:
        """Remember where an inode was last seen."""
        self._put(b"entries", inode.to_bytes(8, "big"), msgspec.msgpack.encode(entry))

    def put_number(self, key: bytes, inode: int) -> None:
        """Give a key its number for ever."""
        self._put(b"keys", key, inode.to_bytes(8, "big"))

    def file(self, content: bytes) -> FileRecord | None:
        """What the header of this very content said."""
        return self._record(b"files", content, FileRecord)

    def put_file(self, content: bytes, record: FileRecord) -> None:
        """Remember a parsed header."""
        self._put(b"files", content, msgspec.msgpack.encode(record))

    def put_file_once(self, content: bytes, record: FileRecord) -> FileRecord:
        """`put_file`, unless somebody was faster; gives the record that counts."""
        with self._lock:
            if (known := self.file(content)) is not None:
                return known
            self.put_file(content, record)
            return record

    def put_young(self, file: young.YoungFile) -> None:
        """Remember, for this mount only, a header that is too young to be recorded."""
        with self._lock:
            self._young.put(file)

    def young_file(self, inode: int) -> young.YoungFile | None:
        """Whose view `inode` is, if that was put by `put_young` and is not recorded yet."""
        with self._lock:
            return self._young.find(inode)

    def put_owner(self, base: int, identity: bytes, path: bytes, name: str) -> None:
        """Remember which content a run of views belongs to, and where and as what that was last seen."""
        with self._lock:
            self._young.drop(base)
            if base not in self._pending_bases:
                bisect.insort(self._pending_bases, base)
            self._put(b"bases", base.to_bytes(8, "big"), identity + msgspec.msgpack.encode((path, name)))

    def owner_of_view(self, inode: int) -> tuple[bytes, bytes, str] | None:
        """Identity, path and name of the content in whose run of views `inode` may lie: that with the largest base not
        above it. The caller checks the length of the run."""
        wanted = inode.to_bytes(8, "big")

        def read(txn: Transaction) -> bytes | None:
            at = bisect.bisect_right(self._pending_bases, inode)
            pending = self._pending_bases[at - 1].to_bytes(8, "big") if at else b""
            with txn.cursor(db=self.database.rooms[b"bases"]) as cursor:
                if cursor.set_range(wanted) and cursor.key() == wanted:
                    found = wanted
                else:
                    moved = cursor.prev() if cursor.key() else cursor.last()
                    found = bytes(cursor.key()) if moved else b""
            best = max(pending, found)
            return self._find(txn, b"bases", best) if best else None

        value = self.database.read(read)
        if value is None:
            return None
        path, name = msgspec.msgpack.decode(value[IDENTITY_BYTES:], type=tuple[bytes, str])
        return value[:IDENTITY_BYTES], path, name

    def _record(self, room: bytes, key: bytes, kind: type[_Record]) -> _Record | None:
        value = self._get(room, key)
        if value is None:
            return None
        try:
            return msgspec.msgpack.decode(value, type=kind)
        except msgspec.MsgspecError as e:
            with self._lock:
                self._overlay.pop((room, key), None)
                self.database.rebuild(f"a record of room {room.decode()} has an unknown form: {e}")
            return None

    def _get(self, room: bytes, key: bytes) -> bytes | None:
        if (value := self._overlay.get((room, key))) is not None:  # also where there is no index to read from
            return value
        return self.database.read(lambda txn: self._find(txn, room, key))

    def _find(self, txn: Transaction, room: bytes, key: bytes) -> bytes | None:
        value = self._overlay.get((room, key))
        if value is None and (sealed := txn.get(key, db=self.database.rooms[room])) is not None:
            value = unseal(room, key, bytes(sealed))
        return value

    def _put(self, room: bytes, key: bytes, value: bytes) -> None:
        with self._lock:
            self._overlay[room, key] = value
            self._puts += 1
            if self._journal is not None and not self._journal.append(room, key, value):
                with contextlib.suppress(IndexStoreError):  # the writer tries again
                    self.flush()
        if not self._wake.is_set():
            self._wake.set()

    # Writing

    def _write(self) -> None:
        while not self._closing:
            self._wake.wait()
            # Not woken by each put: this thread would take the interpreter from the one that puts, every time.
            first, before = time.monotonic(), -1
            while before != self._puts and time.monotonic() - first < _LONGEST_S and not self._closing:
                before = self._puts
                time.sleep(_QUIET_S)
            self._wake.clear()
            try:
                self.flush()
            except IndexStoreError as e:
                # Full or failing disk: the overlay keeps what is not written, so this mount goes on; it is tried again.
                log.warning("index not written: %s", e)
                time.sleep(1)
                self._wake.set()

    def flush(self) -> None:
        """Commit what is pending, with fsync.

        Raises:
            IndexStoreError: it could not be written; nothing is lost while the process lives.
        """
        self._commit()
        self.database.sync()

    def commit(self) -> None:
        """Commit what is pending, for a process that opens the index next; what can't be is in the journal."""
        with contextlib.suppress(IndexStoreError):
            self._commit()

    def _commit(self) -> None:
        while self._overlay:
            with self._lock:
                group = dict(itertools.islice(self._overlay.items(), _GROUP))

                def write(txn: Transaction, group: dict[tuple[bytes, bytes], bytes] = group) -> None:
                    for (room, key), value in group.items():
                        txn.put(key, seal(room, key, value), db=self.database.rooms[room])

                self.database.write(write)
                for entry in group:
                    del self._overlay[entry]
        with self._lock:
            if not self._overlay:
                self._pending_bases.clear()
                if self._journal is not None:
                    self._journal.clear()
                    self._young.note_again()

    def close(self) -> None:
        """Commit, close, and leave the mark that spares the next open its check."""
        self._closing = True
        self._wake.set()
        self._writer.join()
        try:
            self.flush()
        except IndexStoreError as e:
            log.warning("index not written: %s", e)
        self.database.close()
