"""A source that changes under the mount: new, removed, replaced, written in place."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import pytest

from tests.helpers.models import Tensor, model_tensors, tensor, write, write_safetensors
from tests.helpers.mounting import Mounter, both_engines, refused, tolerating, wait_until, wait_until_settled

FRESH_S = 20.0
"""Names and attributes may be old for 1 s."""


def read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


@both_engines
def test_a_file_cut_while_one_has_it_open_is_opened_by_another(tmp_path: Path, mounter: Mounter, engine: str) -> None:
    path = write(str(tmp_path / "source" / "file"), bytes(range(256)) * 100)
    mount = mounter(str(tmp_path / "source"), engine)
    with open(mount.path("file"), "rb", buffering=0) as early:
        assert len(early.read(10)) == 10
        os.truncate(path, 1000)
        wait_until(lambda: os.stat(mount.path("file")).st_size == 1000, "the cut shows")
        with open(mount.path("file"), "rb", buffering=0) as late:
            assert late.readall() == (bytes(range(256)) * 4)[:1000]


@both_engines
def test_new_files_and_folders_appear(tmp_path: Path, mounter: Mounter, engine: str) -> None:
    source = str(tmp_path)
    write(f"{source}/first", b"1")
    mount = mounter(source, engine)
    assert os.listdir(mount.mountpoint) == ["first"]
    assert not os.path.exists(mount.path("second"))
    write(f"{source}/second", b"2")
    write(f"{source}/folder/third", b"3")
    wait_until(
        lambda: sorted(os.listdir(mount.mountpoint)) == ["first", "folder", "second"], "listed", timeout_s=FRESH_S
    )
    wait_until(lambda: os.path.exists(mount.path("second")), "found", timeout_s=FRESH_S)
    assert read(mount.path("folder", "third")) == b"3"


@both_engines
def test_removed_files_go(tmp_path: Path, mounter: Mounter, engine: str) -> None:
    source = str(tmp_path)
    write(f"{source}/folder/file", b"1")
    mount = mounter(source, engine)
    assert os.listdir(mount.path("folder")) == ["file"]
    os.unlink(f"{source}/folder/file")
    wait_until(lambda: not os.path.exists(mount.path("folder/file")), "name gone", timeout_s=FRESH_S)
    wait_until(lambda: os.listdir(mount.path("folder")) == [], "listing empty", timeout_s=FRESH_S)
    with pytest.raises(FileNotFoundError):
        read(mount.path("folder", "file"))
    os.rmdir(f"{source}/folder")
    wait_until(lambda: not os.path.exists(mount.path("folder")), "folder gone", timeout_s=FRESH_S)


@both_engines
def test_a_listing_is_never_older_than_a_second(tmp_path: Path, mounter: Mounter, engine: str) -> None:
    """Files made right after a listing, which the folder's times may not tell apart, appear all the same."""
    mount = mounter(str(tmp_path), engine)
    for number in range(2):
        name = f"file-{number}"
        assert name not in os.listdir(mount.mountpoint)
        write(f"{tmp_path}/{name}", b"")
        wait_until(lambda name=name: name in os.listdir(mount.mountpoint), "listed", timeout_s=FRESH_S)  # type: ignore[misc]


@both_engines
def test_replaced_by_rename(tmp_path: Path, mounter: Mounter, engine: str) -> None:
    """A new inode for whoever looks it up, the old bytes for whoever has it open."""
    source, old, new = str(tmp_path), b"old" * 5000, b"newer" * 4000
    write(f"{source}/file", old)
    mount = mounter(source, engine)
    number = os.stat(mount.path("file")).st_ino
    with open(mount.path("file"), "rb") as held, mmap.mmap(held.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        write(f"{source}/.new", new)
        os.rename(f"{source}/.new", f"{source}/file")
        wait_until(lambda: os.stat(mount.path("file")).st_ino != number, "new inode", timeout_s=FRESH_S)
        assert read(mount.path("file")) == new
        assert os.stat(mount.path("file")).st_size == len(new)
        assert held.read() == old
        assert mapped[:] == old
        seen = os.fstat(held.fileno())
        assert (seen.st_ino, seen.st_size, seen.st_nlink) == (number, len(old), 0)
        assert read(mount.path("file")) == new
    assert read(mount.path("file")) == new


@both_engines
def test_replaced_at_once_never_mixes(tmp_path: Path, mounter: Mounter, engine: str) -> None:
    """Opens around a replacement give one content or the other, whole."""
    source = str(tmp_path)
    write(f"{source}/file", b"\0" * 10_000)
    mount = mounter(source, engine)
    for number in range(1, 40):
        content = bytes([number]) * (10_000 + number)
        write(f"{source}/.new", content)
        os.rename(f"{source}/.new", f"{source}/file")
        seen = read(mount.path("file"))
        assert len(set(seen)) == 1
        assert len(seen) == 10_000 + seen[0]


@both_engines
def test_folder_replaced(tmp_path: Path, mounter: Mounter, engine: str) -> None:
    source = str(tmp_path)
    write(f"{source}/model/file", b"old")
    write(f"{source}/next/file", b"new")
    mount = mounter(source, engine)
    assert read(mount.path("model/file")) == b"old"
    os.rename(f"{source}/model", f"{source}/previous")
    os.rename(f"{source}/next", f"{source}/model")
    wait_until(lambda: read(mount.path("model/file")) == b"new", "new folder", timeout_s=FRESH_S)
    assert read(mount.path("previous/file")) == b"old"
    wait_until(lambda: sorted(os.listdir(mount.mountpoint)) == ["model", "previous"], "names", timeout_s=FRESH_S)


@both_engines
def test_folder_becomes_a_symlink_out_of_the_source(tmp_path: Path, mounter: Mounter, engine: str) -> None:
    source = f"{tmp_path}/source"
    write(f"{source}/model/file", b"inside")
    write(f"{tmp_path}/outside/file", b"outside")
    mount = mounter(source, engine)
    assert read(mount.path("model/file")) == b"inside"
    os.rename(f"{source}/model", f"{source}/moved")
    os.symlink(f"{tmp_path}/outside", f"{source}/model")

    def refused() -> bool:
        try:
            assert read(mount.path("model/file")) == b"inside"
        except OSError as e:
            return e.errno == errno.EACCES
        return False

    wait_until(refused, "the link does not resolve", timeout_s=FRESH_S)


@both_engines
def test_written_in_place(tmp_path: Path, mounter: Mounter, engine: str) -> None:
    """Open handles see the new bytes as on the bare file, and status says so; the inode stays."""
    source = str(tmp_path)
    write(f"{source}/folder/file", b"a" * 100_000)
    mount = mounter(source, engine)
    number = os.stat(mount.path("folder/file")).st_ino
    with open(mount.path("folder/file"), "rb", buffering=0) as held:
        assert os.pread(held.fileno(), 10, 50_000) == b"a" * 10
        assert mount.live()["changed_in_place"] == []
        with open(f"{source}/folder/file", "r+b") as file:
            file.seek(50_000)
            file.write(b"b" * 10)
        if engine == "passthrough":
            assert os.pread(held.fileno(), 10, 50_000) == b"b" * 10
        assert mount.live()["changed_in_place"] == ["folder/file"]
        assert mount.status()["changed_in_place"] == ["folder/file"]
        assert os.stat(mount.path("folder/file")).st_ino == number
        wait_until(lambda: b"b" * 10 in read(mount.path("folder/file")), "new open sees it", timeout_s=FRESH_S)
    assert read(mount.path("folder/file"))[50_000:50_010] == b"b" * 10


@both_engines
def test_mapped_and_written_in_place(tmp_path: Path, mounter: Mounter, engine: str) -> None:
    write(f"{tmp_path}/file", b"a" * 8192)
    mount = mounter(str(tmp_path), engine)
    with open(mount.path("file"), "rb") as held, mmap.mmap(held.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[5000] == ord("a")
        with open(f"{tmp_path}/file", "r+b") as file:
            file.seek(5000)
            file.write(b"b")
        if engine == "passthrough":
            assert mapped[5000] == ord("b")


@both_engines
def test_grown_and_cut(tmp_path: Path, mounter: Mounter, engine: str) -> None:
    path = write(f"{tmp_path}/file", b"a" * 5000)
    mount = mounter(str(tmp_path), engine)
    assert read(mount.path("file")) == b"a" * 5000
    with open(path, "ab") as file:
        file.write(b"b" * 5000)
    wait_until(lambda: os.stat(mount.path("file")).st_size == 10_000, "grown", timeout_s=FRESH_S)
    assert read(mount.path("file")) == b"a" * 5000 + b"b" * 5000
    os.truncate(path, 100)
    wait_until(lambda: os.stat(mount.path("file")).st_size == 100, "cut", timeout_s=FRESH_S)
    assert read(mount.path("file")) == b"a" * 100


@both_engines
def test_cut_under_an_open_handle_gives_no_made_up_bytes(tmp_path: Path, mounter: Mounter, engine: str) -> None:
    path = write(f"{tmp_path}/file", b"a" * 1_000_000)
    mount = mounter(str(tmp_path), engine)
    with open(mount.path("file"), "rb", buffering=0) as held:
        assert os.pread(held.fileno(), 10, 0) == b"a" * 10
        os.truncate(path, 5000)
        with tolerating(errno.ESTALE, errno.EIO):
            assert b"\0" not in os.pread(held.fileno(), 4096, 900_000)
    wait_until(lambda: os.stat(mount.path("file")).st_size == 5000, "cut", timeout_s=FRESH_S)
    assert read(mount.path("file")) == b"a" * 5000


def replaced(old: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor(one.dtype, one.shape, 7000 + at) for at, (name, one) in enumerate(old.items())}


@both_engines
@pytest.mark.parametrize("how", ["rename", "in place"])
def test_views_of_changed_files_are_stale(tmp_path: Path, mounter: Mounter, engine: str, how: str) -> None:
    """Whoever has a view open hears ESTALE, a new look-up gives the new content: never a mixture."""
    path, old = f"{tmp_path}/model.safetensors", model_tensors(2, rows=20_000)
    write_safetensors(path, old)
    wait_until_settled(path)
    mount = mounter(str(tmp_path), engine)
    view = mount.path(".tensors/model/lm_head.weight")
    held = os.open(view, os.O_RDONLY)
    try:
        assert os.pread(held, 4096, 0) == old["lm_head.weight"].data[:4096]
        number = os.fstat(held).st_ino
        new = replaced(old)
        if how == "rename":
            write_safetensors(f"{tmp_path}/next", new)
            os.rename(f"{tmp_path}/next", path)
        else:
            write_safetensors(path, new)
        with refused(errno.ESTALE):
            os.pread(held, 4096, 2_000_000)
        wait_until(lambda: read(view) == new["lm_head.weight"].data, "new content", timeout_s=FRESH_S)
        assert os.stat(view).st_ino != number
    finally:
        os.close(held)


@both_engines
def test_rewritten_again_and_again_views_are_never_a_mixture(tmp_path: Path, mounter: Mounter, engine: str) -> None:
    """Within the 2 s in which times can't tell contents apart as well."""
    path = f"{tmp_path}/model.safetensors"
    write_safetensors(path, {"t": Tensor("U8", (50_000,), b"\0" * 50_000)})
    mount = mounter(str(tmp_path), engine)
    view = mount.path(".tensors/model/t")
    good = 0
    for number in range(1, 60):
        data = bytes([number]) * (50_000 + number)
        write_safetensors(f"{tmp_path}/next", {"t": Tensor("U8", (len(data),), data)})
        os.rename(f"{tmp_path}/next", path)
        with tolerating(errno.ESTALE, errno.ENOENT):
            seen = read(view)
            assert len(set(seen)) == 1
            assert len(seen) == 50_000 + seen[0]
            good += 1
    assert good
    wait_until(lambda: read(view) == data, "last content", timeout_s=FRESH_S)
