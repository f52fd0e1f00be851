"""What keeps an index complete and small: headers added in bulk, and rows dropped whose file is gone.

Bulk records pass the store's overlay by: a million tensors would lie there as 80 MB until they are committed. They are
written where the caller waits, a few at a time, so that whoever makes them goes no faster than the disk takes them.

Dropping. An entry whose name is gone and one that is not in the index answer the same: ESTALE, upon which the kernel
looks the name up again and is told the truth. The number is not given out a second time, since serials only grow. What
is lost is that a file which was away at that moment (moved out of the source and back, on a disk that was not mounted)
gets another number than it had. Inodes that are open, and the folders above them, stay: who has one open may ask
fstat(2) of a successor of this process, which knows what the index says. Views are not among those, since a view
whose file is gone answers ESTALE to everything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Final

import msgspec

from weightfs.headers import slot_of
from weightfs.index.opening import Transaction
from weightfs.index.schema import IDENTITY_BYTES, ROOT_INODE, EntryRecord, FileRecord, Kind
from weightfs.index.seals import seal, unseal
from weightfs.index.store import IndexStore

Row = tuple[bytes, bytes]
"""A row by its room's first letter and its key, and the token that a crawl saw if what it tells of is still there."""
_SWEPT: Final = (b"entries", b"files", b"bases")
_BY_LETTER: Final = {room[:1]: room for room in _SWEPT}
_PAGE: Final = 256  # rows read in one transaction, about 0.5 ms
GONE: Final = b""
"""The token of what nothing can have seen."""


class FoundFile(msgspec.Struct, frozen=True, array_like=True):
    """One header.

    Attributes:
        identity: of the content.
        path: relative to the root, symlinks resolved.
        name: what it is called in the folder it was found in.
        numbers: how many inode numbers its views take.
        record: its FileRecord in MessagePack, without numbers.
    """

    identity: bytes
    path: bytes
    name: str
    numbers: int
    record: bytes


def set_token(folder_key: bytes, name: str) -> bytes:
    """The token of a set of weight files in a folder."""
    return hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=16, key=folder_key).digest()


class Upkeep:
    """Bulk access to an index. Thread-safe, as the store is; every call may wait for the disk."""

    def __init__(self, store: IndexStore, root_key: bytes) -> None:
        """`root_key`: the inode key of the source's root, which has no entry of its own."""
        self._store = store
        self._root_key = root_key

    def unknown(self, slots: Sequence[bytes]) -> list[int]:
        """Positions of the contents that have no record."""
        store = self._store

        def read(txn: Transaction) -> list[int]:
            room = store.database.rooms[b"files"]
            return [
                at
                for at, slot in enumerate(slots)
                if (b"files", slot) not in store._overlay and txn.get(slot, db=room) is None
            ]

        found = store.database.read(read)
        return list(range(len(slots))) if found is None else found

    def add_files(self, found: Sequence[FoundFile]) -> None:
        """Record headers and give their views numbers; one that has a record by now keeps it, and its numbers.

        Raises:
            IndexStoreError: it could not be written.
        """
        store = self._store
        numbers = sum(one.numbers for one in found)
        if not store.database.numbers.has(numbers):
            store.database.sync()  # `take` will, under the lock that look-ups take: better there is little left to sync
        base = store.take(numbers) if numbers else 0
        rows: list[tuple[bytes, bytes, bytes, bytes]] = []
        for one in found:
            slot, first = slot_of(one.identity, one.name), base.to_bytes(8, "big")
            record = seal(b"files", slot, FileRecord.numbered(one.record, base if one.numbers else 0))
            owner = one.identity + msgspec.msgpack.encode((one.path, one.name))
            rows.append((slot, record, first, seal(b"bases", first, owner) if one.numbers else b""))
            base += one.numbers

        def write(txn: Transaction) -> None:
            for slot, record, first, owner in rows:
                if (b"files", slot) in store._overlay:
                    continue
                if txn.put(slot, record, db=store.database.rooms[b"files"], overwrite=False) and owner:
                    txn.put(first, owner, db=store.database.rooms[b"bases"])

        store.database.write(write)

    # Dropping

    def page(self, after: bytes) -> tuple[list[Row], bytes]:
        """The next rows behind one (b"": from the first on), and the last of them; b"" when there are no more."""
        store = self._store
        letter, key = after[:1] or b"e", after[1:]

        def read(txn: Transaction) -> tuple[list[Row], bytes]:
            rows: list[Row] = []
            for room in _SWEPT[_SWEPT.index(_BY_LETTER[letter]) :]:
                with txn.cursor(db=store.database.rooms[room]) as cursor:
                    moved = cursor.first() if room[:1] != letter or not key else cursor.set_range(key)
                    if moved and room[:1] == letter and cursor.key() == key:
                        moved = cursor.next()
                    while moved and len(rows) < _PAGE:
                        at = bytes(cursor.key())
                        token = self._token(txn, room, at, cursor.value)
                        if token is not None:
                            rows.append((room[:1] + at, token))
                        moved = cursor.next()
                if len(rows) >= _PAGE:
                    return rows, rows[-1][0]
            return rows, b""

        return store.database.read(read) or ([], b"")

    def _token(self, txn: Transaction, room: bytes, key: bytes, value: Callable[[], Any]) -> bytes | None:
        """What a crawl must have seen for a row to stay; None when it stays whatever was seen."""
        if room == b"files":
            return key
        plain = unseal(room, key, bytes(value()))
        if room == b"bases":
            _, name = msgspec.msgpack.decode(plain[IDENTITY_BYTES:], type=tuple[bytes, str])
            return slot_of(plain[:IDENTITY_BYTES], name)
        entry = msgspec.msgpack.decode(plain, type=EntryRecord)
        if entry.kind is Kind.SOURCE:
            return entry.key
        if entry.kind is Kind.STATE:
            return None
        if entry.kind is Kind.VIEW_ROOT:
            return self._folder_key(txn, entry.parent)
        root = self._entry(txn, entry.parent)
        folder = self._folder_key(txn, root.parent) if root is not None else GONE
        return set_token(folder, entry.name.decode(errors="surrogateescape")) if folder else GONE

    def _folder_key(self, txn: Transaction, inode: int) -> bytes:
        if inode == ROOT_INODE:
            return self._root_key
        entry = self._entry(txn, inode)
        return entry.key if entry is not None else GONE

    def _entry(self, txn: Transaction, inode: int) -> EntryRecord | None:
        plain = self._store._find(txn, b"entries", inode.to_bytes(8, "big"))
        return None if plain is None else msgspec.msgpack.decode(plain, type=EntryRecord)

    def with_folders(self, inodes: Iterable[int]) -> set[int]:
        """These numbers and those of all folders above them."""
        kept: set[int] = set()
        for inode in inodes:
            at = inode
            while at not in kept and at != ROOT_INODE:
                kept.add(at)
                entry = self._store.entry(at)
                if entry is None:
                    break
                at = entry.parent
        return kept

    def drop(self, rows: Iterable[bytes], keep: AbstractSet[int]) -> tuple[int, list[int]]:
        """Delete rows, in one transaction, but for entries in `keep` and what was put since the last commit.

        Returns:
            How many rows were deleted, and the inode numbers of those that were entries.

        Raises:
            IndexStoreError: it could not be written; nothing was deleted.
        """
        store = self._store
        wanted = [(_BY_LETTER[row[:1]], row[1:]) for row in rows]
        dropped: list[int] = []
        count = 0

        def write(txn: Transaction) -> None:
            nonlocal count
            count = 0
            dropped.clear()
            for room, key in wanted:
                if (room, key) in store._overlay:
                    continue
                if room == b"entries":
                    number = int.from_bytes(key, "big")
                    entry = self._entry(txn, number)
                    if entry is None or number in keep or (b"keys", entry.key) in store._overlay:
                        continue
                    if store._find(txn, b"keys", entry.key) == key:
                        txn.delete(entry.key, db=store.database.rooms[b"keys"])
                    dropped.append(number)
                count += txn.delete(key, db=store.database.rooms[room])

        store.database.write(write)
        return count, dropped
