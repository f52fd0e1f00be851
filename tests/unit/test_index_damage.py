"""An index that is not what it should be: set aside at open, or under an open store, once, and never wrong."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

from tests.unit.support import python
from weightfs.index import opening
from weightfs.index.schema import SCHEMA, EntryRecord, Kind, new_epoch
from weightfs.index.seals import CorruptIndexError
from weightfs.index.store import IndexStore

ENTRY = EntryRecord(Kind.SOURCE, 1, b"model.safetensors", b"k" * 16)
PAGE = 4096


def filled(state: str, records: int = 50) -> tuple[str, int]:
    """A closed index with records; gives its path and epoch."""
    index = IndexStore(state, "source")
    for number in range(records):
        index.put_entry(number, ENTRY)
        index.put_number(b"key%d" % number, index.take())
    index.close()
    return index._files.path, index.epoch


def asides(state: str) -> list[str]:
    return sorted(name for name in os.listdir(state) if ".unusable-" in name)


def overwrite(path: str, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def unseal(path: str, room: bytes, key: bytes) -> None:
    """Write a record with a wrong seal, as another process."""
    code = """
import lmdb, sys
room, key = map(bytes.fromhex, sys.argv[2:])
with lmdb.open(sys.argv[1], subdir=False, max_dbs=5, map_size=1 << 30) as env:
    db = env.open_db(room, create=False)
    with env.begin(write=True) as txn:
        assert txn.put(key, b"8 bytes." + b"not what it was", db=db)
"""
    done = python(code, path, room.hex(), key.hex())
    assert done.returncode == 0, done.stderr


def cut(path: str) -> None:
    os.truncate(path, os.path.getsize(path) - PAGE)


DAMAGE: dict[str, Callable[[str], None]] = {
    "random": lambda path: overwrite(path, 0, os.urandom(os.path.getsize(path))),
    "text": lambda path: overwrite(path, 0, b"this is no index " * 1000),
    "zeros": lambda path: overwrite(path, 0, bytes(os.path.getsize(path))),
    "short": cut,
    "half": lambda path: os.truncate(path, os.path.getsize(path) // 2),
    "one-page": lambda path: os.truncate(path, PAGE),
    "some-bytes": lambda path: os.truncate(path, 100),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_set_aside_at_open(state: str, damage: Callable[[str], None]) -> None:
    path, _ = filled(state)
    damage(path)
    with open(path, "rb") as file:
        damaged = file.read()
    index = IndexStore(state, "source")
    assert index.set_aside is not None
    aside, reason = index.set_aside
    assert reason
    with open(aside, "rb") as file:
        assert file.read() == damaged
    assert index.number_of(b"key1") is None
    index.put_entry(index.take(), ENTRY)
    index.close()
    again = IndexStore(state, "source")
    assert again.set_aside is None
    assert again.epoch == index.epoch
    again.close()


def test_a_new_index_in_the_same_second_has_a_larger_epoch(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    path, epoch = filled(state)
    overwrite(path, 0, os.urandom(os.path.getsize(path)))
    index = IndexStore(state, "source")
    index.close()
    assert index.epoch > epoch, "its numbers are its predecessor's"


def test_a_new_index_has_a_larger_epoch_when_the_clock_went_back(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, epoch = filled(state)
    overwrite(path, 0, os.urandom(os.path.getsize(path)))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 86_400)
    index = IndexStore(state, "source")
    index.close()
    assert index.epoch > epoch, "its numbers are its predecessor's"


def test_an_empty_file_is_a_new_index(state: str) -> None:
    os.mkdir(state)
    with open(os.path.join(state, "index.lmdb"), "wb"):
        pass
    index = IndexStore(state, "source")
    assert index.take() >> 32 == index.epoch
    index.close()


def test_another_sources_index_is_foreign(state: str) -> None:
    _, epoch = filled(state)
    index = IndexStore(state, "elsewhere", epoch_after=epoch)
    index.close()
    assert index.set_aside is not None
    assert "source" in index.set_aside[1]
    assert index.epoch > epoch


def test_another_schema_is_set_aside(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "SCHEMA", SCHEMA + 1)
    _, epoch = filled(state)
    monkeypatch.undo()
    index = IndexStore(state, "source", epoch_after=epoch)
    index.close()
    assert index.set_aside is not None
    assert f"its schema is {SCHEMA + 1}" in index.set_aside[1]


def test_another_products_database_is_set_aside(state: str) -> None:
    os.mkdir(state)
    code = """
import lmdb, sys
with lmdb.open(sys.argv[1], subdir=False, max_dbs=9) as env, env.begin(write=True) as txn:
    txn.put(b"hello", b"world", db=env.open_db(b"meta", txn=txn))
    txn.put(b"meta", b"something else", db=env.open_db(b"meta", txn=txn))
"""
    assert python(code, os.path.join(state, "index.lmdb")).returncode == 0
    index = IndexStore(state, "source")
    index.close()
    assert index.set_aside is not None


@pytest.mark.parametrize("content", [b"garbage " * 1024, b"", b"\xff" * 8192])
def test_a_garbage_lock_file_costs_at_most_the_index(state: str, content: bytes) -> None:
    path, _ = filled(state)
    with open(path + "-lock", "wb") as file:
        file.write(content)
    # A child: what a wrong lock file does is up to LMDB.
    code = """
import sys
from weightfs.index.store import IndexStore
index = IndexStore(sys.argv[1], "source")
number = index.number_of(b"key1")
index.put_number(b"new", index.take())
index.close()
print(index.set_aside is None and number is not None or index.set_aside is not None and number is None)
"""
    done = python(code, state)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True\n"


def test_one_that_was_set_aside_is_kept_not_all(state: str) -> None:
    for turn in range(3):
        path, _ = filled(state)
        overwrite(path, 0, b"damage %d" % turn * 1000)
    index = IndexStore(state, "source")
    index.close()
    assert index.set_aside is not None
    assert asides(state) == [os.path.basename(index.set_aside[0])]


def test_a_walk_that_does_not_end_counts_as_damage(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = filled(state)
    os.unlink(path + ".clean")
    monkeypatch.setattr(opening, "_CHECK_TIMEOUT_S", 0)
    index = IndexStore(state, "source", epoch_after=new_epoch())
    index.close()
    assert index.set_aside is not None
    assert index.set_aside[1] == "reading it did not end"


def test_walk_finds_a_bad_seal_and_a_missing_page(state: str) -> None:
    path, _ = filled(state)
    unseal(path, b"entries", (3).to_bytes(8, "big"))
    with pytest.raises(CorruptIndexError, match="room entries fails its digest"):
        opening.walk(path)
    cut(path)
    with pytest.raises(CorruptIndexError, match="shorter"):
        opening.walk(path)
