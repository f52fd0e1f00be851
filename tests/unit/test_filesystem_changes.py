"""Opens, changes under open and known inodes, sources that do not answer; without FUSE."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.models import tensor, write, write_safetensors
from tests.unit.support import Later, OddSource
from tests.unit.test_filesystem import TEXTS, find, names, run
from weightfs.entries import Opened
from weightfs.errors import (
    NotFoundError,
    StaleError,
)
from weightfs.filesystem import Filesystem, FilesystemConfig
from weightfs.handles import HandleTable
from weightfs.index.store import IndexStore
from weightfs.readables import WholeFile

TENSORS = {"a": tensor("F32", (4, 2), 1), "b": tensor("BF16", (3,), 2)}
OTHERS = {"a": tensor("F32", (4, 2), 7), "b": tensor("BF16", (3,), 8)}
SHORT = FilesystemConfig(deadline_s=0.5, threads=3)


@pytest.fixture
def root(tmp_path: Path, settled: Later) -> str:
    folder = str(tmp_path / "models")
    write(f"{folder}/readme", b"hello")
    write_safetensors(f"{folder}/one/m.safetensors", TENSORS)
    return folder


@pytest.fixture
def source(root: str) -> Iterator[OddSource]:
    opened = OddSource(root)
    yield opened
    opened.gate.set()
    opened.close()


@pytest.fixture
def handles() -> Iterator[HandleTable]:
    table = HandleTable()
    yield table
    table.close()


@pytest.fixture
def fs(source: OddSource, index: IndexStore, handles: HandleTable) -> Filesystem:
    return Filesystem(source, index, handles, TEXTS, FilesystemConfig())


def opened(fs: Filesystem, inode: int, handle: int = 1) -> Opened:
    fs._handles.add(inode, handle)
    return run(fs.open, inode, os.O_RDONLY)


def read(fs: Filesystem, inode: int, handle: int = 1) -> bytes:
    entry = fs._handles.get(inode)
    assert entry is not None
    assert entry.readable is not None
    buffer = bytearray(1 << 16)
    return bytes(buffer[: entry.readable.read_into(handle, memoryview(buffer), 0)])


# Names that are gone or mean another file


def replace(path: str) -> None:
    write(f"{path}.new", b"another file")
    os.replace(f"{path}.new", path)


def by_symlink(path: str) -> None:
    write(f"{path}.target", b"another file")
    os.unlink(path)
    os.symlink(os.path.basename(path) + ".target", path)


def by_folder(path: str) -> None:
    os.unlink(path)
    os.mkdir(path)


def by_fifo(path: str) -> None:
    os.unlink(path)
    os.mkfifo(path)


def folder_gone(path: str) -> None:
    shutil.rmtree(os.path.dirname(path))


def folder_to_file(path: str) -> None:
    folder_gone(path)
    write(os.path.dirname(path), b"a file now")


def folder_to_symlink(path: str) -> None:
    folder = os.path.dirname(path)
    os.rename(folder, f"{folder}.moved")
    os.symlink(os.path.basename(folder) + ".moved", folder)


CHANGES: list[Callable[[str], None]] = [
    os.unlink, replace, by_symlink, by_folder, by_fifo, folder_gone, folder_to_file, folder_to_symlink,
]  # fmt: skip


@pytest.mark.parametrize("immediate", [True, False], ids=["cached", "waiting"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_name_that_means_another_file_is_stale(
    fs: Filesystem, root: str, source: OddSource, change: Callable[[str], None], immediate: bool
) -> None:
    """ESTALE makes the kernel look the name up again; any other errno would reach the program."""
    write(f"{root}/dir/file", b"old")
    found = find(fs, "dir/file")
    change(f"{root}/dir/file")
    source.immediate = immediate
    with pytest.raises(StaleError):
        run(fs.open, found.inode, os.O_RDONLY)
    with pytest.raises(StaleError):
        run(fs.getattr, found.inode)


@pytest.mark.parametrize("immediate", [True, False], ids=["cached", "waiting"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_whoever_has_it_open_may_still_ask_and_read(
    fs: Filesystem, root: str, source: OddSource, change: Callable[[str], None], immediate: bool
) -> None:
    write(f"{root}/dir/file", b"old")
    found = find(fs, "dir/file")
    opened(fs, found.inode)
    change(f"{root}/dir/file")
    source.immediate = immediate
    now = run(fs.getattr, found.inode)
    assert (now.inode, now.size) == (found.inode, 3)
    assert read(fs, found.inode) == b"old"


@pytest.mark.parametrize("replaced", [True, False])
def test_a_symlink_that_is_none_any_more_is_stale(fs: Filesystem, root: str, replaced: bool) -> None:
    os.symlink("readme", f"{root}/link")
    inode = find(fs, "link").inode
    os.unlink(f"{root}/link")
    if replaced:
        write(f"{root}/link", b"a file now")
    with pytest.raises(StaleError):
        run(fs.readlink, inode)


def test_a_replaced_file_is_a_new_inode_beside_the_open_one(fs: Filesystem, root: str) -> None:
    old = find(fs, "readme")
    opened(fs, old.inode)
    replace(f"{root}/readme")
    new = find(fs, "readme")
    assert new.inode != old.inode
    opened(fs, new.inode)
    assert (read(fs, old.inode), read(fs, new.inode)) == (b"hello", b"another file")
    assert fs.changed_files() == []


def test_an_in_place_write_is_told_while_the_file_is_open(fs: Filesystem, root: str, handles: HandleTable) -> None:
    inode = find(fs, "readme").inode
    opened(fs, inode)
    with open(f"{root}/readme", "r+b") as file:
        file.write(b"HELLO!")
    assert read(fs, inode) == b"HELLO!"
    assert fs.changed_files() == ["readme"]
    assert find(fs, "readme").inode == inode
    handles.discard(inode, 1)
    assert fs.changed_files() == []


@pytest.mark.parametrize("taken", [False, True], ids=["closed", "number taken by another"])
def test_a_file_closed_while_it_is_asked_for_is_not_told(
    fs: Filesystem, root: str, handles: HandleTable, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    """status asks from a thread of its own."""
    inode = find(fs, "readme").inode
    opened(fs, inode)
    examine = WholeFile.has_changed
    others: list[int] = []

    def late(file: WholeFile) -> bool:
        handles.discard(inode, 1)
        if taken:
            others.append(os.dup2(0, file.fd))
        return examine(file)

    monkeypatch.setattr(WholeFile, "has_changed", late)
    assert fs.changed_files() == []
    for fd in others:
        os.close(fd)


def test_an_open_view_outlives_the_name_of_a_folder_above(fs: Filesystem, root: str, handles: HandleTable) -> None:
    """Its file is what it was."""
    view = find(fs, "one/.tensors/m/a")
    opened(fs, view.inode)
    before = read(fs, view.inode)
    os.rename(f"{root}/one", f"{root}/two")
    assert run(fs.getattr, view.inode).size == view.size
    assert read(fs, view.inode) == before
    handles.discard(view.inode, 1)
    with pytest.raises(StaleError):
        run(fs.getattr, view.inode)


def test_a_changed_file_makes_its_views_stale_and_new_ones_new(fs: Filesystem, root: str, settled: Later) -> None:
    old = find(fs, "one/.tensors/m/a")
    opened(fs, old.inode)
    write_safetensors(f"{root}/one/m.safetensors", OTHERS)
    with pytest.raises(StaleError):
        read(fs, old.inode)
    for call in (lambda: run(fs.getattr, old.inode), lambda: run(fs.open, old.inode, os.O_RDONLY)):
        with pytest.raises(StaleError):
            call()
    new = find(fs, "one/.tensors/m/a")  # within the second in which the old set is remembered
    assert new.inode != old.inode
    opened(fs, new.inode)
    assert read(fs, new.inode) == OTHERS["a"].data
    settled.passed_s += 2
    os.unlink(f"{root}/one/m.safetensors")
    with pytest.raises(StaleError):
        run(fs.getattr, new.inode)
    with pytest.raises(NotFoundError):
        find(fs, "one/.tensors/m")


@pytest.mark.parametrize("removed", [False, True])
def test_a_set_can_be_listed_at_once_after_its_file_changed(fs: Filesystem, root: str, removed: bool) -> None:
    inode = find(fs, "one/.tensors/m").inode
    assert names(fs, inode) == {b"a", b"b"}
    if removed:
        os.unlink(f"{root}/one/m.safetensors")
    else:
        write_safetensors(f"{root}/one/m.safetensors", {"new": TENSORS["a"]})
    assert names(fs, inode) == (set() if removed else {b"new"})


def test_a_file_that_has_moved_is_found_by_its_new_name(fs: Filesystem, root: str) -> None:
    old = find(fs, "readme")
    os.rename(f"{root}/readme", f"{root}/one/moved")
    with pytest.raises(StaleError):
        run(fs.getattr, old.inode)
    assert find(fs, "one/moved").inode == old.inode
    assert run(fs.getattr, old.inode).size == 5


def test_attributes_of_an_earlier_walk_are_not_served_later(fs: Filesystem, root: str) -> None:
    """Folders are listed ahead of a walk; what lies in them may change before the walk gets there."""
    for number in range(8):
        write(f"{root}/walk/{number}/file", b"old")
    entries = list(run(fs.readdir, find(fs, "walk").inode, 0))
    for entry in entries[:4]:
        names(fs, entry.attributes.inode)
    for number in range(8):
        write(f"{root}/walk/{number}/file", b"longer")
    fs._walk._read_at -= 1  # as if the walk had paused
    for entry in entries[4:]:
        (file,) = run(fs.readdir, entry.attributes.inode, 0)
        assert file.attributes.size == 6
        assert file.attributes == run(fs.getattr, file.attributes.inode)
