"""Opens, and sources that do not answer; without FUSE."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from tests.helpers.models import write, write_safetensors
from tests.unit.support import Later, OddSource, open_descriptors
from tests.unit.test_filesystem import TEXTS, find, run
from tests.unit.test_filesystem_changes import SHORT, TENSORS, opened, read
from weightfs.entries import Opened
from weightfs.errors import (
    DeadlineError,
    EntryError,
    IsADirectoryEntryError,
    ReadOnlyError,
    UnsupportedError,
)
from weightfs.filesystem import Filesystem, FilesystemConfig
from weightfs.handles import HandleTable
from weightfs.index.schema import ROOT_INODE
from weightfs.index.store import IndexStore
from weightfs.readables import WholeFile


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


# Opening


def test_an_open_file_reads(fs: Filesystem, handles: HandleTable) -> None:
    readme, view = find(fs, "readme"), find(fs, "one/.tensors/m/a")
    assert opened(fs, readme.inode) == Opened(keep_cache=False)
    assert opened(fs, view.inode) == Opened(keep_cache=True)
    assert read(fs, readme.inode) == b"hello"
    assert read(fs, view.inode) == TENSORS["a"].data
    entry, of_view = handles.get(readme.inode), handles.get(view.inode)
    assert entry is not None
    assert isinstance(entry.readable, WholeFile)
    assert entry.backing_fd is not None
    assert of_view is not None
    assert of_view.backing_fd is None, "a view has no place that the kernel could read by itself"
    assert fs.opens == 2


def test_the_cache_is_kept_while_the_content_is_the_same(fs: Filesystem, root: str) -> None:
    inode = find(fs, "readme").inode
    assert [opened(fs, inode).keep_cache for _ in range(3)] == [False, True, True]
    write(f"{root}/readme", b"other")
    assert [opened(fs, inode).keep_cache for _ in range(2)] == [False, True]


def test_opening_twice_keeps_one_descriptor(fs: Filesystem, handles: HandleTable) -> None:
    inode = find(fs, "readme").inode
    before = open_descriptors()
    for handle in range(5):
        opened(fs, inode, handle)
    assert len(open_descriptors()) == len(before) + 1
    for handle in range(5):
        handles.discard(inode, handle)
    assert open_descriptors() == before


def test_an_open_that_was_given_up_keeps_nothing(fs: Filesystem) -> None:
    for path in ("readme", "one/.tensors/m/a"):
        inode = find(fs, path).inode
        before = open_descriptors()
        run(fs.open, inode, os.O_RDONLY)  # its handle has been discarded: nobody will release it
        assert open_descriptors() == before


def test_live_state_is_read_whole_by_each(fs: Filesystem) -> None:
    inode = find(fs, ".weightfs/metrics").inode
    assert opened(fs, inode) == Opened(keep_cache=False, direct=True)
    assert read(fs, inode) == b"up 1\n"


@pytest.mark.parametrize(
    "flags", [os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_WRONLY | os.O_APPEND, os.O_ACCMODE]
)
@pytest.mark.parametrize("path", ["readme", "one/.tensors/m/a", ".weightfs/metrics"])
def test_writing_is_refused(fs: Filesystem, flags: int, path: str) -> None:
    inode = find(fs, path).inode
    with pytest.raises(ReadOnlyError):
        run(fs.open, inode, flags)


@pytest.mark.parametrize("path", ["", "one", "one/.tensors", "one/.tensors/m", ".weightfs"])
def test_folders_are_not_opened_as_files(fs: Filesystem, path: str) -> None:
    with pytest.raises((IsADirectoryEntryError, UnsupportedError)):
        run(fs.open, find(fs, path).inode, os.O_RDONLY)


def test_a_fifo_is_shown_and_not_opened(fs: Filesystem, root: str) -> None:
    os.mkfifo(f"{root}/fifo")
    with pytest.raises(UnsupportedError):
        run(fs.open, find(fs, "fifo").inode, os.O_RDONLY)


# A source that does not answer

CALLS: dict[str, Callable[[Filesystem], object]] = {
    "lookup": lambda fs: run(fs.lookup, ROOT_INODE, b"readme"),
    "getattr": lambda fs: run(fs.getattr, ROOT_INODE),
    "readdir": lambda fs: run(fs.readdir, ROOT_INODE, 0),
    "statfs": lambda fs: run(fs.statfs),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_source_that_does_not_answer_is_a_deadline(
    source: OddSource, index: IndexStore, handles: HandleTable, call: Callable[[Filesystem], object]
) -> None:
    fs = Filesystem(source, index, handles, TEXTS, SHORT)
    source.immediate = False
    source.gate.clear()
    with pytest.raises(DeadlineError, match=rf"within {SHORT.deadline_s} s"):
        call(fs)
    source.gate.set()
    call(fs)


def test_others_go_on_while_the_source_holds_one(source: OddSource, index: IndexStore, handles: HandleTable) -> None:
    fs = Filesystem(source, index, handles, TEXTS, SHORT)
    source.gate.clear()

    async def main() -> None:
        async with trio.open_nursery() as nursery:

            async def stuck() -> None:
                with pytest.raises(DeadlineError):
                    await fs.statfs()

            nursery.start_soon(stuck)
            await trio.to_thread.run_sync(source.waiting.acquire)
            assert (await fs.lookup(ROOT_INODE, b"readme")).size == 5  # from the kernel's cache

    trio.run(main)


def test_a_caller_that_is_cancelled_is_cancelled(fs: Filesystem, source: OddSource) -> None:
    source.gate.clear()

    async def main() -> None:
        with trio.move_on_after(0.05) as scope:
            await fs.statfs()
        assert scope.cancelled_caught

    trio.run(main)


def test_an_open_answered_too_late_keeps_no_descriptor(
    source: OddSource, index: IndexStore, handles: HandleTable
) -> None:
    fs = Filesystem(source, index, handles, TEXTS, SHORT)
    inode = find(fs, "readme").inode
    before = open_descriptors()
    source.immediate = False
    source.gate.clear()

    async def main() -> None:
        handles.add(inode, 1)
        with pytest.raises(DeadlineError):
            await fs.open(inode, os.O_RDONLY)
        handles.discard(inode, 1)
        source.gate.set()
        # All threads have ended when all their tokens can be had.
        async with trio.open_nursery() as nursery:
            for _ in range(SHORT.threads):
                nursery.start_soon(fs._asking.wait, source.lstat, b"")

    trio.run(main)
    gc.collect()
    left = [os.readlink(f"/proc/self/fd/{fd}") for fd in open_descriptors() - before]
    assert not any(path.endswith("/readme") for path in left), left


def test_failures_of_the_source_pass_through(
    fs: Filesystem, source: OddSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    for name in ("entries", "statvfs", "lstat"):
        monkeypatch.setattr(source, name, broken)
    for call in CALLS.values():
        with pytest.raises(OSError, match="Input/output") as caught:
            call(fs)
        assert not isinstance(caught.value, EntryError)
