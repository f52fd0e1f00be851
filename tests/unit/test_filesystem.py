"""What calls answer, driven without FUSE: names, attributes, listings, extended attributes."""

from __future__ import annotations

import os
import stat
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from tests.helpers.models import model_tensors, tensor, write, write_hub_cache, write_safetensors, write_sharded
from tests.unit.support import Later, OddSource
from weightfs.entries import Attributes
from weightfs.errors import (
    ForbiddenError,
    NoAttributeError,
    NotASymlinkError,
    NotFoundError,
)
from weightfs.filesystem import Filesystem, FilesystemConfig
from weightfs.handles import HandleTable
from weightfs.index.schema import ROOT_INODE
from weightfs.index.store import IndexStore

T = TypeVar("T")
TENSORS = {"a": tensor("F32", (4, 2), 1), "b": tensor("BF16", (3,), 2), "c/d": tensor("U8", (5,), 3)}
TEXTS: dict[bytes, Callable[[], bytes]] = {b"status.json": lambda: b"{}\n", b"metrics": lambda: b"up 1\n"}


def run(call: Callable[..., Awaitable[T]], *arguments: object) -> T:
    async def main() -> T:
        with trio.fail_after(20):
            return await call(*arguments)

    return trio.run(main)


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


def find(fs: Filesystem, path: str) -> Attributes:
    found = run(fs.getattr, ROOT_INODE)
    for name in filter(None, path.split("/")):
        found = run(fs.lookup, found.inode, os.fsencode(name))
    return found


def names(fs: Filesystem, inode: int) -> set[bytes]:
    return {entry.name for entry in run(fs.readdir, inode, 0)}


# The source's own names


def test_attributes_are_the_sources(fs: Filesystem, root: str) -> None:
    os.link(f"{root}/readme", f"{root}/second")
    os.utime(f"{root}/readme", ns=(1_234_567_891, 987_654_321_012))
    for path in ("readme", "second", "one", "one/m.safetensors", ""):
        found, wanted = find(fs, path), os.stat(f"{root}/{path}")
        assert (found.mode, found.nlink, found.uid, found.gid, found.size, found.mtime_ns, found.ctime_ns) == (
            wanted.st_mode, wanted.st_nlink, wanted.st_uid, wanted.st_gid, wanted.st_size, wanted.st_mtime_ns,
            wanted.st_ctime_ns,
        )  # fmt: skip
        assert run(fs.getattr, found.inode) == found
    assert find(fs, "readme").inode == find(fs, "second").inode
    assert find(fs, "").inode == ROOT_INODE


def test_a_name_that_is_not_there(fs: Filesystem, root: str) -> None:
    for path in ("nothing", "one/nothing", "x" * 255, "one/.weightfs"):
        with pytest.raises(NotFoundError):
            find(fs, path)
    write(f"{root}/nothing", b"now it is")
    assert find(fs, "nothing").size == 9


def test_below_a_file_there_is_nothing(fs: Filesystem, source: OddSource) -> None:
    readme = find(fs, "readme")
    for source.immediate in (True, False):
        for name in (b"x", b".tensors"):
            with pytest.raises((NotFoundError, NotADirectoryError)):
                run(fs.lookup, readme.inode, name)


def test_symlinks(fs: Filesystem, root: str) -> None:
    os.symlink("readme", f"{root}/relative")
    os.symlink(f"{root}/readme", f"{root}/one/absolute")
    os.symlink("/etc/passwd", f"{root}/out")
    assert run(fs.readlink, find(fs, "relative").inode) == b"readme"
    absolute = find(fs, "one/absolute")
    assert run(fs.readlink, absolute.inode) == b"../readme"
    assert absolute.size == len(b"../readme"), "its size is the length of what it shows"
    out = find(fs, "out")
    assert (stat.S_ISLNK(out.mode), out.size) == (True, len("/etc/passwd"))
    with pytest.raises(ForbiddenError):
        run(fs.readlink, out.inode)


@pytest.mark.parametrize("path", ["readme", "one", "one/.tensors", "one/.tensors/m/a", ".weightfs/metrics"])
def test_what_is_no_symlink(fs: Filesystem, path: str) -> None:
    with pytest.raises((NotASymlinkError, OSError)) as caught:
        run(fs.readlink, find(fs, path).inode)
    assert getattr(caught.value, "errno", 22) == 22


# Views


def test_tensors_are_files(fs: Filesystem, root: str) -> None:
    model = os.stat(f"{root}/one/m.safetensors")
    os.chmod(f"{root}/one/m.safetensors", 0o640)
    assert names(fs, find(fs, "one/.tensors").inode) == {b"m"}
    assert names(fs, find(fs, "one/.tensors/m").inode) == {b"a", b"b", b"c%2Fd"}
    assert names(fs, find(fs, "one/.npy/m").inode) == {b"a.npy", b"c%2Fd.npy"}
    for name, one in (("a", TENSORS["a"]), ("b", TENSORS["b"]), ("c%2Fd", TENSORS["c/d"])):
        found = find(fs, f"one/.tensors/m/{name}")
        assert (found.size, found.mode, found.nlink) == (len(one.data), stat.S_IFREG | 0o440, 1)
        assert (found.uid, found.mtime_ns) == (model.st_uid, model.st_mtime_ns)
        assert run(fs.getattr, found.inode) == found
    npy = find(fs, "one/.npy/m/a.npy")
    assert npy.size > len(TENSORS["a"].data)
    assert npy.size % 64 == len(TENSORS["a"].data) % 64
    for path in ("one/.tensors/m/none", "one/.tensors/none", "one/.npy/m/b.npy", "one/.npy/m/a", ".tensors/m"):
        with pytest.raises(NotFoundError):
            find(fs, path)


def test_view_folders_have_the_rights_of_their_folder_and_sets_of_their_files(fs: Filesystem, root: str) -> None:
    os.chmod(f"{root}/one", 0o750)
    for path, mode in (("one/.tensors", 0o550), ("one/.npy", 0o550), ("one/.tensors/m", 0o555)):
        found = find(fs, path)
        assert found.mode == stat.S_IFDIR | mode
        assert found.uid == os.stat(f"{root}/one").st_uid
        assert run(fs.getattr, found.inode) == found


def test_a_sharded_model_is_one_folder(fs: Filesystem) -> None:
    assert len(names(fs, find(fs, "llama/.tensors/model").inode)) == len(model_tensors(2))


def test_the_hub_cache_has_views(fs: Filesystem, root: str) -> None:
    snapshot = os.path.relpath(write_hub_cache(root, TENSORS), root)
    found = find(fs, f"{snapshot}/.tensors/model/a")
    assert found.size == len(TENSORS["a"].data)
    assert run(fs.getxattr, found.inode, b"user.weightfs.file") == b"model.safetensors"


def test_the_three_names_are_in_no_listing(fs: Filesystem, source: OddSource) -> None:
    assert names(fs, ROOT_INODE) == {b"readme", b"one", b"llama"}
    assert names(fs, find(fs, "one").inode) == {b"m.safetensors"}
    assert find(fs, ".weightfs").mode & 0o170000 == stat.S_IFDIR
    assert names(fs, find(fs, ".weightfs").inode) == {b"status.json", b"metrics"}


@pytest.mark.parametrize("name", [".tensors", ".npy", ".weightfs"])
def test_a_real_entry_of_that_name_wins(fs: Filesystem, root: str, name: str) -> None:
    virtual = find(fs, name)
    write(f"{root}/{name}/real", b"mine")
    assert find(fs, f"{name}/real").size == 4
    assert find(fs, name).inode != virtual.inode
    os.unlink(f"{root}/{name}/real")
    os.rmdir(f"{root}/{name}")
    assert find(fs, name).inode == virtual.inode


def test_live_state(fs: Filesystem) -> None:
    status = find(fs, ".weightfs/status.json")
    assert status.mode == stat.S_IFREG | 0o444
    assert status.size >= 3, "a bound: who goes by it gets the text in one READ"
    with pytest.raises(NotFoundError):
        find(fs, ".weightfs/none")
    with pytest.raises(NotFoundError):
        run(fs.lookup, status.inode, b"status.json")


# Extended attributes


def test_views_tell_of_themselves(fs: Filesystem) -> None:
    inode = find(fs, "llama/.tensors/model/model.layers.1.mlp.up_proj.weight").inode
    got = {name: run(fs.getxattr, inode, name) for name in run(fs.listxattr, inode)}
    file = got.pop(b"user.weightfs.file").decode()
    offset = int(got.pop(b"user.weightfs.offset"))
    assert got == {
        b"user.weightfs.dtype": b"F32",
        b"user.weightfs.shape": b"64,32",
        b"user.weightfs.layer": b"1",
        b"user.weightfs.nbytes": b"8192",
    }
    with open(os.path.join(fs._source.name, "llama", file), "rb") as shard:
        wanted = model_tensors(2)["model.layers.1.mlp.up_proj.weight"].data
        assert os.pread(shard.fileno(), 8192, offset) == wanted
    embedding = find(fs, "llama/.tensors/model/model.embed_tokens.weight").inode
    assert run(fs.getxattr, embedding, b"user.weightfs.layer") == b""
    with pytest.raises(NoAttributeError):
        run(fs.getxattr, inode, b"user.weightfs.none")


def test_source_attributes_pass_and_virtual_folders_have_none(fs: Filesystem, root: str) -> None:
    os.setxattr(f"{root}/readme", "user.x", b"y")
    readme = find(fs, "readme").inode
    assert run(fs.getxattr, readme, b"user.x") == b"y"
    assert b"user.x" in run(fs.listxattr, readme)
    for path in ("one/.tensors", "one/.npy/m", ".weightfs", ".weightfs/metrics"):
        inode = find(fs, path).inode
        assert run(fs.listxattr, inode) == []
        with pytest.raises(NoAttributeError):
            run(fs.getxattr, inode, b"user.x")


def test_statfs(fs: Filesystem, root: str) -> None:
    assert run(fs.statfs).f_blocks == os.statvfs(root).f_blocks
