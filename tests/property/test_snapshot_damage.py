"""Whatever becomes of a snapshot's folder, verifying it says CorruptError or MisfitError, and nothing else."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.errors import CheckpointError, CorruptError, MisfitError
from checkpoint.store import Store
from tests.helpers.snapshots import IMAGES, add

FILES = ("manifest.json", *(f"images/{name}" for name in IMAGES))
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="this machine lacks root rights for the tests")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(str(tmp_path_factory.mktemp("store")))


@pytest.fixture
def fresh(store: Store) -> Path:
    return renewed(store)


def renewed(store: Store) -> Path:
    shutil.rmtree(os.path.join(store.path, "warm"), ignore_errors=True)
    return Path(add(store, "warm").folder)


def refuses(store: Store) -> CheckpointError:
    with pytest.raises((CorruptError, MisfitError)) as raised:
        store.verify("warm")
    (listed,) = store.list()
    assert listed.fault is None or isinstance(listed.fault, CorruptError | MisfitError)
    return raised.value


@settings(max_examples=150, deadline=None)
@given(file=st.sampled_from(FILES), at=st.integers(0, 1 << 20), bit=st.integers(0, 7))
def test_a_flipped_bit(store: Store, file: str, at: int, bit: int) -> None:
    path = renewed(store) / file
    content = bytearray(path.read_bytes())
    if not content:
        return
    content[at % len(content)] ^= 1 << bit
    path.write_bytes(content)
    refuses(store)


@settings(max_examples=60, deadline=None)
@given(file=st.sampled_from(FILES), nbytes=st.integers(0, 40_000))
def test_another_length(store: Store, file: str, nbytes: int) -> None:
    path = renewed(store) / file
    if path.stat().st_size == nbytes:
        return
    os.truncate(path, nbytes)
    refuses(store)


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file(store: Store, fresh: Path, file: str) -> None:
    (fresh / file).unlink()
    assert refuses(store).path == str(fresh / file)


@settings(max_examples=60, deadline=None)
@given(
    name=st.binary(min_size=1, max_size=30).filter(lambda name: b"/" not in name and b"\0" not in name),
    folder=st.sampled_from([b".", b"images"]),
)
def test_an_extra_file(store: Store, name: bytes, folder: bytes) -> None:
    path = os.path.join(os.fsencode(renewed(store)), folder, name)
    if os.path.lexists(path):
        return
    with open(path, "wb"):
        pass
    refuses(store)


def to_symlink(path: Path) -> None:
    store = path.parents[2] if path.parent.name == "images" else path.parents[1]
    moved = path.rename(store.parent / "moved")
    path.symlink_to(moved)


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def to_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def to_socket(path: Path) -> None:
    path.unlink()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        path.chmod(0o600)


@pytest.mark.parametrize("become", [to_symlink, to_folder, to_fifo, to_socket], ids=lambda one: one.__name__)
@pytest.mark.parametrize("file", FILES)
def test_a_file_of_another_kind(
    tmp_path_factory: pytest.TempPathFactory, file: str, become: Callable[[Path], None]
) -> None:
    store = Store(str(tmp_path_factory.mktemp("kinds") / "store"))
    become(Path(add(store, "warm").folder, file))
    refuses(store)


def test_symlinked_folders(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    made = add(store, "warm")
    os.rename(made.images, tmp_path / "images")
    os.symlink(tmp_path / "images", made.images)
    refuses(store)
    os.unlink(made.images)
    os.rename(tmp_path / "images", made.images)
    store.verify("warm")
    os.rename(made.folder, tmp_path / "warm")
    os.symlink(tmp_path / "warm", made.folder)
    refuses(store)


def test_under_another_name(store: Store, fresh: Path) -> None:
    fresh.rename(fresh.parent / "other")
    try:
        with pytest.raises(CorruptError, match="snapshot warm"):
            store.open("other")
    finally:
        shutil.rmtree(fresh.parent / "other")


@pytest.mark.parametrize("path", ["", "manifest.json", "images", "images/pages-1.img"])
@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_what_others_may_write(store: Store, fresh: Path, path: str, mode: int) -> None:
    (fresh / path).chmod(mode)
    error = refuses(store)
    assert error.path == str(fresh / path)
    assert "may be written by others" in str(error)


@needs_root
@pytest.mark.parametrize("path", ["", "manifest.json", "images", "images/pages-1.img"])
def test_what_belongs_to_others(store: Store, fresh: Path, path: str) -> None:
    os.chown(fresh / path, 65534, 65534)
    assert "belongs to user 65534" in str(refuses(store))


@needs_root
def test_a_store_in_a_folder_of_others(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "theirs" / "store"))
    add(store, "warm")
    os.chown(tmp_path / "theirs", 65534, 65534)
    assert str(tmp_path / "theirs") in str(refuses(store))
    os.chown(tmp_path / "theirs", 0, 0)
    os.chmod(tmp_path / "theirs", 0o777)
    refuses(store)
    os.chmod(tmp_path / "theirs", 0o1777)  # as /tmp: nobody else can rename what is ours
    store.verify("warm")
