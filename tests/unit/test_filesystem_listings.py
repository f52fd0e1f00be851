"""Listings, and numbers that last; without FUSE."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.models import model_tensors, write, write_safetensors, write_sharded
from tests.unit.support import Later, OddSource
from tests.unit.test_filesystem import TENSORS, TEXTS, find, names, run
from weightfs.entries import Attributes
from weightfs.errors import (
    NotADirectoryEntryError,
    StaleError,
)
from weightfs.filesystem import Filesystem, FilesystemConfig
from weightfs.handles import HandleTable
from weightfs.index.schema import ROOT_INODE
from weightfs.index.store import IndexStore


@pytest.fixture
def root(tmp_path: Path, settled: Later) -> str:
    folder = str(tmp_path / "models")
    write(f"{folder}/readme", b"hello")
    write_safetensors(f"{folder}/one/m.safetensors", TENSORS)
    write_sharded(f"{folder}/llama", model_tensors(2), 2)
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


# Listings


def test_a_listing_can_go_on_behind_any_cookie(fs: Filesystem, root: str) -> None:
    for number in range(200):
        write(f"{root}/many/{number}", b"")
    inode = find(fs, "many").inode
    entries = list(run(fs.readdir, inode, 0))
    assert len({entry.cookie for entry in entries}) == 200
    assert all(0 < entry.cookie < 1 << 63 for entry in entries)
    assert fs.listing_end(inode) == entries[-1].cookie
    for at in (0, 1, 77, 198, 199):
        rest = list(run(fs.readdir, inode, entries[at].cookie))
        assert rest == entries[at + 1 :]
    assert {entry.name for entry in entries} == {b"%d" % number for number in range(200)}
    for entry in entries[:3]:
        assert run(fs.getattr, entry.attributes.inode) == entry.attributes
        fs.listed(entry)


def test_a_listing_goes_on_after_a_restart_and_after_changes(
    fs: Filesystem, root: str, source: OddSource, index: IndexStore, handles: HandleTable
) -> None:
    for number in range(50):
        write(f"{root}/many/{number}", b"")
    inode = find(fs, "many").inode
    entries = list(run(fs.readdir, inode, 0))
    middle = entries[25]
    os.unlink(f"{root}/many/{os.fsdecode(middle.name)}")
    index.flush()
    again = Filesystem(source, index, handles, TEXTS, FilesystemConfig())
    assert [entry.name for entry in run(again.readdir, inode, middle.cookie)] == [e.name for e in entries[26:]]
    assert again.listing_end(12345) is None


def test_listings_kept_are_bounded(fs: Filesystem, root: str) -> None:
    for number in range(100):
        write(f"{root}/many/{number}/file", b"")
    for entry in run(fs.readdir, find(fs, "many").inode, 0):
        assert names(fs, entry.attributes.inode) == {b"file"}
    assert len(fs._listings) <= 64


def test_what_can_not_be_listed(fs: Filesystem) -> None:
    for path in ("readme", "one/.tensors/m/a"):
        with pytest.raises((NotADirectoryEntryError, NotADirectoryError)):
            run(fs.readdir, find(fs, path).inode, 0)
    for call in (fs.readdir, fs.open):
        with pytest.raises(StaleError):
            run(call, 1 << 50, 0)


def test_an_empty_library(tmp_path: Path, index: IndexStore, handles: HandleTable) -> None:
    (tmp_path / "empty").mkdir()
    source = OddSource(str(tmp_path / "empty"))
    fs = Filesystem(source, index, handles, TEXTS, FilesystemConfig())
    assert names(fs, ROOT_INODE) == set()
    assert fs.listing_end(ROOT_INODE) is None
    assert names(fs, find(fs, ".tensors").inode) == set()
    source.close()


def test_numbers_survive_forgetting_and_a_restart(
    fs: Filesystem, source: OddSource, index: IndexStore, handles: HandleTable
) -> None:
    paths = ["readme", "one", "one/m.safetensors", "one/.tensors", "one/.tensors/m", "one/.tensors/m/a", ".weightfs"]

    def brief(found: Attributes) -> tuple[int, int, int, int]:
        return found.inode, found.mode, found.size, found.ctime_ns

    first = {path: brief(find(fs, path)) for path in paths}
    for inode, *_ in first.values():
        fs.forget(inode, 1000)
    assert {path: brief(run(fs.getattr, inode)) for path, (inode, *_) in first.items()} == first
    index.flush()
    again = Filesystem(source, index, handles, TEXTS, FilesystemConfig())
    assert {path: brief(run(again.getattr, inode)) for path, (inode, *_) in first.items()} == first
    assert {path: brief(find(again, path)) for path in paths} == first
    assert again.library.headers_parsed == 0


def test_a_npy_view_is_what_numpy_loads(fs: Filesystem, handles: HandleTable, tmp_path: Path) -> None:
    found = find(fs, "one/.npy/m/a.npy")
    handles.add(found.inode, 1)
    run(fs.open, found.inode, os.O_RDONLY)
    entry = handles.get(found.inode)
    assert entry is not None
    assert entry.readable is not None
    buffer = bytearray(found.size)
    assert entry.readable.read_into(1, memoryview(buffer), 0) == found.size
    (tmp_path / "a.npy").write_bytes(buffer)
    loaded = np.load(tmp_path / "a.npy")
    assert (loaded.shape, loaded.dtype, loaded.tobytes()) == ((4, 2), np.float32, TENSORS["a"].data)
