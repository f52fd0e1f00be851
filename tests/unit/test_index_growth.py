"""A map that fills up and grows, and the numbers that are reserved in it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import lmdb
import pytest

from tests.unit.support import python
from weightfs.errors import IndexStoreError
from weightfs.index import numbers, opening
from weightfs.index.schema import FileRecord
from weightfs.index.store import IndexStore


def test_the_map_grows_beyond_its_first_size(state: str) -> None:
    big = FileRecord(1, "gguf", [], {"blob": "x" * (1 << 20)}, False, None)
    for turn in range(2):  # into a new index, and into one that has grown before
        index = IndexStore(state, "source")
        for number in range(24 * turn, 24 * turn + 24):
            index.put_file(bytes([number]) * 16, big)
        index.close()
        assert os.path.getsize(index._files.path) > (turn + 1) * opening._FIRST_MAP_BYTES
    again = IndexStore(state, "source")
    assert all(again.file(bytes([number]) * 16) == big for number in range(48))
    assert again.set_aside is None
    again.close()


def test_a_flush_beside_the_writers_own_while_the_map_grows(state: str) -> None:
    """In a child: where this goes wrong it may also hang."""
    code = """
import logging, sys
from weightfs.index import opening, store
from weightfs.index.schema import FileRecord
logging.disable()
store._QUIET_S = 0.0
opening._FIRST_MAP_BYTES = 1 << 20
index = store.IndexStore(sys.argv[1], "source")
big = FileRecord(1, "gguf", [], {"blob": "x" * (1 << 20)}, False, None)
for number in range(100):
    index.put_file(bytes([number]) * 16, big)
    if number % 2 == 0:
        index.flush()
index.flush()
assert all(index.file(bytes([number]) * 16) == big for number in range(100))
index.close()
"""
    done = python(code, state, timeout_s=30)
    assert done.returncode == 0, done.stderr


def test_taking_numbers_when_the_map_is_full_makes_it_grow(index: IndexStore, monkeypatch: pytest.MonkeyPatch) -> None:
    reserve, full = index.database.numbers.reserve, [lmdb.MapFullError("full")]

    def full_once(txn: lmdb.Transaction, room: object, count: int) -> None:
        if full:
            raise full.pop()
        reserve(txn, room, count)

    monkeypatch.setattr(index.database.numbers, "reserve", full_once)
    assert index.take(2 * numbers._BLOCK) >> 32 == index.epoch


def test_taking_numbers_grows_the_map_while_the_writer_commits(state: str) -> None:
    """In a child: growing ends the writer's transaction, and whoever wants the next one may wait for ever."""
    code = """
import logging, sys
import lmdb
from weightfs.index import numbers, store
from weightfs.index.schema import EntryRecord, Kind
logging.disable()
store._QUIET_S = 0.0
index = store.IndexStore(sys.argv[1], "source")
reserve, full = index.database.numbers.reserve, []
def full_each_time(txn, room, count):
    if full:
        raise full.pop()
    reserve(txn, room, count)
index.database.numbers.reserve = full_each_time
entry = EntryRecord(Kind.SOURCE, 1, b"a", b"x" * 400)
for turn in range(8):
    for number in range(2000):
        index.put_entry(2000 * turn + number, entry)
        if number == 1000:
            full.append(lmdb.MapFullError("full"))
            index.take(numbers._BLOCK)
index.flush()
assert all(index.entry(number) == entry for number in range(16000))
assert index.set_aside is None
index.close()
"""
    done = python(code, state, timeout_s=30)
    assert done.returncode == 0, done.stderr[-1500:]


def test_numbers_whose_reservation_failed_are_not_given_out(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up at the very commit that reserves a block: nothing on disk says that its numbers are taken."""
    index = IndexStore(state, "source")
    env, failing = index.database._env, [True]
    assert env is not None
    real: lmdb.Environment = env

    class Full:
        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

        @contextlib.contextmanager
        def begin(self, *, write: bool = False) -> Iterator[object]:
            with real.begin(write=write) as txn:
                yield txn
                if write and failing:
                    raise lmdb.DiskError("mdb_txn_commit: No space left on device")

    monkeypatch.setattr(index.database, "_env", Full())
    taken = [index.take(numbers._BLOCK)]
    for _ in range(3):
        with pytest.raises(IndexStoreError):
            index.take(numbers._BLOCK)
        with contextlib.suppress(IndexStoreError):
            taken.append(index.take())
    failing.clear()
    index.close()
    again = IndexStore(state, "source")
    first = again.take(numbers._BLOCK)
    again.close()
    assert not any(first <= number < first + numbers._BLOCK for number in taken[1:])
    assert first >= max(taken) + 1
