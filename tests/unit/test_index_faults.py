"""An index in a bad place: no room, no rights, somebody else in it. The mount goes on from the overlay."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import IO

import pytest

from tests.unit.support import python
from weightfs import linux
from weightfs.errors import IndexStoreError
from weightfs.index.store import IndexStore

needs_mount = pytest.mark.skipif(not linux.has_capability(linux.CAP_SYS_ADMIN), reason="no CAP_SYS_ADMIN: no tmpfs")


def without_room_or_rights(folder: str, options: str) -> Iterator[str]:
    os.mkdir(folder)
    linux.mount("tmpfs", folder, "tmpfs", 0, options)
    try:
        yield folder
    finally:
        linux.umount(folder, linux.MNT_DETACH)


@pytest.fixture
def small(tmp_path: os.PathLike[str]) -> Iterator[str]:
    """A filesystem of 256 KiB."""
    yield from without_room_or_rights(os.path.join(tmp_path, "small"), "size=256k,mode=700")


def remount_read_only(folder: str) -> None:
    linux.mount("tmpfs", folder, "tmpfs", linux.MS_RDONLY | 32, "")  # 32: MS_REMOUNT


def fill(folder: str) -> str:
    path = os.path.join(folder, "filler")
    with open(path, "wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(4096))
        except OSError:
            return path


# Where none can be made


def under_a_file(base: str) -> str:
    path = os.path.join(base, "file")
    with open(path, "w"):
        return os.path.join(path, "state")


def a_file(base: str) -> str:
    path = os.path.join(base, "file")
    with open(path, "w"):
        return path


def a_folder_in_its_place(base: str) -> str:
    os.makedirs(os.path.join(base, "state", "index.lmdb"))
    os.chmod(os.path.join(base, "state"), 0o700)
    return os.path.join(base, "state")


@pytest.mark.parametrize("place", [under_a_file, a_file, lambda _: "/proc/self/x", lambda _: "/sys/x"])
def test_a_folder_that_cannot_be(tmp_path: os.PathLike[str], place: Callable[[str], str]) -> None:
    folder = place(str(tmp_path))
    with pytest.raises(IndexStoreError) as caught:
        IndexStore(folder, "source")
    assert caught.value.path == folder
    assert caught.value.mend


def test_a_folder_in_the_files_place_is_set_aside(tmp_path: os.PathLike[str]) -> None:
    index = IndexStore(a_folder_in_its_place(str(tmp_path)), "source")
    assert index.set_aside is not None
    assert os.path.isdir(index.set_aside[0])
    index.close()


@needs_mount
def test_a_new_index_on_a_read_only_filesystem(small: str) -> None:
    remount_read_only(small)
    with pytest.raises(IndexStoreError):
        IndexStore(small, "source")


@needs_mount
def test_a_good_index_on_a_read_only_filesystem_is_left_alone(small: str) -> None:
    IndexStore(small, "source").close()
    before = sorted(os.listdir(small))
    remount_read_only(small)
    with pytest.raises(IndexStoreError):
        IndexStore(small, "source")
    assert sorted(os.listdir(small)) == before


OPEN = """
import sys
from weightfs.errors import IndexStoreError
from weightfs.index.store import IndexStore
try:
    index = IndexStore(sys.argv[1], "source")
    print("opened", index.number_of(b"key"), index.set_aside)
    index.close()
except IndexStoreError:
    print("refused")
"""


@needs_mount
def test_a_new_index_on_a_full_filesystem(small: str) -> None:
    fill(small)
    done = python(OPEN, small)
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert done.stdout == "refused\n"


@needs_mount
def test_a_good_index_on_a_full_filesystem_is_not_thrown_away(small: str) -> None:
    index = IndexStore(small, "source")
    index.put_number(b"key", number := index.take())
    index.close()
    filler = fill(small)
    done = python(OPEN, small)
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert done.stdout in ("refused\n", f"opened {number} None\n")  # there may be no room to reserve numbers
    os.unlink(filler)
    last = IndexStore(small, "source")
    assert last.number_of(b"key") == number
    last.close()


# Where there is no more room

FULL = """
import os, resource, signal, sys
from weightfs.errors import IndexStoreError
from weightfs.index import store
from weightfs.index.schema import EntryRecord, Kind
store._QUIET_S = 0.0
index = store.IndexStore(sys.argv[1], "source")
index.put_number(b"early", early := index.take())
index.flush()
size = os.path.getsize(index._files.path)
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 8192, resource.RLIM_INFINITY))
numbers = {}
for number in range(3000):
    numbers[number] = index.take()
    index.put_entry(numbers[number], EntryRecord(Kind.SOURCE, 1, b"%d" % number, b"x" * 300))
try:
    index.flush()
    print("written?")
except IndexStoreError as e:
    print("full:", e.path == index._files.path)
assert index.number_of(b"early") == early
assert all(index.entry(numbers[n]).name == b"%d" % n for n in numbers)
if "room" in sys.argv:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    index.flush()
    assert not index._overlay
index.close()
print(min(numbers.values()), max(numbers.values()), early, index.set_aside)
"""


@pytest.mark.parametrize("outcome", ["room", "none"])
def test_a_full_disk_is_served_from_memory(state: str, outcome: str) -> None:
    done = python(FULL, state, outcome)
    assert done.returncode == 0, done.stderr
    full, numbers = done.stdout.splitlines()
    assert full == "full: True"
    first, last, early, aside = numbers.split()
    assert aside == "None"
    index = IndexStore(state, "source")
    assert index.set_aside is None
    assert index.number_of(b"early") == int(early)
    found = index.entry(int(first))
    assert (found is not None) == (outcome == "room")
    assert not int(first) <= index.take() <= int(last), "numbers that were lost are given out again"
    index.close()


def test_a_rebuild_without_room_leaves_the_mount_going(index: IndexStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index is damaged, and no new one can be made: what is asked is not known, which is no reason to fail."""

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index.database, "_attach", full)
    index.database.rebuild("a test says so")
    index.put_number(b"pending", 77)
    assert index.number_of(b"unknown") is None
    assert index.number_of(b"pending") == 77
    monkeypatch.undo()
    assert index.number_of(b"unknown") is None
    index.flush()
    assert index.take() >> 32 == index.epoch


# Somebody else in it

NEIGHBOUR = """
import sys
from weightfs.index import store
from weightfs.index.schema import FileRecord
from weightfs.index.store import IndexStore
store._QUIET_S = 0.0
index = IndexStore(sys.argv[1], "source")
print(index.epoch, flush=True)
for line in sys.stdin:
    match line.split():
        case ["take", count]:
            print(index.take(int(count)), flush=True)
        case ["put", key, megabytes]:
            index.put_number(key.encode(), index.take())
            blob = {"blob": "x" * (1 << 20)}
            for n in range(int(megabytes)):
                index.put_file(key.encode().ljust(15, b" ") + bytes([n]), FileRecord(1, "gguf", [], blob, False, None))
            index.flush()
            print(index.number_of(key.encode()), flush=True)
        case ["get", key]:
            print(index.number_of(key.encode()), index.set_aside, flush=True)
index.close()
"""


class Neighbour:
    """Another process with the same index open."""

    def __init__(self, state: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", NEIGHBOUR, state], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin: IO[str] = self._process.stdin
        self._stdout: IO[str] = self._process.stdout
        self.epoch = int(self._stdout.readline())

    def ask(self, *words: object) -> str:
        self._stdin.write(" ".join(map(str, words)) + "\n")
        self._stdin.flush()
        return self._stdout.readline().strip()

    def end(self) -> int:
        self._stdin.close()
        self._stdout.close()
        return self._process.wait(20)


@pytest.fixture
def neighbour(state: str, index: IndexStore) -> Iterator[Neighbour]:
    other = Neighbour(state)
    yield other
    assert other.end() == 0


def test_two_processes_share_an_index(index: IndexStore, neighbour: Neighbour) -> None:
    assert neighbour.epoch == index.epoch
    runs = []
    for _ in range(5):
        runs += [(index.take(40_000), 40_000), (int(neighbour.ask("take", 40_000)), 40_000)]
    ends = [0, *(first + count for first, count in sorted(runs))]
    assert all(first >= end for (first, _), end in zip(sorted(runs), ends, strict=False))
    number = int(neighbour.ask("put", "theirs", 0))
    assert index.number_of(b"theirs") == number
    index.put_number(b"ours", 4711)
    index.flush()
    assert neighbour.ask("get", "ours") == "4711 None"
    assert index.set_aside is None


def test_the_map_grows_under_a_process_that_shares_it(index: IndexStore, neighbour: Neighbour) -> None:
    """Not damage: LMDB says MapResizedError, and the size is to be taken over."""
    epoch = index.epoch
    index.put_number(b"ours", 4711)
    index.flush()
    number = int(neighbour.ask("put", "theirs", 40))
    assert index.number_of(b"theirs") == number
    index.put_number(b"more", 4712)
    index.flush()
    assert neighbour.ask("get", "more") == "4712 None"
    assert index.set_aside is None
    assert index.epoch == epoch
