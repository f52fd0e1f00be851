"""The index on disk: LMDB, one writer thread, every value sealed with a digest of its key and itself.

Rooms (named databases): `meta`, `keys` (inode key -> number), `entries` (number -> EntryRecord), `files` (identity and
format -> FileRecord), `bases` (first number of a run of views -> identity, path, name).

Reads are short transactions on the caller's thread and return copies. Writes go into an overlay that reads see at
once, and a thread commits them in groups and syncs, so no caller waits for the disk; a daemon that dies loses at most
the last group, which the next look-up makes again. Numbers are reserved on disk in blocks before any of a block is
given out: a crash skips numbers and never repeats one.

What cannot be read, is foreign or of another schema is renamed aside, and a new index begins under a new epoch.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Protocol, TypeVar

import lmdb
import msgspec

from weightfs.errors import IndexStoreError, UnfitError
from weightfs.index import young
from weightfs.index.schema import (
    IDENTITY_BYTES,
    MIGRATIONS,
    SCHEMA,
    SERIALS,
    EntryRecord,
    FileRecord,
    epoch_of,
    inode_number,
    new_epoch,
)

log = logging.getLogger(__name__)

_ROOMS: Final = (b"meta", b"keys", b"entries", b"files", b"bases")
_BLOCK: Final = 1 << 16  # numbers reserved by one small commit
_FIRST_MAP_BYTES: Final = 16 << 20
_QUIET_S: Final = 0.25
"""Commit once nothing was put for so long: a commit's loop takes the interpreter from the thread that serves."""
_LONGEST_S: Final = 2.0
_SEAL: Final = 8
_CHECK_TIMEOUT_S: Final = 60
_DAMAGED: Final = (
    lmdb.CorruptedError,
    lmdb.InvalidError,
    lmdb.PageNotFoundError,
    lmdb.PanicError,
    lmdb.VersionMismatchError,
)
"""What LMDB says of a file that is not, or no longer, an index; anything else (a full disk, no memory) says nothing of
the file."""
_GROUP: Final = 1000  # records a commit: what a look-up may have to wait for, about 2 ms
_LOCK_FILE_BYTES: Final = 64 << 10
Transaction = lmdb.Transaction  # for the annotations of those who may not import lmdb
_T = TypeVar("_T")
_Record = TypeVar("_Record", EntryRecord, FileRecord)


class _Meta(msgspec.Struct, frozen=True):
    product: str
    schema: int
    source: str
    epoch: int


class Journal(Protocol):
    """Where puts are noted until they are committed, and the numbers still to be given out. Outlives the process."""

    def append(self, room: bytes, key: bytes, value: bytes) -> bool:
        """Note a record; False when there is no room."""

    def records(self) -> Iterator[tuple[bytes, bytes, bytes]]:
        """Room, key, value of those noted, oldest first."""

    def clear(self) -> None:
        """All are committed."""

    def numbers(self) -> tuple[int, int, int]:
        """Epoch, next serial, end of the reserved block; zeros when there are none."""

    def note_numbers(self, epoch: int, following: int, reserved: int) -> None:
        """Serials from `following` to `reserved`, exclusive, are still to be given out."""


class CorruptIndexError(IndexStoreError):
    """The file is there and is not an index of ours, or not any more."""


def _seal(room: bytes, key: bytes, value: bytes) -> bytes:
    return hashlib.blake2b(value, digest_size=_SEAL, key=room + key[:32]).digest() + value


def _unseal(room: bytes, key: bytes, sealed: bytes) -> bytes:
    value = sealed[_SEAL:]
    if _seal(room, key, value)[:_SEAL] != sealed[:_SEAL]:
        raise CorruptIndexError(f"a record of room {room.decode()} fails its digest")
    return value


class IndexStore:
    """What weightfs remembers of one source. Thread-safe; `close` commits what is pending.

    Attributes:
        epoch: high bits of the numbers it gives out.
        set_aside: where an unusable predecessor was moved at open, with the reason, or None.
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
        self._folder = folder
        self._source = source
        self._journal = journal
        self._may_be_damaged = check
        self._young = young.YoungFiles(journal.append if journal is not None else lambda *_: None)
        self._path = os.path.join(folder, "index.lmdb")
        self._lock = threading.RLock()
        self._wake = threading.Event()
        self._closing = False
        self._puts = 0
        self._overlay: dict[tuple[bytes, bytes], bytes] = {}
        self._pending_bases: list[int] = []  # sorted; those of the overlay's room `bases`
        self._env: lmdb.Environment | None = None
        self._next, self._reserved = 0, 0
        self.set_aside: tuple[str, str] | None = None
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            self._open(epoch_after)
            self._replay()
        except OSError as e:
            raise IndexStoreError(
                f"can't keep an index: {os.strerror(e.errno or 0)}",
                path=folder,
                mend="--state-dir names another folder",
            ) from e
        except lmdb.Error as e:
            raise IndexStoreError(f"can't keep an index: {e}", path=folder) from e
        self._writer = threading.Thread(target=self._write, name="index-writer", daemon=True)
        self._writer.start()

    @staticmethod
    def can_open(folder: str) -> None:
        """Examine whether this version can go on with an index, and keep its numbers; changes nothing.

        Raises:
            UnfitError: it is of a schema that this version has no way from.
        """
        path = os.path.join(folder, "index.lmdb")
        if not os.path.exists(path):
            return
        try:
            with lmdb.open(path, subdir=False, readonly=True, max_dbs=len(_ROOMS), max_readers=512) as env:
                room = env.open_db(b"meta", create=False)
                with env.begin(db=room) as txn:
                    raw = txn.get(b"meta")
                    meta = msgspec.msgpack.decode(_unseal(b"meta", b"meta", bytes(raw or b"")), type=_Meta)
        except (lmdb.Error, CorruptIndexError, msgspec.MsgspecError) as e:
            log.warning("index not examined: %s", e)  # it is set aside when it is opened, as ever
            return
        if meta.schema != SCHEMA and meta.schema not in MIGRATIONS:
            raise UnfitError(
                f"the index has schema {meta.schema}, and this version knows no way from it to its own, {SCHEMA}",
                path=path,
                mend="umount, then mount again: a new index is built",
            )

    # Opening

    def _open(self, epoch_after: int) -> None:
        try:
            if self._may_be_damaged and os.path.exists(self._path):
                self._check()
            self._attach(epoch_after)
        except (*_DAMAGED, CorruptIndexError, msgspec.MsgspecError) as e:
            self._put_aside(str(e))
            self._attach(epoch_after)

    def _put_aside(self, reason: str) -> None:
        aside = f"{self._path}.unusable-{time.time_ns()}"
        with contextlib.suppress(FileNotFoundError):
            os.replace(self._path, aside)
        for leftover in (self._path + "-lock", self._marker):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(leftover)
        self.set_aside = (aside, reason)
        log.warning("index set aside to %s, a new one is built: %s", aside, reason)
        prefix = os.path.basename(self._path) + ".unusable-"
        for name in os.listdir(self._folder):  # one is kept for whoever wants to know; more would fill the disk
            path = os.path.join(self._folder, name)
            if name.startswith(prefix) and path != aside:
                os.unlink(path)

    def _rebuild(self, reason: str) -> None:
        """Begin anew under a live mount. What is pending stays pending and goes into the new index.

        Where that can't be made (a full disk), the mount goes on without one, and the writer tries again.
        """
        if self._env is not None:
            self._env.close()
            self._env = None
        try:
            self._put_aside(reason)
            self._attach(self.epoch)
        except (OSError, lmdb.Error) as e:
            log.warning("no new index yet: %s", e)

    def _attach(self, epoch_after: int) -> None:
        size = os.path.getsize(self._path) if os.path.exists(self._path) else 0
        map_bytes = max(_FIRST_MAP_BYTES, 2 * size)
        # LMDB maps its lock file: on a full disk the first touch of a hole would end the process.
        lock = os.open(self._path + "-lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(lock, 0, _LOCK_FILE_BYTES)
        finally:
            os.close(lock)
        # Without fsync in the commit, which would hold the lock; `flush` syncs after. Power lost in between may damage
        # the file: the walk at the next open, and the seals, find that.
        env = lmdb.open(
            self._path,
            subdir=False,
            map_size=map_bytes,
            max_dbs=len(_ROOMS),
            mode=0o600,
            readahead=False,
            max_readers=512,
            sync=False,
        )
        try:
            self._rooms = {room: env.open_db(room) for room in _ROOMS}
            with env.begin(write=True) as txn:
                raw = txn.get(b"meta", db=self._rooms[b"meta"])
                if raw is None:
                    meta = _Meta("weightfs", SCHEMA, self._source, new_epoch(max(epoch_after, self._last_epoch())))
                    txn.put(b"meta", _seal(b"meta", b"meta", msgspec.msgpack.encode(meta)), db=self._rooms[b"meta"])
                else:
                    meta = msgspec.msgpack.decode(_unseal(b"meta", b"meta", bytes(raw)), type=_Meta)
                self._judge(meta)
                meta = self._migrate(txn, meta)
                self.epoch = meta.epoch
                taken_over = self._take_over_numbers()
                if not taken_over:
                    self._reserve(txn, 0)
            self._note_epoch()
            if not taken_over:
                env.sync(True)
            env.reader_check()  # readers that were killed would keep their pages for ever
            self._note_numbers()
        except BaseException:
            self._next = self._reserved = 0
            env.close()
            raise
        self._env = env
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._marker)

    def _take_over_numbers(self) -> bool:
        """Go on where the predecessor's block of numbers was left, if it was of this epoch."""
        epoch, following, reserved = self._journal.numbers() if self._journal is not None else (0, 0, 0)
        if epoch != self.epoch:
            return False
        self._next, self._reserved = following, reserved
        return True

    def _note_numbers(self) -> None:
        if self._journal is not None:
            self._journal.note_numbers(self.epoch, self._next, self._reserved)

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

    def _last_epoch(self) -> int:
        """The epoch of the index that was here before, also when that is unreadable or the clock went back."""
        try:
            with open(self._epoch_file) as file:
                return int(file.read(20))
        except (OSError, ValueError):
            return 0

    def _note_epoch(self) -> None:
        if self._last_epoch() != self.epoch:
            fresh = self._epoch_file + ".new"
            with open(fresh, "w") as file:
                file.write(str(self.epoch))
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, self._epoch_file)

    @property
    def _epoch_file(self) -> str:
        return self._path + ".epoch"

    def _judge(self, meta: _Meta) -> None:
        if meta.product != "weightfs" or meta.source != self._source:
            raise CorruptIndexError(f"it belongs to {meta.product} {meta.source}")

    def _migrate(self, txn: lmdb.Transaction, meta: _Meta) -> _Meta:
        """Bring the index of an older version to this one's schema, numbers kept, in the transaction that opens it.

        Raises:
            CorruptIndexError: there is no way from that schema.
        """
        before = meta.schema
        while meta.schema != SCHEMA:
            step = MIGRATIONS.get(meta.schema)
            if step is None:
                raise CorruptIndexError(f"its schema is {meta.schema}, this version reads {SCHEMA}")
            for room in _ROOMS[1:]:
                with txn.cursor(db=self._rooms[room]) as cursor:
                    for key, sealed in cursor:
                        kept, value = bytes(key), _unseal(room, bytes(key), bytes(sealed))
                        if (fresh := step(room, value)) != value:
                            cursor.put(kept, _seal(room, kept, fresh))
            meta = msgspec.structs.replace(meta, schema=meta.schema + 1)
        if meta.schema != before:
            txn.put(b"meta", _seal(b"meta", b"meta", msgspec.msgpack.encode(meta)), db=self._rooms[b"meta"])
            log.warning("index brought from schema %d to %d", before, meta.schema)
        return meta

    @property
    def _marker(self) -> str:
        return self._path + ".clean"

    def _check(self) -> None:
        """Walk an index that was not closed by us, in a child: damaged pages can crash the process that reads them.

        Raises:
            CorruptIndexError: the walk failed, crashed or did not end.
        """
        stat = os.stat(self._path)
        try:
            with open(self._marker) as marker:
                if marker.read() == _fingerprint(stat):
                    return
        except OSError:
            pass  # no marker: killed, or the power went
        try:
            done = subprocess.run(
                [sys.executable, "-m", "weightfs.index.store", self._path],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_CHECK_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise CorruptIndexError("reading it did not end") from None
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"reading it ended with status {done.returncode}"]
            raise CorruptIndexError(lines[-1])

    # Numbers

    def take(self, count: int = 1) -> int:
        """Reserve a run of `count` inode numbers and give its first."""
        with self._lock:
            if self._next + count > self._reserved:
                try:
                    self._writing(lambda txn: self._reserve(txn, count))
                    self._sync()
                except IndexStoreError:
                    self._next = self._reserved = 0  # what is not on disk must not be given out
                    raise
            first = inode_number(self.epoch, self._next)
            self._next += count
            self._note_numbers()
            return first

    def _reserve(self, txn: lmdb.Transaction, count: int) -> None:
        room = self._rooms[b"meta"]
        raw = txn.get(b"next", db=room)
        meta_raw = txn.get(b"meta", db=room)
        assert meta_raw is not None, "written when the index was made"
        # 0 is no inode and 1 the root, whose number every FUSE mount fixes.
        start = int.from_bytes(_unseal(b"meta", b"next", bytes(raw)), "big") if raw is not None else 2
        size = max(_BLOCK, count)
        # Read each time: another daemon that shares the index may have begun an epoch.
        meta = msgspec.msgpack.decode(_unseal(b"meta", b"meta", bytes(meta_raw)), type=_Meta)
        if start + size > SERIALS:
            # Records hold whole numbers, so those of past epochs stay what they are.
            meta = msgspec.structs.replace(meta, epoch=new_epoch(max(meta.epoch, self._last_epoch())))
            txn.put(b"meta", _seal(b"meta", b"meta", msgspec.msgpack.encode(meta)), db=room)
            start = 2
        self.epoch = meta.epoch
        self._note_epoch()
        txn.put(b"next", _seal(b"meta", b"next", (start + size).to_bytes(8, "big")), db=room)
        self._next, self._reserved = start, start + size

    # Records

    def number_of(self, key: bytes) -> int | None:
        """The inode number that a source's inode key has, if it ever got one."""
        value = self._get(b"keys", key)
        return int.from_bytes(value, "big") if value is not None else None

    def numbers_of(self, keys: Iterable[bytes]) -> dict[bytes, int]:
        """`number_of` for many keys in one transaction; keys without a number are left out."""

        def read(txn: lmdb.Transaction) -> dict[bytes, int]:
            values = ((key, self._find(txn, b"keys", key)) for key in keys)
            return {key: int.from_bytes(value, "big") for key, value in values if value is not None}

        return self._reading(read) or {}

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

            def read(txn: lmdb.Transaction, after: bytes = after) -> list[tuple[bytes, bytes]]:
                with txn.cursor(db=self._rooms[b"entries"]) as cursor:
                    if not cursor.set_range(after):
                        return []
                    group = itertools.islice(cursor, _GROUP)
                    return [(bytes(key), _unseal(b"entries", bytes(key), bytes(sealed))) for key, sealed in group]

            found = self._reading(read)
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

        def read(txn: lmdb.Transaction) -> bytes | None:
            at = bisect.bisect_right(self._pending_bases, inode)
            pending = self._pending_bases[at - 1].to_bytes(8, "big") if at else b""
            with txn.cursor(db=self._rooms[b"bases"]) as cursor:
                if cursor.set_range(wanted) and cursor.key() == wanted:
                    found = wanted
                else:
                    moved = cursor.prev() if cursor.key() else cursor.last()
                    found = bytes(cursor.key()) if moved else b""
            best = max(pending, found)
            return self._find(txn, b"bases", best) if best else None

        value = self._reading(read)
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
                self._rebuild(f"a record of room {room.decode()} has an unknown form: {e}")
            return None

    def _get(self, room: bytes, key: bytes) -> bytes | None:
        if (value := self._overlay.get((room, key))) is not None:  # also where there is no index to read from
            return value
        return self._reading(lambda txn: self._find(txn, room, key))

    def _find(self, txn: lmdb.Transaction, room: bytes, key: bytes) -> bytes | None:
        value = self._overlay.get((room, key))
        if value is None and (sealed := txn.get(key, db=self._rooms[room])) is not None:
            value = _unseal(room, key, bytes(sealed))
        return value

    def _reading(self, read: Callable[[lmdb.Transaction], _T]) -> _T | None:
        """Read in one transaction; None where the index can't be read just now, which is never an error to a caller."""
        with self._lock:
            for _ in range(3):
                if self._env is None:
                    break
                try:
                    with self._env.begin() as txn:
                        return read(txn)
                except lmdb.MapResizedError:
                    self._env.set_mapsize(0)  # a daemon that shares it has made it grow
                except (*_DAMAGED, CorruptIndexError) as e:
                    self._rebuild(str(e))
                except lmdb.Error as e:
                    log.warning("index not read: %s", e)
                    break
        return None

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

    def _writing(self, write: Callable[[lmdb.Transaction], None]) -> None:
        """Write in one transaction, under the lock as every other: growing the map ends those that are open.

        Raises:
            IndexStoreError: it could not be written.
        """
        with self._lock:
            for _ in range(8):  # each turn doubles the map, or begins anew
                try:
                    if self._env is None:
                        self._attach(self.epoch)
                    assert self._env is not None
                    with self._env.begin(write=True) as txn:
                        write(txn)
                    return
                except lmdb.MapFullError:
                    assert self._env is not None
                    self._env.set_mapsize(2 * self._env.info()["map_size"])
                except lmdb.MapResizedError:
                    assert self._env is not None
                    self._env.set_mapsize(0)
                except (*_DAMAGED, CorruptIndexError) as e:
                    self._rebuild(str(e))
                except (OSError, lmdb.Error) as e:
                    raise IndexStoreError(f"can't be written: {e}", path=self._path) from e
        raise IndexStoreError("can't be written: it is damaged or full again and again", path=self._path)

    def flush(self) -> None:
        """Commit what is pending, with fsync.

        Raises:
            IndexStoreError: it could not be written; nothing is lost while the process lives.
        """
        self._commit()
        self._sync()

    def commit(self) -> None:
        """Commit what is pending, for a process that opens the index next; what can't be is in the journal."""
        with contextlib.suppress(IndexStoreError):
            self._commit()

    def _commit(self) -> None:
        while self._overlay:
            with self._lock:
                group = dict(itertools.islice(self._overlay.items(), _GROUP))

                def write(txn: lmdb.Transaction, group: dict[tuple[bytes, bytes], bytes] = group) -> None:
                    for (room, key), value in group.items():
                        txn.put(key, _seal(room, key, value), db=self._rooms[room])

                self._writing(write)
                for entry in group:
                    del self._overlay[entry]
        with self._lock:
            if not self._overlay:
                self._pending_bases.clear()
                if self._journal is not None:
                    self._journal.clear()
                    self._young.note_again()

    def _sync(self) -> None:
        if (env := self._env) is not None:
            try:
                env.sync(True)
            except lmdb.Error as e:
                raise IndexStoreError(f"can't be written: {e}", path=self._path) from e

    def close(self) -> None:
        """Commit, close, and leave the mark that spares the next open its check."""
        self._closing = True
        self._wake.set()
        self._writer.join()
        try:
            self.flush()
        except IndexStoreError as e:
            log.warning("index not written: %s", e)
        with self._lock:
            if self._env is None:
                return
            self._env.close()
            self._env = None
        with contextlib.suppress(OSError), open(self._marker, "w") as marker:
            marker.write(_fingerprint(os.stat(self._path)))


def _fingerprint(stat: os.stat_result) -> str:
    return f"{stat.st_dev} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}\n"


def walk(path: str) -> int:
    """Read every record of an index and check its digest; gives the number of records.

    Raises:
        CorruptIndexError: a record is damaged, or the file is shorter than its pages.
    """
    with lmdb.open(path, subdir=False, readonly=True, max_dbs=len(_ROOMS)) as env:
        pages = env.info()["last_pgno"] + 1
        if os.path.getsize(path) < pages * env.stat()["psize"]:
            raise CorruptIndexError("it is shorter than its pages")
        records = 0
        for room in _ROOMS:
            handle = env.open_db(room, create=False)
            with env.begin(db=handle) as txn:
                for key, sealed in txn.cursor():
                    _unseal(room, bytes(key), bytes(sealed))
                    records += 1
    # What lists the free pages is read by writers only: write to every room, more than a page, and take it all back.
    with lmdb.open(
        path, subdir=False, map_size=2 * os.path.getsize(path) + _FIRST_MAP_BYTES, max_dbs=len(_ROOMS)
    ) as env:
        rooms = [env.open_db(room, create=False) for room in _ROOMS]
        txn = env.begin(write=True)
        for handle in rooms:
            txn.put(b"\xff" * 32, bytes(5 * 4096), db=handle)
        txn.abort()
    return records


if __name__ == "__main__":
    try:
        walk(sys.argv[1])
    except (lmdb.Error, IndexStoreError, OSError) as error:
        sys.exit(str(error))
