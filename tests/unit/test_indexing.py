"""Headers recorded before anybody asks, and rows dropped whose file is gone; no mount, no clock, no process."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.helpers.libraries import Host, make_library
from tests.helpers.models import tensor, write, write_hub_cache, write_safetensors
from tests.unit.support import Later, OddSource
from weightfs import crawl, library
from weightfs.errors import StaleError
from weightfs.headers import read_record, slot_of
from weightfs.index import upkeep as upkeep_module
from weightfs.index.schema import ROOT_INODE, SERIALS, EntryRecord, FileRecord, Kind, inode_number
from weightfs.index.store import IndexStore
from weightfs.index.upkeep import FoundFile, Upkeep
from weightfs.library import Library
from weightfs.source.base import SourceStat
from weightfs.tree import Node

TENSORS = {"a": tensor("F32", (4, 2), 1), "b": tensor("BF16", (3,), 2)}


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Later:
    """Files just made count as settled."""
    later = Later()
    monkeypatch.setattr(crawl, "time", later)
    monkeypatch.setattr(library, "time", later)
    return later


@pytest.fixture
def root(tmp_path: Path) -> str:
    (tmp_path / "models").mkdir()
    return str(tmp_path / "models")


@pytest.fixture
def source(root: str) -> Iterator[OddSource]:
    opened = OddSource(root)
    yield opened
    opened.close()


@pytest.fixture
def host(source: OddSource, index: IndexStore) -> Host:
    return Host(source, index)


def record_of(host: Host, path: str) -> FileRecord | None:
    entry = host.source.lstat(os.fsencode(path))
    return host.index.file(slot_of(entry.identity, os.path.basename(path)))


def see(host: Host, path: str) -> Node:
    """Look every name of a path up, as the kernel would; it holds none of them for long."""
    node = host.tree.node(ROOT_INODE)
    for depth, name in enumerate(parts := os.fsencode(path).split(b"/")):
        entry = host.source.lstat(b"/".join(parts[: depth + 1]))
        node = host.tree.see(Kind.SOURCE, node.inode, name, entry.inode_key)
    return node


def rows(index: IndexStore) -> dict[bytes, int]:
    assert index.database._env is not None
    index.flush()
    with index.database._env.begin() as txn:
        return {
            room: txn.stat(db=index.database.rooms[room])["entries"]
            for room in (b"keys", b"entries", b"files", b"bases")
        }


# Recording


def test_every_header_of_a_library_is_recorded(host: Host, root: str) -> None:
    folders = make_library(root, folders=3, files=7, tensors=50)
    done = host.crawl()
    assert (done["folders"], done["files"], done["headers"], done["failed"]) == (4, 7, 7, 0)
    served = Library(host.source, host.index)
    names = [
        name for folder in folders for name in served.sets(host.source.names(os.fsencode(os.path.basename(folder))))
    ]
    assert names == ["model"] * 3
    found = [served.view_set(os.fsencode(os.path.basename(folder)), "model") for folder in folders]
    assert sum(len(views.raw) for views in found if views) == 50
    assert served.headers_parsed == 0
    numbers = [parsed.record.base + 2 * position for views in found if views for parsed, position in views.raw.values()]
    assert len(set(numbers)) == 50
    fresh = Library(host.source, host.index)
    for number in numbers:
        assert fresh.view(number) is not None, "a number leads back to its tensor"


def test_what_is_known_is_not_read_again_and_keeps_its_numbers(host: Host, root: str) -> None:
    make_library(root, folders=2, files=4, tensors=20)
    before = Library(host.source, host.index).view_set(b"org--model-00000", "model")
    assert before is not None
    assert host.crawl()["headers"] == 2
    again = host.crawl()
    assert (again["files"], again["headers"], again["dropped"]) == (4, 0, 0)
    after = Library(host.source, host.index).view_set(b"org--model-00000", "model")
    assert after is not None
    assert {name: parsed.record.base for name, (parsed, _) in after.raw.items()} == {
        name: parsed.record.base for name, (parsed, _) in before.raw.items()
    }


def test_a_record_made_meanwhile_wins(host: Host, root: str) -> None:
    """Its numbers may be known to the kernel already."""
    write_safetensors(f"{root}/m.safetensors", TENSORS)
    entry = host.source.lstat(b"m.safetensors")
    served = Library(host.source, host.index)
    for flush in (False, True):
        parsed = served.parsed(b"m.safetensors", entry, "m.safetensors")
        if flush:
            host.index.flush()
        record = read_record(host.source, b"m.safetensors", entry, "m.safetensors")
        assert record is not None
        found = FoundFile(entry.identity, b"m.safetensors", "m.safetensors", 4, msgspec.msgpack.encode(record))
        host.indexer._upkeep.add_files([found])
        assert record_of(host, "m.safetensors") == parsed.record


def test_faults_symlinks_and_other_files(host: Host, root: str) -> None:
    snapshot = write_hub_cache(root, TENSORS)
    write(f"{root}/broken.safetensors", b"\xff" * 100)
    write(f"{root}/readme.txt", b"no weights")
    os.symlink("/etc", f"{root}/out.safetensors")
    os.symlink("nowhere", f"{root}/dangling.gguf")
    os.mkdir(f"{root}/folder.gguf")
    os.mkfifo(f"{root}/fifo.safetensors")
    done = host.crawl()
    assert (done["files"], done["headers"], done["failed"]) == (2, 2, 0)
    record = record_of(host, "broken.safetensors")
    assert record is not None
    assert record.fault is not None
    served = Library(host.source, host.index)
    assert served.view_set(os.fsencode(os.path.relpath(snapshot, root)), "model") is not None
    assert served.headers_parsed == 0


def test_a_young_file_is_visited_again(host: Host, root: str, clock: Later, monkeypatch: pytest.MonkeyPatch) -> None:
    clock.ahead_ns = 0
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock.ahead_ns += int(seconds * 1e9)

    monkeypatch.setattr(clock, "sleep", sleep, raising=False)
    write_safetensors(f"{root}/m.safetensors", TENSORS)
    done = host.crawl()
    assert (done["files"], done["headers"], done["young"]) == (1, 1, 0)
    assert len(slept) == 1
    assert 0 < slept[0] < 2.1


def test_a_file_that_is_written_all_the_time_is_left_to_the_next_crawl(
    host: Host, root: str, clock: Later, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock.ahead_ns = 0
    monkeypatch.setattr(clock, "sleep", lambda _: None, raising=False)
    write_safetensors(f"{root}/m.safetensors", TENSORS)
    done = host.crawl()
    assert (done["headers"], done["young"]) == (0, 1)
    assert record_of(host, "m.safetensors") is None


def test_a_header_too_large_is_left_to_whoever_asks(host: Host, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crawl, "_MOST_HEADER_BYTES", 64)
    write_safetensors(f"{root}/m.safetensors", TENSORS)
    done = host.crawl()
    assert (done["files"], done["headers"], done["failed"]) == (1, 0, 0)
    assert Library(host.source, host.index).view_set(b"", "m") is not None


# Dropping


def test_rows_of_what_is_gone_are_dropped_and_the_rest_keeps_its_numbers(host: Host, root: str) -> None:
    make_library(root, folders=3, files=6, tensors=30)
    kept = see(host, "org--model-00001/model-00001-of-00002.safetensors")
    gone = see(host, "org--model-00000/model-00001-of-00002.safetensors")
    views_kept, views_gone = see(host, "org--model-00001"), see(host, "org--model-00000")
    for folder in (views_kept, views_gone):
        tensors = host.tree.see_virtual(Kind.VIEW_ROOT, folder.inode, b".tensors")
        host.tree.see_virtual(Kind.VIEW_SET, tensors.inode, b"model")
    host.crawl()
    before, record = rows(host.index), record_of(host, "org--model-00001/model-00001-of-00002.safetensors")
    for name in os.listdir(f"{root}/org--model-00000"):
        os.unlink(f"{root}/org--model-00000/{name}")
    os.rmdir(f"{root}/org--model-00000")
    done = host.crawl()
    assert done["dropped"] == 4 + 2 + 2, "a folder, a file and two views; two headers and their numbers"
    after = rows(host.index)
    assert {room: before[room] - after[room] for room in after} == {
        b"keys": 4,
        b"entries": 4,
        b"files": 2,
        b"bases": 2,
    }
    with pytest.raises(StaleError):
        host.tree.node(gone.inode)
    assert record_of(host, "org--model-00001/model-00001-of-00002.safetensors") == record
    assert see(host, "org--model-00001/model-00001-of-00002.safetensors").inode == kept.inode
    assert host.index.take() > max(gone.inode, kept.inode), "no number is given out twice"
    assert host.crawl()["dropped"] == 0


def test_a_set_that_is_gone_from_a_folder(host: Host, root: str) -> None:
    write_safetensors(f"{root}/m/a.safetensors", TENSORS)
    write_safetensors(f"{root}/m/b.safetensors", TENSORS)
    folder = see(host, "m")
    for above in (folder, host.tree.node(ROOT_INODE)):
        tensors = host.tree.see_virtual(Kind.VIEW_ROOT, above.inode, b".tensors")
        sets = [host.tree.see_virtual(Kind.VIEW_SET, tensors.inode, name).inode for name in (b"a", b"b")]
        if above is folder:
            of_folder = sets
    host.tree.see_virtual(Kind.STATE, ROOT_INODE, b".weightfs")
    os.unlink(f"{root}/m/a.safetensors")
    host.crawl()
    assert host.index.entry(of_folder[0]) is None
    assert host.index.entry(of_folder[1]) is not None
    assert host.index.entry(sets[1]) is None, "the root has no such set"
    assert {entry.kind for entry in entries(host)} == {Kind.SOURCE, Kind.VIEW_ROOT, Kind.VIEW_SET, Kind.STATE}


def entries(host: Host) -> list[EntryRecord]:
    host.index.flush()
    page, _ = host.indexer._upkeep.page(b"")
    found = [host.index.entry(int.from_bytes(row[1:], "big")) for row, _ in page if row[:1] == b"e"]
    state = host.index.entry(host.tree.see_virtual(Kind.STATE, ROOT_INODE, b".weightfs").inode)
    return [entry for entry in [*found, state] if entry is not None]


def test_what_is_open_stays_with_the_folders_above_it(host: Host, root: str) -> None:
    write(f"{root}/a/b/open.txt", b"1")
    write(f"{root}/a/b/closed.txt", b"1")
    opened, closed = see(host, "a/b/open.txt"), see(host, "a/b/closed.txt")
    host.handles.add(opened.inode, 1)
    for name in ("open.txt", "closed.txt"):
        os.unlink(f"{root}/a/b/{name}")
    os.rmdir(f"{root}/a/b")
    os.rmdir(f"{root}/a")
    host.crawl()
    again = type(host.tree)(host.index, host.source.lstat(b"").inode_key)  # a successor, which knows only the index
    assert again.path(again.node(opened.inode)) == b"a/b/open.txt"
    with pytest.raises(StaleError):
        again.node(closed.inode)
    host.handles.discard(opened.inode, 1)
    host.crawl()
    assert rows(host.index)[b"entries"] == 0


def test_a_file_moved_between_two_folders_while_they_are_listed_stays(
    host: Host, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("a", "b"):
        os.mkdir(f"{root}/{folder}")
    write(f"{root}/a/x.txt", b"1")
    number = see(host, "a/x.txt").inode
    host.index.flush()
    place = f"{root}/a/x.txt"
    listed: list[bytes] = []
    listing = host.source.entries

    def move(folder: bytes) -> None:
        nonlocal place
        there = os.path.join(root, os.fsdecode(folder), "x.txt")
        os.rename(place, there)
        place = there

    def entries(path: bytes) -> list[tuple[bytes, SourceStat]]:
        found = listing(path)
        listed.append(path)
        if len(listed) == 1:
            move(found[0][0])  # of the root's folders, the one that is visited last
        elif len(listed) == 2:
            move(path)
        return found

    monkeypatch.setattr(host.source, "entries", entries)
    host.crawl()
    assert len(listed) == 6, "a crawl, and another one because something seemed to be gone"
    assert host.index.entry(number) is not None


def test_nothing_is_dropped_when_a_folder_could_not_be_listed(
    host: Host, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(f"{root}/a/x.txt", b"1")
    write(f"{root}/gone.txt", b"1")
    see(host, "a/x.txt")
    see(host, "gone.txt")
    os.unlink(f"{root}/gone.txt")
    listing = host.source.entries

    def entries(path: bytes) -> list[tuple[bytes, SourceStat]]:
        if path == b"a":
            raise OSError(5, "Input/output error")
        return listing(path)

    with monkeypatch.context() as patch:
        patch.setattr(host.source, "entries", entries)
        done = host.crawl()
    assert (done["failed"], done["dropped"], rows(host.index)[b"entries"]) == (1, 0, 3)
    assert host.crawl()["dropped"] == 1


def test_what_was_put_since_the_last_commit_is_not_dropped(index: IndexStore) -> None:
    upkeep = Upkeep(index, b"r" * 16)
    numbers = [index.take() for _ in range(3)]
    for at, number in enumerate(numbers):
        index.put_number(bytes([at]) * 16, number)
        index.put_entry(number, EntryRecord(Kind.SOURCE, ROOT_INODE, b"x", bytes([at]) * 16))
    index.flush()
    with index._lock:  # the writer waits
        index.put_entry(numbers[0], EntryRecord(Kind.SOURCE, ROOT_INODE, b"y", bytes(16)))
        assert upkeep.drop([b"e" + number.to_bytes(8, "big") for number in numbers], {numbers[1]}) == (1, [numbers[2]])
    index.flush()
    assert [index.entry(number) is not None for number in numbers] == [True, True, False]
    assert [index.number_of(bytes([at]) * 16) for at in range(3)] == [*numbers[:2], None]


def test_rows_come_in_pages(index: IndexStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep_module, "_PAGE", 7)
    upkeep = Upkeep(index, b"r" * 16)
    for at in range(20):
        number = index.take()
        index.put_entry(number, EntryRecord(Kind.SOURCE, ROOT_INODE, b"x", bytes([at]) * 16))
        index.put_file(bytes([at]) * 16 + b"gguf", FileRecord(number, "gguf", [], {}, False, None))
        index.put_owner(number, bytes([at]) * 16, b"x", "x.gguf")
    index.flush()
    found, after = [], b""
    while True:
        page, after = upkeep.page(after)
        found += page
        if not after:
            break
        assert len(page) == 7
    assert len({row for row, _ in found}) == len(found) == 60
    tokens = {letter: {token for row, token in found if row[:1] == letter} for letter in (b"e", b"f", b"b")}
    assert tokens[b"e"] == {bytes([at]) * 16 for at in range(20)}
    assert tokens[b"f"] == tokens[b"b"] == {bytes([at]) * 16 + b"gguf" for at in range(20)}


# Numbers run out


NEIGHBOUR = """
import sys
from weightfs.index.store import IndexStore
index = IndexStore(sys.argv[1], "source")
print("open", flush=True)
sys.stdin.readline()
for _ in range(5):
    print(index.take(60_000))
index.close()
"""


def test_an_epoch_without_numbers_left_is_followed_by_another(state: str) -> None:
    index = IndexStore(state, "source")
    old = [index.take() for _ in range(3)]
    index.put_entry(old[0], EntryRecord(Kind.SOURCE, ROOT_INODE, b"x", b"k" * 16))
    epoch = index.epoch
    with subprocess.Popen(
        [sys.executable, "-c", NEIGHBOUR, state], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as neighbour:
        assert neighbour.stdout is not None
        assert neighbour.stdout.readline() == "open\n"
        index.take(SERIALS - (1 << 20))
        taken = [(index.take(60_000), 60_000) for _ in range(30)]
        assert index.epoch > epoch
        out, _ = neighbour.communicate("go on\n", timeout=30)
    theirs = [(int(line), 60_000) for line in out.splitlines()]
    assert {first >> 32 for first, _ in theirs[2:]} == {index.epoch}, "the epoch is read with each block"
    runs = sorted(taken + theirs)
    assert all(first + count <= after for (first, count), (after, _) in itertools.pairwise(runs))
    assert all(first + count <= inode_number(first >> 32, 0) + SERIALS for first, count in runs), (
        "none leaves its epoch"
    )
    assert index.entry(old[0]) is not None
    index.close()
    again = IndexStore(state, "source")
    assert again.set_aside is None
    assert again.entry(old[0]) is not None
    assert again.take() > max(first + count - 1 for first, count in runs)
    again.close()
