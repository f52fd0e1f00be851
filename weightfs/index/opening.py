"""How an index is opened: what must be true of the file before, and of its `meta` record after.

An index that was not closed is walked first, by a child process: damaged pages can crash the process that reads them.
`python -m weightfs.index.opening PATH` is that child.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, Final

import lmdb
import msgspec

from weightfs.errors import IndexStoreError, UnfitError
from weightfs.index.files import IndexFiles
from weightfs.index.schema import MIGRATIONS, ROOMS, SCHEMA, SPARE, Meta, new_epoch
from weightfs.index.seals import CorruptIndexError, seal, unseal

log = logging.getLogger(__name__)

_FIRST_MAP_BYTES: Final = 16 << 20
_LOCK_FILE_BYTES: Final = 64 << 10
_MOST_READERS: Final = 512
_CHECK_TIMEOUT_S: Final = 60
Transaction = lmdb.Transaction  # for the annotations of those who may not import lmdb
Rooms = Mapping[bytes, Any]
"""LMDB's handles of the named databases."""


def can_open(folder: str) -> None:
    """Examine whether this version can go on with an index, and keep its numbers; changes nothing.

    Raises:
        UnfitError: it is of a schema that this version has no way from.
    """
    path = IndexFiles(folder).path
    if not os.path.exists(path):
        return
    try:
        with lmdb.open(path, subdir=False, readonly=True, max_dbs=len(ROOMS), max_readers=_MOST_READERS) as env:
            room = env.open_db(b"meta", create=False)
            with env.begin(db=room) as txn:
                if (meta := read_meta(txn, room)) is None:
                    raise CorruptIndexError("it has no record `meta`")
    except (lmdb.Error, CorruptIndexError, msgspec.MsgspecError) as e:
        log.warning("index not examined: %s", e)  # it is set aside when it is opened, as ever
        return
    if meta.schema != SCHEMA and meta.schema not in MIGRATIONS:
        raise UnfitError(
            f"the index has schema {meta.schema}, and this version knows no way from it to its own, {SCHEMA}",
            path=path,
            mend="umount, then mount again: a new index is built",
        )


def open_environment(path: str) -> lmdb.Environment:
    """Open the file, or make it, with room in its map to double.

    Raises:
        OSError, lmdb.Error: it can't be opened.
    """
    size = os.path.getsize(path) if os.path.exists(path) else 0
    # LMDB maps its lock file: on a full disk the first touch of a hole would end the process.
    lock = os.open(path + "-lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(lock, 0, _LOCK_FILE_BYTES)
    finally:
        os.close(lock)
    # Without fsync in the commit, which would hold the lock; who commits syncs after. Power lost in between may damage
    # the file: the walk at the next open, and the seals, find that.
    return lmdb.open(
        path,
        subdir=False,
        map_size=max(_FIRST_MAP_BYTES, 2 * size),
        max_dbs=len(ROOMS),
        mode=0o600,
        readahead=False,
        max_readers=_MOST_READERS,
        sync=False,
    )


# The record `meta`


def read_meta(txn: Transaction, room: Any) -> Meta | None:
    """The record of the room `meta`; None in a new index.

    Raises:
        CorruptIndexError, msgspec.MsgspecError: it is damaged.
    """
    raw = txn.get(b"meta", db=room)
    return None if raw is None else msgspec.msgpack.decode(unseal(b"meta", b"meta", bytes(raw)), type=Meta)


def write_meta(txn: Transaction, room: Any, meta: Meta) -> None:
    """Put the record of the room `meta`."""
    txn.put(b"meta", seal(b"meta", b"meta", msgspec.msgpack.encode(meta)), db=room)


def settle_meta(txn: Transaction, rooms: Rooms, source: str, epoch_after: int) -> Meta:
    """The index's `meta` as it is from now on: written where there is none, brought to this version's schema.

    Args:
        txn: a write transaction.
        rooms: see `Rooms`.
        source: whose index it must be.
        epoch_after: a new index gets an epoch larger than this.

    Raises:
        CorruptIndexError: it is foreign, or there is no way from its schema.
    """
    meta = read_meta(txn, rooms[b"meta"])
    if meta is None:
        meta = Meta("weightfs", SCHEMA, source, new_epoch(epoch_after))
        write_meta(txn, rooms[b"meta"], meta)
    if meta.product != "weightfs" or meta.source != source:
        raise CorruptIndexError(f"it belongs to {meta.product} {meta.source}")
    return _migrate(txn, rooms, meta)


def _migrate(txn: Transaction, rooms: Rooms, meta: Meta) -> Meta:
    """Bring the index of an older version to this one's schema, numbers kept, in the transaction that opens it."""
    before = meta.schema
    while meta.schema != SCHEMA:
        step = MIGRATIONS.get(meta.schema)
        if step is None:
            raise CorruptIndexError(f"its schema is {meta.schema}, this version reads {SCHEMA}")
        for room in [room for room in ROOMS[1:] if room not in SPARE]:
            with txn.cursor(db=rooms[room]) as cursor:
                for key, sealed in cursor:
                    kept, value = bytes(key), unseal(room, bytes(key), bytes(sealed))
                    if (fresh := step(room, value)) != value:
                        cursor.put(kept, seal(room, kept, fresh))
        meta = msgspec.structs.replace(meta, schema=meta.schema + 1)
    if meta.schema != before:
        write_meta(txn, rooms[b"meta"], meta)
        log.warning("index brought from schema %d to %d", before, meta.schema)
    return meta


# The walk


def check(files: IndexFiles) -> None:
    """Walk an index that was not closed by us, in a child.

    Raises:
        CorruptIndexError: the walk failed, crashed or did not end.
    """
    if files.is_clean():
        return
    try:
        done = subprocess.run(
            [sys.executable, "-m", "weightfs.index.opening", files.path],
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


def walk(path: str) -> int:
    """Read every record of an index and check its digest; gives the number of records.

    Raises:
        CorruptIndexError: a record is damaged, or the file is shorter than its pages.
    """
    with lmdb.open(path, subdir=False, readonly=True, max_dbs=len(ROOMS)) as env:
        pages = env.info()["last_pgno"] + 1
        if os.path.getsize(path) < pages * env.stat()["psize"]:
            raise CorruptIndexError("it is shorter than its pages")
        records = 0
        present = [room for room in ROOMS if _is_there(env, room)]
        for room in present:
            handle = env.open_db(room, create=False)
            with env.begin(db=handle) as txn:
                for key, sealed in txn.cursor():
                    kept, value = bytes(key), bytes(sealed)
                    if room not in SPARE:
                        unseal(room, kept, value)
                    records += 1
    # What lists the free pages is read by writers only: write to every room, more than a page, and take it all back.
    with lmdb.open(
        path, subdir=False, map_size=2 * os.path.getsize(path) + _FIRST_MAP_BYTES, max_dbs=len(ROOMS)
    ) as env:
        rooms = [env.open_db(room, create=False) for room in present]
        txn = env.begin(write=True)
        for handle in rooms:
            txn.put(b"\xff" * 32, bytes(5 * 4096), db=handle)
        txn.abort()
    return records


def _is_there(env: lmdb.Environment, room: bytes) -> bool:
    """Whether the index has a room; one that it must have is taken to be there."""
    if room not in SPARE:
        return True
    try:
        env.open_db(room, create=False)
    except lmdb.NotFoundError:
        return False
    return True


if __name__ == "__main__":
    try:
        walk(sys.argv[1])
    except (lmdb.Error, IndexStoreError, OSError) as error:
        sys.exit(str(error))
