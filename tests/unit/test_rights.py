"""Owner, mode and access list of a set's folder."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.users import GROUP_OBJ, MASK, OTHER, USER, USER_OBJ, access_list
from weightfs.rights import Rights, rights_of
from weightfs.source.local import LocalSource

WHOEVER_SERVES = Rights(os.geteuid(), os.getegid(), 0o500)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir(mode=0o755)
    (tmp_path / "blobs").mkdir(mode=0o755)
    return tmp_path


@pytest.fixture
def source(root: Path) -> Iterator[LocalSource]:
    opened = LocalSource(str(root))
    yield opened
    opened.close()


def put(path: Path, mode: int, uid: int = 10, gid: int = 20) -> Path:
    if not path.exists():
        path.touch()
    os.chown(path, uid, gid)
    path.chmod(mode)
    return path


def entries(data: bytes | None) -> dict[int, int]:
    assert data is not None
    return {tag: bits for tag, bits, _ in struct.iter_unpack("<HHI", data[4:])}


def rights(source: LocalSource, *names: bytes) -> Rights | None:
    return rights_of(source, b"model", names)


def test_what_everyone_may_read_asks_for_nothing(root: Path, source: LocalSource) -> None:
    put(root / "model" / "a", 0o644)
    put(root / "model" / "b", 0o444, uid=11)
    put(root / "blobs" / "c", 0o755)
    (root / "model" / "c").symlink_to("../blobs/c")
    assert rights(source, b"a", b"b", b"c", b"gone") is None


def test_the_folder_itself_was_passed_already(root: Path, source: LocalSource) -> None:
    put(root / "model" / "a", 0o644)
    put(root / "model", 0o700)
    assert rights(source, b"a") is None


@pytest.mark.parametrize(("mode", "wanted"), [(0o600, 0o511), (0o640, 0o551), (0o604, 0o515), (0o000, 0o111)])
def test_a_files_readers_may_list_and_everyone_may_enter(
    root: Path, source: LocalSource, mode: int, wanted: int
) -> None:
    put(root / "model" / "a", mode)
    assert rights(source, b"a") == Rights(10, 20, wanted)


def test_files_of_one_owner_are_read_by_who_may_read_all(root: Path, source: LocalSource) -> None:
    put(root / "model" / "a", 0o640)
    put(root / "model" / "b", 0o604)
    put(root / "model" / "c", 0o644, uid=99)
    assert rights(source, b"a", b"b", b"c") == Rights(10, 20, 0o511)


def test_a_folder_on_the_way_is_entered_by_who_may_enter_it(root: Path, source: LocalSource) -> None:
    put(root / "blobs" / "digest", 0o644)
    (root / "model" / "a").symlink_to("../blobs/digest")
    put(root / "blobs", 0o750)
    assert rights(source, b"a") == Rights(10, 20, 0o550)
    put(root / "blobs", 0o744)
    assert rights(source, b"a") == Rights(10, 20, 0o500)
    put(root / "blobs", 0o711)
    assert rights(source, b"a") is None


def test_different_owners_have_no_mode_in_common(root: Path, source: LocalSource) -> None:
    put(root / "model" / "a", 0o640)
    put(root / "model" / "b", 0o640, uid=11)
    assert rights(source, b"a", b"b") == WHOEVER_SERVES


def test_a_list_on_the_one_file_is_kept(root: Path, source: LocalSource) -> None:
    path = put(root / "model" / "a", 0o644)
    access_list(str(path), (USER_OBJ, 6), (USER, 0, 99), (GROUP_OBJ, 4), (MASK, 4), (OTHER, 4))
    found = rights(source, b"a")
    assert found is not None
    assert (found.uid, found.gid, found.mode) == (10, 20, 0o555)
    assert entries(found.access_list) == {USER_OBJ: 5, USER: 1, GROUP_OBJ: 5, MASK: 5, OTHER: 5}


def test_a_list_on_the_one_folder_is_kept(root: Path, source: LocalSource) -> None:
    put(root / "blobs" / "digest", 0o644)
    (root / "model" / "a").symlink_to("../blobs/digest")
    put(root / "blobs", 0o750)
    access_list(str(root / "blobs"), (USER_OBJ, 7), (USER, 4, 99), (GROUP_OBJ, 5), (MASK, 5), (OTHER, 0))
    found = rights(source, b"a")
    assert found is not None
    assert found.mode == 0o550
    assert entries(found.access_list) == {USER_OBJ: 5, USER: 0, GROUP_OBJ: 5, MASK: 5, OTHER: 0}


def test_two_lists_have_nothing_in_common(root: Path, source: LocalSource) -> None:
    for name in ("a", "b"):
        path = put(root / "model" / name, 0o640)
        access_list(str(path), (USER_OBJ, 6), (USER, 0, 99), (GROUP_OBJ, 4), (MASK, 4), (OTHER, 0))
    assert rights(source, b"a", b"b") == WHOEVER_SERVES


def test_a_link_that_leads_out_asks_for_nothing(root: Path, source: LocalSource) -> None:
    (root / "model" / "a").symlink_to("/etc/shadow")
    assert rights(source, b"a") is None
