"""Symlinks, extended attributes and keys of a folder as the source."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from weightfs import linux
from weightfs.errors import ForbiddenError
from weightfs.source.local import LocalSource


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_bytes(b"secret")
    folder = tmp_path / "source"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "file").write_bytes(b"content")
    (folder / "top").write_bytes(b"top")
    return folder


@pytest.fixture
def source(root: Path) -> Iterator[LocalSource]:
    opened = LocalSource(str(root))
    yield opened
    opened.close()


def place(path: Path, target: str) -> bytes:
    path.symlink_to(target)
    return os.fsencode(path.name)


# readlink


@pytest.mark.parametrize("target", ["top", "./top", "a/../top", "a//file", "nowhere", ".", "a/b/../../top", "link"])
def test_a_relative_target_inside_is_shown_as_it_is(source: LocalSource, root: Path, target: str) -> None:
    assert source.readlink(place(root / "link", target)) == os.readlink(os.fsencode(root / "link"))


@pytest.mark.parametrize(
    ("link", "target", "shown"),
    [
        ("link", "{root}/top", b"top"),
        ("link", "{root}/a/file", b"a/file"),
        ("a/b/link", "{root}/top", b"../../top"),
        ("a/b/link", "{root}/a/file", b"../file"),
        ("a/b/link", "{root}", b"../.."),
        ("link", "{root}", b"."),
        ("link", "{root}/nowhere", b"nowhere"),
    ],
)
def test_an_absolute_target_inside_is_shown_relative(
    source: LocalSource, root: Path, link: str, target: str, shown: bytes
) -> None:
    (root / link).symlink_to(target.format(root=root))
    assert source.readlink(os.fsencode(link)) == shown


@pytest.mark.parametrize(
    "target",
    [
        "..",
        "../outside/secret",
        "a/../../outside",
        "{outside}/secret",
        "/",
        "/etc/passwd",
        "{root}x",
        "{root}/../outside",
    ],
)
def test_a_target_outside_is_refused(source: LocalSource, root: Path, tmp_path: Path, target: str) -> None:
    name = place(root / "link", target.format(root=root, outside=tmp_path / "outside"))
    with pytest.raises(ForbiddenError) as caught:
        source.readlink(name)
    assert caught.value.path == "link"


def test_a_target_that_leaves_and_comes_back_does_not_name_the_source(source: LocalSource, root: Path) -> None:
    """`../source/top` is inside on the folder; on the mount, `..` is what the mount lies in."""
    name = place(root / "link", "../source/top")
    try:
        shown = source.readlink(name)
    except ForbiddenError:
        return
    assert os.path.normpath(shown) == b"top"


def test_a_target_through_a_symlink_is_resolved_as_the_kernel_does(source: LocalSource, root: Path) -> None:
    """`a/b/up` is the root, so `a/b/up/..` is the folder above the source, though it reads like `a/b`."""
    (root / "a" / "b" / "up").symlink_to("../..")
    name = place(root / "link", "a/b/up/../outside/secret")
    assert os.path.realpath(root / "link").endswith("outside/secret")
    with pytest.raises(ForbiddenError):
        source.readlink(name)


def test_an_absolute_target_through_a_symlink_keeps_its_meaning(source: LocalSource, root: Path) -> None:
    (root / "deep").symlink_to("a/b")
    (root / "file").write_bytes(b"another")
    name = place(root / "link", f"{root}/deep/../file")
    assert (root / "link").read_bytes() == b"content"
    assert (root / os.fsdecode(source.readlink(name))).read_bytes() == b"content"


def test_an_absolute_target_by_the_name_the_user_gave_the_source(root: Path, tmp_path: Path) -> None:
    """/srv/models may be a symlink to a disk, and its own links say /srv/models."""
    (tmp_path / "models").symlink_to("source")
    name = place(root / "link", f"{tmp_path}/models/a/file")
    opened = LocalSource(str(tmp_path / "models"))
    try:
        assert opened.readlink(name) == b"a/file"
    finally:
        opened.close()


def test_readlink_of_something_else(source: LocalSource) -> None:
    for path, number in ((b"top", errno.EINVAL), (b"a", errno.EINVAL), (b"nowhere", errno.ENOENT)):
        with pytest.raises(OSError) as caught:  # noqa: PT011 - the number is looked at
            source.readlink(path)
        assert caught.value.errno == number, path


# follow


@pytest.mark.parametrize(
    ("path", "landing"),
    [
        ("top", b"top"),
        ("a/file", b"a/file"),
        ("", b""),
        ("rel", b"a/file"),
        ("abs", b"a/file"),
        ("chain", b"a/file"),
        ("folder/file", b"a/file"),
        ("root", b""),
        ("out", None),
        ("outdir/secret", None),
        ("loop", None),
        ("nowhere", None),
        ("dangling", None),
        ("back", b"top"),
        ("neighbour", None),
    ],
)
def test_follow(source: LocalSource, root: Path, tmp_path: Path, path: str, landing: bytes | None) -> None:
    (tmp_path / "source2").mkdir()
    (tmp_path / "source2" / "file").write_bytes(b"")
    links = {
        "rel": "a/file",
        "abs": f"{root}/a/file",
        "chain": "rel",
        "folder": "a",
        "root": ".",
        "out": "../outside/secret",
        "outdir": str(tmp_path / "outside"),
        "loop": "loop",
        "dangling": "nowhere",
        "back": "../source/top",
        "neighbour": "../source2/file",
    }
    for name, target in links.items():
        (root / name).symlink_to(target)
    assert source.follow(os.fsencode(path)) == landing


# Extended attributes


def test_extended_attributes_are_the_files(source: LocalSource, root: Path) -> None:
    os.setxattr(root / "top", "user.origin", b"hub\x00\xff")
    os.setxattr(root / "a", "user.kind", b"folder")
    assert source.getxattr(b"top", b"user.origin") == b"hub\x00\xff"
    assert b"user.origin" in source.listxattr(b"top")
    assert source.getxattr(b"a", b"user.kind") == b"folder"
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the number is looked at
        source.getxattr(b"top", b"user.none")
    assert caught.value.errno == errno.ENODATA


def test_a_symlinks_extended_attributes_are_its_own(source: LocalSource, root: Path) -> None:
    if not linux.has_capability(linux.CAP_SYS_ADMIN):
        pytest.skip("no CAP_SYS_ADMIN: a symlink can have none")
    name = place(root / "link", "top")
    os.setxattr(root / "top", "user.origin", b"of the target")
    os.setxattr(root / "link", "trusted.mark", b"of the link", follow_symlinks=False)
    assert source.listxattr(name) == [os.fsencode(n) for n in os.listxattr(root / "link", follow_symlinks=False)]
    assert source.getxattr(name, b"trusted.mark") == b"of the link"
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the number is looked at
        source.getxattr(name, b"user.origin")
    assert caught.value.errno in (errno.ENODATA, errno.EPERM)


def test_a_dangling_symlink_has_attributes_to_ask_for(source: LocalSource, root: Path) -> None:
    name = place(root / "link", "nowhere")
    assert source.listxattr(name) == [os.fsencode(n) for n in os.listxattr(root / "link", follow_symlinks=False)]


# Keys


def chmod(path: Path) -> Path:
    os.chmod(path, 0o600)
    return path


def chown(path: Path) -> Path:
    os.chown(path, os.getuid(), os.getgid())
    return path


def rename(path: Path) -> Path:
    return path.rename(path.parent / "renamed")


def move(path: Path) -> Path:
    return path.rename(path.parent / "a" / "moved")


def link(path: Path) -> Path:
    os.link(path, path.parent / "second")
    return path.parent / "second"


def write_in_place(path: Path) -> Path:
    with open(path, "r+b") as file:
        file.write(b"TOP!")
    return path


def touch(path: Path) -> Path:
    os.utime(path, ns=(5, 5))
    return path


def shorten(path: Path) -> Path:
    os.truncate(path, 1)
    return path


KEEPING: list[Callable[[Path], Path]] = [chmod, chown, rename, move, link, write_in_place, touch, shorten]


@pytest.mark.parametrize("change", KEEPING)
def test_a_files_key_lasts_and_its_identity_tells_of_changes(
    source: LocalSource, root: Path, change: Callable[[Path], Path]
) -> None:
    before = source.lstat(b"top")
    now = source.lstat(os.fsencode(change(root / "top").relative_to(root)))
    assert now.inode_key == before.inode_key
    assert now.identity != before.identity
    assert len(now.inode_key) == len(now.identity) == 16


def test_a_file_in_anothers_place_has_another_key(source: LocalSource, root: Path) -> None:
    before = source.lstat(b"top")
    (root / "new").write_bytes(b"top")
    os.utime(root / "new", ns=(before.atime_ns, before.mtime_ns))
    os.replace(root / "new", root / "top")
    after = source.lstat(b"top")
    assert after.inode_key != before.inode_key
    assert after.identity != before.identity


def test_a_recycled_inode_number_has_another_key(source: LocalSource, root: Path) -> None:
    """ext4 gives a freed number to the next file: the birth time tells them apart."""
    keys = set()
    for _ in range(20):
        (root / "new").write_bytes(b"")
        keys.add(source.lstat(b"new").inode_key)
        (root / "new").unlink()
    assert len(keys) == 20


def test_another_source_object_gives_the_same_keys(source: LocalSource, root: Path) -> None:
    place(root / "link", "top")
    os.mkfifo(root / "fifo")
    paths = [b"link", b"fifo", b"", b"a", b"a/file"]
    first = {path: source.lstat(path).inode_key for path in paths}
    for order in (paths, paths[::-1]):
        again = LocalSource(str(root))
        assert {path: again.lstat(path).inode_key for path in order} == first
        again.close()
    assert {path: source.lstat(path).inode_key for path in paths} == first


def test_a_source_seen_from_a_folder_below_gives_the_same_keys(source: LocalSource, root: Path) -> None:
    below = LocalSource(str(root / "a"))
    assert below.lstat(b"file").inode_key == source.lstat(b"a/file").inode_key
    below.close()
