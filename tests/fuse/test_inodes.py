"""Inode numbers: stable for the same file, across names, changes and mounts; what a second mount need not do again."""

from __future__ import annotations

import ctypes
import os
import random
from pathlib import Path

import pytest

from tests.helpers.models import (
    every_dtype,
    every_quantisation,
    model_tensors,
    write,
    write_gguf,
    write_safetensors,
    write_sharded,
)
from tests.helpers.mounting import Mounter, both_engines, wait_until, wait_until_settled


def numbers(root: str, *, views: bool = False) -> dict[str, int]:
    found = {".": os.stat(root).st_ino}
    for folder, folders, files in os.walk(root):
        if views and folder == root:
            folders += [".tensors", ".npy"]
        for name in folders + files:
            path = os.path.join(folder, name)
            found[os.path.relpath(path, root)] = os.lstat(path).st_ino
    return found


@both_engines
def test_numbers_survive_the_mount(tmp_path: Path, mounter: Mounter, engine: str) -> None:
    source, state = f"{tmp_path}/source", f"{tmp_path}/state"
    shards = write_sharded(f"{source}", model_tensors(3), 2)
    write(f"{source}/deep/er/file", b"x")
    other = write_gguf(f"{source}/deep/quantised.gguf", every_quantisation())
    wait_until_settled(*shards, other)
    with mounter(source, engine, state_dir=state) as mount:
        first = numbers(mount.mountpoint, views=True)
        os.listdir(mount.path("deep/.tensors/quantised"))
        assert mount.live()["headers_parsed"] <= 3, "some of them the crawl has read"
        assert len(set(first.values())) == len(first)
    with mounter(source, engine, state_dir=state) as mount:
        assert numbers(mount.mountpoint, views=True) == first
        os.listdir(mount.path("deep/.tensors/quantised"))
        assert mount.live()["headers_parsed"] == 0
        assert mount.live()["index"]["set_aside"] is None


@both_engines
def test_a_file_keeps_its_number(tmp_path: Path, mounter: Mounter, engine: str) -> None:
    """Through chmod, link, rename, in-place writes: as on the bare folder."""
    write(f"{tmp_path}/file", b"x")
    os.mkdir(f"{tmp_path}/folder")
    mount = mounter(str(tmp_path), engine)
    number = os.stat(mount.path("file")).st_ino
    os.chmod(f"{tmp_path}/file", 0o600)
    os.link(f"{tmp_path}/file", f"{tmp_path}/folder/link")
    with open(f"{tmp_path}/file", "ab") as file:
        file.write(b"more")
    assert os.stat(mount.path("folder/link")).st_ino == number
    wait_until(lambda: os.stat(mount.path("file")).st_nlink == 2, "attributes are fresh")
    assert os.stat(mount.path("file")).st_ino == number
    assert os.path.samefile(mount.path("file"), mount.path("folder/link"))
    os.rename(f"{tmp_path}/file", f"{tmp_path}/folder/renamed")
    assert os.stat(mount.path("folder/renamed")).st_ino == number
    wait_until(lambda: not os.path.exists(mount.path("file")), "the old name goes")
    for name in ("folder/link", "folder/renamed"):
        with open(mount.path(name), "rb") as seen:
            assert seen.read() == b"xmore"


@both_engines
def test_one_of_two_names_removed(tmp_path: Path, mounter: Mounter, engine: str) -> None:
    write(f"{tmp_path}/one", b"x")
    os.link(f"{tmp_path}/one", f"{tmp_path}/two")
    mount = mounter(str(tmp_path), engine)
    assert os.stat(mount.path("two")).st_ino == os.stat(mount.path("one")).st_ino
    os.unlink(f"{tmp_path}/one")
    wait_until(lambda: not os.path.exists(mount.path("one")), "gone")
    for _ in range(3):
        with open(mount.path("two"), "rb") as file:
            assert file.read() == b"x"
            assert os.fstat(file.fileno()).st_size == 1


@both_engines
def test_real_entries_win_over_the_mounts_own(tmp_path: Path, mounter: Mounter, engine: str) -> None:
    write(f"{tmp_path}/.tensors", b"a real file")
    write(f"{tmp_path}/.npy/real", b"a real folder")
    write_safetensors(f"{tmp_path}/model.safetensors", every_dtype())
    write(f"{tmp_path}/sub/.weightfs", b"any other folder's")
    mount = mounter(str(tmp_path), engine)
    assert sorted(os.listdir(mount.mountpoint)) == [".npy", ".tensors", "model.safetensors", "sub"]
    with open(mount.path(".tensors"), "rb") as file:
        assert file.read() == b"a real file"
    assert os.listdir(mount.path(".npy")) == ["real"]
    assert os.listdir(mount.path("sub")) == [".weightfs"]


@both_engines
def test_real_state_folder_wins(tmp_path: Path, mounter: Mounter, engine: str) -> None:
    write(f"{tmp_path}/.weightfs/status.json", b"real")
    mount = mounter(str(tmp_path), engine)
    with open(mount.path(".weightfs/status.json"), "rb") as file:
        assert file.read() == b"real"


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, set[str]]:
    root = str(tmp_path_factory.mktemp("crowded"))
    names = {f"{number:05}-{'n' * random.Random(number).randrange(100)}" for number in range(5000)}
    for name in names:
        os.close(os.open(f"{root}/{name}", os.O_WRONLY | os.O_CREAT, 0o644))
    return root, names


@both_engines
def test_crowded_folder_is_listed_completely(crowded: tuple[str, set[str]], mounter: Mounter, engine: str) -> None:
    root, names = crowded
    mount = mounter(root, engine)
    for _ in range(3):
        listed = os.listdir(mount.mountpoint)
        assert len(listed) == 5000
        assert set(listed) == names


class _Dirent(ctypes.Structure):
    _fields_ = [
        ("number", ctypes.c_ulong),
        ("offset", ctypes.c_long),
        ("length", ctypes.c_ushort),
        ("kind", ctypes.c_ubyte),
        ("name", ctypes.c_char * 256),
    ]


@both_engines
def test_positions_in_a_listing_are_stable(crowded: tuple[str, set[str]], mounter: Mounter, engine: str) -> None:
    """telldir, seekdir and rewinddir, also after other files came and went."""
    root, names = crowded
    mount = mounter(root, engine)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.opendir.restype = ctypes.c_void_p
    libc.readdir.restype = ctypes.POINTER(_Dirent)
    libc.telldir.restype = ctypes.c_long
    libc.readdir.argtypes = libc.telldir.argtypes = libc.rewinddir.argtypes = libc.closedir.argtypes = [ctypes.c_void_p]
    libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]
    stream = libc.opendir(os.fsencode(mount.mountpoint))
    assert stream

    def rest() -> list[str]:
        found = []
        while entry := libc.readdir(stream):
            found.append(entry.contents.name.decode())
        return found

    extra = f"{root}/extra"
    try:
        everything = [name for name in rest() if name not in (".", "..")]
        assert set(everything) == names
        libc.rewinddir(stream)
        for _ in range(1234):
            libc.readdir(stream)
        position = libc.telldir(stream)
        following = rest()
        assert 3000 < len(following) < 4000
        libc.seekdir(stream, position)
        assert rest() == following
        with open(extra, "w"):
            pass
        libc.seekdir(stream, position)
        assert [name for name in rest() if name != "extra"] == following
    finally:
        libc.closedir(stream)
        if os.path.exists(extra):
            os.unlink(extra)
