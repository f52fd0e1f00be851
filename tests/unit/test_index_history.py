"""The history in the index: it survives, it is bounded, it is worth less than what lies beside it."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from prefetch.predictor import Predictor
from tests.unit.support import python
from weightfs.errors import IndexStoreError
from weightfs.index import history
from weightfs.index.history import History, Open
from weightfs.index.opening import Transaction
from weightfs.index.seals import seal
from weightfs.index.store import IndexStore

OLDER = """
import sys
from weightfs.index import schema
schema.ROOMS = schema.ROOMS[:5]
schema.SPARE = frozenset()
from weightfs.index import opening
from weightfs.index.store import IndexStore
assert b"history" not in schema.ROOMS and len(opening.ROOMS) == 5
opening.can_open(sys.argv[1])
index = IndexStore(sys.argv[1], "source")
assert index.set_aside is None, index.set_aside
"""
"""A version that does not know the room, with an index open."""


def counted(state: bytes, opens: list[Open]) -> bytes:
    return b"%d" % (int(state or b"0") + len(opens))


@pytest.fixture
def record(index: IndexStore) -> History:
    return History(index.database)


def damage(path: str, key: bytes) -> None:
    code = """
import lmdb, sys
with lmdb.open(sys.argv[1], subdir=False, max_dbs=9) as env:
    with env.begin(write=True, db=env.open_db(b"history", create=False)) as txn:
        assert txn.get(bytes.fromhex(sys.argv[2])) is not None
        txn.put(bytes.fromhex(sys.argv[2]), b"8 bytes." + b"not what it was")
"""
    done = python(code, path, key.hex())
    assert done.returncode == 0, done.stderr


def test_a_new_index_has_none(record: History) -> None:
    assert record.opens() == []
    assert record.state() == b""
    assert record.compact(counted) == 0
    assert record.state() == b""


def test_it_survives_closing(state: str) -> None:
    index = IndexStore(state, "source")
    record = History(index.database)
    for second in (5, 7, 6):
        record.note("a/\udcff", second + 0.9)
    assert record.compact(counted, keep=2) == 1
    index.close()
    again = IndexStore(state, "source")
    assert again.set_aside is None
    record = History(again.database)
    assert record.opens() == [("a/\udcff", 7), ("a/\udcff", 6)]
    assert record.state() == b"1"
    assert record.note("b", 8) == 3
    assert record.opens()[-1] == ("b", 8)
    again.close()


def test_a_killed_daemon_loses_no_open(state: str) -> None:
    code = """
import os, sys
from weightfs.index.history import History
from weightfs.index.store import IndexStore
History(IndexStore(sys.argv[1], "source").database).note("a", 3)
os.kill(os.getpid(), 9)
"""
    assert python(code, state).returncode == -9
    index = IndexStore(state, "source")
    assert index.set_aside is None
    assert History(index.database).opens() == [("a", 3)]
    index.close()


def test_two_that_share_an_index_lose_none(record: History, index: IndexStore) -> None:
    other = History(index.database)
    for second in range(10):
        (record if second % 2 else other).note("a", second)
    assert record.opens() == other.opens() == [("a", second) for second in range(10)]


# Bounds


def test_the_oldest_go_when_nobody_compacts(record: History, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MOST_OPENS", 10)
    record.compact(counted)
    held = [record.note("a", second) for second in range(25)]
    assert held == [*range(1, 11), *[10] * 15]
    assert record.opens() == [("a", second) for second in range(15, 25)]


def test_what_is_folded_is_there_once(record: History) -> None:
    seen: list[Open] = []

    def fold(state: bytes, opens: list[Open]) -> bytes:
        seen.extend(opens)
        return counted(state, opens)

    for second in range(100):
        if record.note("a", second) >= 20:
            record.compact(fold, keep=5)
    assert [at for _, at in [*seen, *record.opens()]] == list(range(100))
    assert int(record.state()) == len(seen)
    record.compact(fold, keep=0)
    assert record.state() == b"100"
    assert record.opens() == []
    assert record.note("a", 100) == 1, "also with nothing but a state"
    assert record.opens() == [("a", 100)]


def test_a_fold_that_fails_changes_nothing(record: History) -> None:
    record.note("a", 1)

    def fold(state: bytes, opens: list[Open]) -> bytes:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        record.compact(fold, keep=0)
    assert record.opens() == [("a", 1)]


def test_names_and_states_beyond_their_bounds_are_left_out(record: History, caplog: pytest.LogCaptureFixture) -> None:
    assert record.note("x" * (history.MOST_NAME_BYTES + 1), 1) == 0
    assert record.note("x" * history.MOST_NAME_BYTES, 1) == 1
    record.compact(counted, keep=0)
    record.note("a", 2)
    record.compact(lambda state, opens: bytes(history.MOST_STATE_BYTES + 1), keep=0)
    assert "is not stored" in caplog.text
    assert record.state() == b"1", "the one before it"
    assert record.opens() == []


def test_a_predictor_goes_on_where_it_was(record: History) -> None:
    live = Predictor()

    def fold(state: bytes, opens: list[Open]) -> bytes:
        base = Predictor.from_state(state)[0]
        for name, at in opens:
            base.observe(name, at)
        return base.state()

    for turn in range(60):
        live.observe("ab"[turn % 2], 1_000_000 + turn * 777)
        if record.note("ab"[turn % 2], 1_000_000 + turn * 777) >= 20:
            record.compact(fold, keep=7)
    again = Predictor.from_state(record.state())[0]
    for name, at in record.opens():
        again.observe(name, at)
    assert again.state() == live.state()


# Damage


@pytest.mark.parametrize("closed", [True, False])
def test_a_damaged_record_is_dropped_alone(state: str, closed: bool, caplog: pytest.LogCaptureFixture) -> None:
    index = IndexStore(state, "source")
    record = History(index.database)
    for second in range(4):
        record.note("a", second)
    record.compact(counted, keep=3)
    number = index.take()
    index.put_number(b"key", number)
    path = index._files.path
    index.close()
    damage(path, b"open" + (3).to_bytes(8, "big"))
    damage(path, b"state")
    if closed:
        index._files.mark_clean()
    again = IndexStore(state, "source")
    record = History(again.database)
    assert again.set_aside is None
    assert again.number_of(b"key") == number
    assert record.opens() == [("a", 1), ("a", 3)]
    assert record.state() == b""
    assert "fails its digest" in caplog.text
    assert record.compact(counted, keep=0) == 3
    assert record.state() == b"2"
    again.close()


def test_a_record_of_another_form_is_dropped(
    record: History, index: IndexStore, caplog: pytest.LogCaptureFixture
) -> None:
    record.note("a", 1)
    key = b"open" + (2).to_bytes(8, "big")
    sealed = seal(b"history", key, b"\x93\x01\x02\x03")

    def write(txn: Transaction) -> None:
        txn.put(key, sealed, db=index.database.rooms[b"history"])

    index.database.write(write)
    record.note("a", 3)
    assert record.opens() == [("a", 1), ("a", 3)]
    assert "an open is dropped" in caplog.text


def test_without_an_index_there_is_none(record: History, index: IndexStore, monkeypatch: pytest.MonkeyPatch) -> None:
    record.note("a", 1)
    assert index.database._env is not None
    index.database._env.close()
    monkeypatch.setattr(index.database, "_env", None)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index.database, "_attach", refuse)
    assert record.opens() == []
    assert record.state() == b""
    with pytest.raises(IndexStoreError, match="written"):
        record.note("a", 2)


# Versions


def clean(state: str) -> None:
    """Closed as by a clean end."""


def unclean(state: str) -> None:
    """As after a kill: the next one walks it."""
    os.unlink(os.path.join(state, "index.lmdb.clean"))


ENDS = pytest.mark.parametrize("end", [clean, unclean])


@ENDS
def test_an_index_made_before_the_room_opens(state: str, end: Callable[[str], None]) -> None:
    done = python(OLDER + "index.put_number(b'key', index.take()); index.close(); print(index.epoch)", state)
    assert done.returncode == 0, done.stderr
    end(state)
    index = IndexStore(state, "source")
    assert index.set_aside is None
    assert index.epoch == int(done.stdout)
    assert index.number_of(b"key") is not None
    record = History(index.database)
    assert record.opens() == []
    record.note("a", 1)
    assert record.opens() == [("a", 1)]
    index.close()


@ENDS
def test_a_version_before_the_room_opens_one_that_has_it(state: str, end: Callable[[str], None]) -> None:
    index = IndexStore(state, "source")
    History(index.database).note("a", 1)
    number = index.take()
    index.put_number(b"key", number)
    index.close()
    end(state)
    done = python(OLDER + "print(index.number_of(b'key')); index.put_number(b'l', index.take()); index.close()", state)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{number}\n"
    again = IndexStore(state, "source")
    assert again.set_aside is None
    assert again.number_of(b"l") not in (None, number)
    assert History(again.database).opens() == [("a", 1)], "as it was left"
    again.close()


# News


def test_what_is_new_is_told_once(record: History) -> None:
    assert record.since(0) == (b"", [], 0)
    for second in range(3):
        record.note("a", second)
    state, opens, position = record.since(0)
    assert (state, opens) == (b"", [("a", 0), ("a", 1), ("a", 2)])
    assert record.since(position) == (None, [], position)
    record.note("b", 3)
    state, opens, position = record.since(position)
    assert (state, opens) == (None, [("b", 3)])
    record.compact(counted, keep=1)
    assert record.since(position) == (None, [], position), "what was folded since was known"


def test_who_missed_what_was_folded_begins_anew(record: History) -> None:
    record.note("a", 1)
    _, _, position = record.since(0)
    for second in range(2, 10):
        record.note("a", second)
    record.compact(counted, keep=2)
    assert record.since(position)[:2] == (b"7", [("a", 8), ("a", 9)])
    assert record.since(1000)[:2] == (b"7", [("a", 8), ("a", 9)]), "as after the index was built anew"


def test_of_two_that_fold_at_once_one_does(record: History, index: IndexStore) -> None:
    for second in range(10):
        record.note("a", second)

    def fold(state: bytes, opens: list[Open]) -> bytes:
        assert History(index.database).compact(counted, keep=5) == 5, "without the index's lock"
        return counted(state, opens)

    assert record.compact(fold, keep=5) == 0
    assert record.state() == b"5"
    assert len(record.opens()) == 5
