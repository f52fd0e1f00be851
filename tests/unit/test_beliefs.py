"""For how long what is answered may be believed, and what a batch of changes tells the kernel; without FUSE."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.models import tensor, write, write_safetensors
from tests.unit.support import Later
from tests.unit.test_filesystem import TEXTS, find, run
from weightfs import beliefs
from weightfs.beliefs import FILES_S, NAMES_S
from weightfs.entries import Attributes
from weightfs.errors import StaleError
from weightfs.filesystem import Filesystem, FilesystemConfig
from weightfs.handles import HandleTable
from weightfs.index.schema import ROOT_INODE
from weightfs.index.store import IndexStore
from weightfs.source.local import LocalSource
from weightfs.watch import Batch, Kind, Watcher

SHORT_S = 1.0
SHORT, FILE, FOLDER = (SHORT_S, SHORT_S), (NAMES_S, FILES_S), (NAMES_S, NAMES_S)


class Told:
    """Stands in for the notifier: what was to be told, in the order of the calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.sent: dict[str, int] = {}

    def folder_changed(self, folder: int, gone: Any = (), doubtful: Any = (), inodes: Any = ()) -> None:
        self.calls.append(("folder", folder, sorted(gone), sorted(doubtful), sorted(inodes)))

    def files_changed(self, folder: int, files: Any) -> None:
        self.calls.append(("files", folder, sorted(files)))

    def attributes_changed(self, inode: int) -> None:
        self.calls.append(("attributes", inode))

    def content_changed(self, inode: int) -> None:
        self.calls.append(("content", inode))


class Rig:
    def __init__(self, root: str, source: LocalSource, index: IndexStore, watcher: Watcher) -> None:
        self.root = root
        self.source = source
        self.index = index
        self.watcher = watcher
        self.told = Told()
        self.handles = HandleTable()
        self.fs = Filesystem(source, index, self.handles, TEXTS, FilesystemConfig())
        self.beliefs = self.fs.watch(source, watcher, self.told, short_s=SHORT_S)  # type: ignore[arg-type]

    def known(self, path: str) -> Attributes:
        """Looked up once its number is on file."""
        find(self.fs, path)
        self.index.flush()
        return find(self.fs, path)

    def tell(self, folder: str, **names: Kind) -> list[tuple[Any, ...]]:
        """A batch of changes in a folder; gives what the kernel is told."""
        key = self.source.lstat(os.fsencode(folder)).inode_key
        self.told.calls.clear()
        self.fs.source_changed(Batch({(key, os.fsencode(name)): kind for name, kind in names.items()}))
        return self.told.calls

    def opened(self, inode: int) -> None:
        self.handles.add(inode, 1)
        run(self.fs.open, inode, os.O_RDONLY)


def trust(found: Attributes) -> tuple[float | None, float | None]:
    return found.name_s, found.own_s


@pytest.fixture
def rig(tmp_path: Path, index: IndexStore, settled: Later) -> Iterator[Rig]:
    root = f"{tmp_path}/models"
    write(f"{root}/readme", b"hello")
    write(f"{root}/dir/file", b"1")
    write_safetensors(f"{root}/one/m.safetensors", {"t": tensor("U8", (8,), 1)})
    source, watcher = LocalSource(root), Watcher(root)
    made = Rig(root, source, index, watcher)
    yield made
    made.handles.close()
    watcher.close()
    source.close()


# How long


def test_names_are_believed_once_they_are_on_file(rig: Rig) -> None:
    """A successor asks anew for what the index says: what is not there yet is not told for long."""
    assert trust(find(rig.fs, "readme")) == SHORT
    assert trust(rig.known("readme")) == FILE
    assert trust(rig.known("dir")) == FOLDER
    assert trust(rig.known("dir/file")) == FILE
    assert trust(run(rig.fs.getattr, rig.known("dir/file").inode)) == FILE
    assert run(rig.fs.getattr, ROOT_INODE).own_s == NAMES_S
    assert len(rig.watcher) == 2


def test_what_is_not_in_the_index_any_more_is_not_believed(rig: Rig) -> None:
    """The index is lost under the mount: what was told for long is taken back, since no successor would find it."""
    inode = rig.known("readme").inode
    rig.told.calls.clear()
    with rig.index._lock:
        rig.index.database.rebuild("a test says so")
    assert trust(find(rig.fs, "readme")) == SHORT
    assert ("folder", ROOT_INODE, [], [b"readme"], [inode]) in rig.told.calls
    assert trust(rig.known("readme")) == SHORT


def test_listings_are_believed(rig: Rig) -> None:
    list(run(rig.fs.readdir, ROOT_INODE, 0))
    rig.index.flush()
    found = {entry.name: trust(entry.attributes) for entry in run(rig.fs.readdir, ROOT_INODE, 0)}
    assert found == {b"readme": FILE, b"dir": FOLDER, b"one": FOLDER}


def test_a_listing_that_goes_on_after_a_change_is_not(rig: Rig) -> None:
    rig.known("readme")
    rig.known("dir")
    entries = list(run(rig.fs.readdir, ROOT_INODE, 0))
    rig.tell("", readme=Kind.CONTENT)
    again = list(run(rig.fs.readdir, ROOT_INODE, entries[0].cookie))
    assert [trust(entry.attributes) for entry in again] == [SHORT, SHORT]


def test_a_change_while_it_is_examined(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.known("readme")
    examine = rig.beliefs.examine

    def slow(*arguments: Any, **options: Any) -> Any:
        sight = examine(*arguments, **options)
        rig.tell("", readme=Kind.CONTENT)
        return sight

    monkeypatch.setattr(rig.beliefs, "examine", slow)
    assert trust(find(rig.fs, "readme")) == SHORT
    monkeypatch.undo()
    assert trust(find(rig.fs, "readme")) == FILE


def test_files_with_two_names_are_not_believed(rig: Rig) -> None:
    os.link(f"{rig.root}/readme", f"{rig.root}/second")
    assert trust(rig.known("readme")) == SHORT


def test_files_that_something_is_mounted_over_are_not_believed(rig: Rig) -> None:
    rig.watcher.mounts_below = frozenset({b"dir/file"})
    assert trust(rig.known("dir/file")) == SHORT
    assert trust(rig.known("readme")) == FILE


def test_folders_that_are_not_watched(rig: Rig) -> None:
    rig.watcher._most = 1
    assert trust(rig.known("readme")) == FILE
    assert trust(rig.known("dir")) == (NAMES_S, SHORT_S)
    assert trust(rig.known("dir/file")) == SHORT
    assert rig.beliefs.status()["unwatched"] == {"more than 1 folders": 1}


def test_filesystems_that_others_may_change(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beliefs, "tells_of_changes", lambda fd: False)
    assert trust(rig.known("dir/file")) == SHORT
    assert run(rig.fs.getattr, ROOT_INODE).own_s == SHORT_S
    assert len(rig.watcher) == 0


def test_views_are_not_believed_for_long(rig: Rig) -> None:
    for path in (".weightfs", "one/.tensors", "one/.tensors/m", "one/.tensors/m/t"):
        assert trust(rig.known(path)) == (None, None)


def test_another_folder_in_its_place_is_stale(rig: Rig) -> None:
    """Before anybody told that it was replaced: its names must not be taken for the old folder's."""
    folder = rig.known("dir").inode
    os.rename(f"{rig.root}/dir", f"{rig.root}/moved")
    write(f"{rig.root}/dir/file", b"another")
    with pytest.raises(StaleError):
        run(rig.fs.lookup, folder, b"file")
    with pytest.raises(StaleError):
        run(rig.fs.readdir, folder, 0)
    assert find(rig.fs, "dir/file").size == 7


# What is told


def test_a_name_that_changes(rig: Rig) -> None:
    inode = rig.known("readme").inode
    assert rig.tell("", readme=Kind.NAME) == [("folder", ROOT_INODE, [b"readme"], [], [inode])]
    assert rig.tell("", readme=Kind.NAME) == [("folder", ROOT_INODE, [b"readme"], [], [])]


def test_content_and_attributes_that_change(rig: Rig) -> None:
    inode = rig.known("readme").inode
    files = ("files", ROOT_INODE, [(b"readme", inode)])
    assert rig.tell("", readme=Kind.CONTENT) == [("content", inode), files]
    assert rig.tell("", readme=Kind.ATTRIBUTES) == [files]
    assert rig.tell("", **{"": Kind.ATTRIBUTES}) == [("attributes", ROOT_INODE)]


def test_names_the_kernel_does_not_know(rig: Rig) -> None:
    """The listing is told of once; writes to a file nobody asked for are not told of at all."""
    rig.known("readme")
    assert rig.tell("", new=Kind.NAME, other=Kind.NAME) == [("folder", ROOT_INODE, [b"other"], [], [])]
    assert rig.tell("", new=Kind.CONTENT) == []


def test_a_second_name_tells_of_the_first(rig: Rig) -> None:
    inode = rig.known("readme").inode
    find(rig.fs, "dir/file")
    os.link(f"{rig.root}/readme", f"{rig.root}/dir/link")
    calls = rig.tell("dir", link=Kind.NAME | Kind.CONTENT)
    assert ("content", inode) in calls
    assert any(call[0] == "folder" and call[4] == [inode] for call in calls)


def test_a_watch_that_ended(rig: Rig) -> None:
    folder, inode = rig.known("dir").inode, rig.known("dir/file").inode
    assert rig.tell("dir", **{"": Kind.ENDED}) == [("folder", folder, [], [b"file"], [inode])]


def test_everything(rig: Rig) -> None:
    folder = rig.known("dir").inode
    files = {path: rig.known(path).inode for path in ("readme", "dir/file")}
    rig.told.calls.clear()
    rig.fs.source_changed(Batch(everything=True))
    assert ("folder", folder, [], [b"file"], [files["dir/file"]]) in rig.told.calls
    assert ("folder", ROOT_INODE, [], [b"dir", b"readme"], sorted([folder, files["readme"]])) in rig.told.calls
    assert trust(find(rig.fs, "readme")) == FILE


def test_open_views_of_a_changed_file(rig: Rig) -> None:
    rig.known("one/m.safetensors")
    view = rig.known("one/.tensors/m/t").inode
    rig.opened(view)
    assert ("content", view) in rig.tell("one", **{"m.safetensors": Kind.ATTRIBUTES})
    assert ("content", view) not in rig.tell("one", other=Kind.NAME)


def test_forgotten_is_not_watched_or_told_of(rig: Rig) -> None:
    folder, inode = rig.known("dir").inode, rig.known("dir/file").inode
    rig.fs.forget(inode, 2)
    assert rig.tell("dir", file=Kind.CONTENT) == []
    rig.fs.forget(folder, 100)
    assert len(rig.watcher) == 1
    assert rig.tell("dir", file=Kind.NAME) == []


# Opens


def test_an_open_of_what_changed_unseen_is_stale_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    inode = rig.known("readme").inode
    write(f"{rig.root}/readme", b"longer than before")
    rig.opened(inode)  # as old as without a watch
    later = Later()
    later.passed_s = 2
    monkeypatch.setattr(beliefs, "time", later)
    with pytest.raises(StaleError):
        run(rig.fs.open, inode, os.O_RDONLY)
    assert rig.told.calls == [("attributes", inode)]
    rig.opened(inode)  # whoever opens by descriptor can't look it up
    assert find(rig.fs, "readme").size == 18
