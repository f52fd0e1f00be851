"""Damage that shows while the index is open: a new one begins under it, and is said once."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

import lmdb
import msgspec
import pytest

from tests.unit.support import python
from tests.unit.test_index_damage import ENTRY, filled, unseal
from weightfs.errors import IndexStoreError
from weightfs.index import numbers
from weightfs.index.store import IndexStore

# Under an open store


READS: dict[str, Callable[[IndexStore], object]] = {
    "entries": lambda index: index.entry(7),
    "keys": lambda index: index.number_of(b"key7"),
    "files": lambda index: index.file(b"i" * 16),
    "bases": lambda index: index.owner_of_view(1 << 20),
}
KEYS = {"entries": (7).to_bytes(8, "big"), "keys": b"key7", "files": b"i" * 16, "bases": (1 << 20).to_bytes(8, "big")}


@pytest.mark.parametrize("room", READS)
def test_a_damaged_record_begins_a_new_index_under_the_open_one(
    state: str, room: str, caplog: pytest.LogCaptureFixture
) -> None:
    filled(state)
    index = IndexStore(state, "source")
    epoch, before = index.epoch, index.take()
    unseal(index._files.path, room.encode(), KEYS[room])
    index.put_entry(before, ENTRY)
    with caplog.at_level(logging.WARNING):
        assert READS[room](index) is None
        assert READS[room](index) is None
    assert index.epoch > epoch
    assert index.set_aside is not None
    assert [record.levelname for record in caplog.records] == ["WARNING"], "said once"
    assert index.entry(before) == ENTRY, "what was pending is kept"
    number = index.take()
    assert number >> 32 == index.epoch
    index.put_number(b"after", number)
    index.close()
    again = IndexStore(state, "source")
    assert again.set_aside is None
    assert again.number_of(b"after") == number
    assert again.entry(before) == ENTRY
    again.close()


def test_damaged_counters_do_not_stop_numbers(state: str) -> None:
    index = IndexStore(state, "source")
    epoch = index.epoch
    index.take()
    unseal(index._files.path, b"meta", b"next")
    number = index.take(2 * numbers._BLOCK)
    assert number >> 32 == index.epoch > epoch
    assert index.set_aside is not None
    index.close()


def test_a_record_of_unknown_form_is_as_good_as_none(state: str) -> None:
    """The digest is right, and a version to come has written it."""
    index = IndexStore(state, "source")
    index._put(b"entries", (7).to_bytes(8, "big"), msgspec.msgpack.encode([99, "x"]))
    assert index.entry(7) is None
    index.close()


def test_damaged_free_pages_do_not_stop_the_writer(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of free pages is no record and has no seal: its damage shows at the next commit."""
    index = IndexStore(state, "source")
    for number in range(40):
        index.put_entry(number, ENTRY)
        index.flush()
    real = index.database._env

    assert real is not None
    begin = real.begin

    class Damaged:
        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

        def begin(self, *, write: bool = False) -> object:
            if write:
                raise lmdb.CorruptedError("mdb_put: MDB_CORRUPTED: Located page was wrong type")
            return begin(write=write)

    monkeypatch.setattr(index.database, "_env", Damaged())
    index.put_entry(99, ENTRY)
    with contextlib.suppress(IndexStoreError):  # it may say that it has not written, once
        index.flush()
    index.flush()
    assert index.set_aside is not None
    assert not index._overlay
    assert index.take() >> 32 == index.epoch
    assert index.entry(99) == ENTRY
    index.close()


def test_a_rebuild_while_the_writer_commits(state: str) -> None:
    """In a child: LMDB does not forgive an environment that is closed under a transaction."""
    code = """
import logging, sys, threading
from weightfs.index import store
from weightfs.index.schema import EntryRecord, Kind
from weightfs.index.store import IndexStore
logging.disable()
store._QUIET_S = 0.0
index = IndexStore(sys.argv[1], "source")
for turn in range(10):
    for number in range(1000):
        index.put_entry(number, EntryRecord(Kind.SOURCE, 1, b"%d" % turn, b"x" * 400))
    with index._lock:
        index.database.rebuild("a test")
    found = index.entry(5)  # what was committed already is gone with the old index
    assert found is None or found.name == b"%d" % turn
index.close()
print(index.epoch)
"""
    done = python(code, state)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    index = IndexStore(state, "source")
    assert index.set_aside is None
    assert index.epoch == int(done.stdout)
    found = index.entry(5)
    assert found is None or found.name == b"9"
    index.close()


def test_an_index_store_error_names_the_way_out() -> None:
    with pytest.raises(IndexStoreError) as caught:
        IndexStore("/proc/self/nowhere", "source")
    assert caught.value.path == "/proc/self/nowhere"
    assert caught.value.mend is not None
    assert "--state-dir" in caught.value.mend
