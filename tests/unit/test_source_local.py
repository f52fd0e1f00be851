"""A folder as the source: nothing outside it, nothing that waits, keys that last."""

from __future__ import annotations

import errno
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.support import open_descriptors, within
from weightfs import linux
from weightfs.errors import UnfitError, UnsupportedError, UsageError
from weightfs.source import local
from weightfs.source.base import Source, SourceStat, WouldBlockError
from weightfs.source.local import LocalSource


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A source beside a folder that is none of it."""
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


def errno_from(function: Callable[[], object]) -> int | None:
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the number is looked at
        function()
    return caught.value.errno


# What it is made of


def test_it_is_a_source(source: Source, root: Path) -> None:
    assert source.name == str(root)
    assert source.lstat(b"").is_directory
    assert source.lstat(b"a/file").is_file
    assert sorted(source.names(b"a")) == [b"b", b"file"]
    assert source.statvfs().f_namemax == os.statvfs(root).f_namemax


def test_a_root_named_by_a_symlink_is_resolved_once(root: Path, tmp_path: Path) -> None:
    (tmp_path / "name").symlink_to("source")
    opened = LocalSource(str(tmp_path / "name"))
    assert opened.name == str(root)
    (tmp_path / "name").unlink()
    (tmp_path / "name").symlink_to("outside")
    assert errno_from(lambda: opened.lstat(b"secret")) == errno.ENOENT
    assert opened.lstat(b"top").size == 3
    opened.close()


@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_a_root_that_is_no_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError) as caught:
        LocalSource(str(tmp_path / name))
    assert caught.value.path == str(tmp_path / name)
    assert caught.value.mend


def test_a_kernel_without_openat2(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_descriptors()

    def missing(*_: object) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(linux, "openat2", missing)
    with pytest.raises(UnfitError, match="openat2"):
        LocalSource(str(root))
    assert open_descriptors() == before


def test_stat_is_the_systems(source: LocalSource, root: Path) -> None:
    os.utime(root / "top", ns=(1_234_567_890_123_456_789, -5_000_000_001))
    os.mknod(root / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3)) if os.geteuid() == 0 else None
    for name in os.listdir(root):
        found, wanted = source.lstat(os.fsencode(name)), os.lstat(root / name)
        assert (found.inode, found.mode, found.nlink, found.uid, found.gid, found.size, found.rdev) == (
            wanted.st_ino,
            wanted.st_mode,
            wanted.st_nlink,
            wanted.st_uid,
            wanted.st_gid,
            wanted.st_size,
            wanted.st_rdev,
        )
        assert (found.atime_ns, found.mtime_ns, found.ctime_ns) == (
            wanted.st_atime_ns,
            wanted.st_mtime_ns,
            wanted.st_ctime_ns,
        )
        assert (found.blocks, found.block_bytes) == (wanted.st_blocks, wanted.st_blksize)


def test_the_birth_time_is_when_it_was_made(source: LocalSource, root: Path) -> None:
    before = time.time_ns()
    (root / "new").write_bytes(b"")
    born = source.lstat(b"new").btime_ns
    assert before - 1_000_000_000 < born < time.time_ns() + 1
    os.utime(root / "new", ns=(1, 1))
    assert source.lstat(b"new").btime_ns == born


def test_entries_are_the_listing(source: LocalSource, root: Path) -> None:
    (root / "link").symlink_to("/nowhere")
    os.mkfifo(root / "fifo")
    raw = os.fsencode(root) + b"/not\xffutf8\n"
    with open(raw, "wb"):
        pass
    found = dict(source.entries(b""))
    assert set(found) == {b"a", b"top", b"link", b"fifo", b"not\xffutf8\n"}
    for name, entry in found.items():
        assert entry == source.lstat(name)
    assert sorted(source.names(b"")) == sorted(found)


def test_an_entry_that_vanishes_while_it_is_listed_is_left_out(
    source: LocalSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda fd: [*listdir(fd), "gone"])
    assert {name for name, _ in source.entries(b"")} == {b"a", b"top"}


# What may wait


def test_cached_only_answers_where_nothing_is_waited_for(source: LocalSource) -> None:
    source._cached_is_immediate = True
    source.lstat(b"a/file")
    assert source.lstat(b"a/file", cached_only=True) == source.lstat(b"a/file")
    fd, entry = source.open(b"a/file", cached_only=True)
    os.close(fd)
    assert entry.size == 7
    with pytest.raises((FileNotFoundError, WouldBlockError)):  # whether absence is cached is the kernel's affair
        source.lstat(b"nowhere", cached_only=True)


@pytest.mark.parametrize("fstype", [0x6969, 0xFF534D42, 0x65735546, 0x01021997, 0x794C7630], ids=hex)
def test_cached_only_refuses_where_a_server_may_be_asked(
    root: Path, fstype: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS, CIFS, FUSE, 9p, overlayfs (whose layers may be any of them)."""
    monkeypatch.setattr(local, "_filesystem_type", lambda _: fstype)
    opened = LocalSource(str(root))
    for call in (opened.lstat, opened.open):
        with pytest.raises(WouldBlockError):
            call(b"top", cached_only=True)
    assert opened.lstat(b"top").size == 3
    opened.close()


def test_cached_only_says_so_when_the_kernel_would_wait(source: LocalSource, monkeypatch: pytest.MonkeyPatch) -> None:
    source._cached_is_immediate = True

    def uncached(*_: object) -> int:
        raise OSError(errno.EAGAIN, "not in the cache")

    monkeypatch.setattr(linux, "openat2", uncached)
    with pytest.raises(WouldBlockError):
        source.lstat(b"top", cached_only=True)
    assert errno_from(lambda: source.lstat(b"top")) == errno.EAGAIN


# What is no file


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


def device(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))


KINDS = [(fifo, "a FIFO"), (unix_socket, "a socket"), (Path.mkdir, "a directory"), (device, "a device")]


@pytest.mark.parametrize(("make", "kind"), KINDS, ids=[kind for _, kind in KINDS])
@pytest.mark.parametrize("cached_only", [False, True])
def test_opening_what_is_no_file_is_refused_at_once(
    source: LocalSource, root: Path, make: Callable[[Path], None], kind: str, cached_only: bool
) -> None:
    if make is device and os.geteuid() != 0:
        pytest.skip("this user may make no device")
    make(root / "odd")
    source._cached_is_immediate = True
    assert not source.lstat(b"odd").is_file
    before = open_descriptors()
    with pytest.raises(UnsupportedError, match=kind):
        within(20, lambda: source.open(b"odd", cached_only=cached_only))
    assert open_descriptors() == before


def test_a_device_that_takes_the_files_place_is_not_opened(
    source: LocalSource, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(root / "fifo")
    fstat = source.fstat

    def overtaken(fd: int) -> SourceStat:
        found = fstat(fd)
        os.replace(root / "fifo", root / "top")
        monkeypatch.undo()
        return found

    monkeypatch.setattr(source, "fstat", overtaken)
    fd, entry = within(20, lambda: source.open(b"top"))
    assert stat.S_ISFIFO(os.lstat(root / "top").st_mode)
    assert os.read(fd, 10) == b"top"
    assert entry.is_file
    os.close(fd)


def test_an_opened_file_can_only_be_read_and_is_not_inherited(source: LocalSource) -> None:
    fd, entry = source.open(b"a/file")
    assert errno_from(lambda: os.write(fd, b"x")) == errno.EBADF
    assert not os.get_inheritable(fd)
    assert source.fstat(fd) == entry
    os.close(fd)


def test_fstat_works_without_a_name(source: LocalSource, root: Path) -> None:
    fd, entry = source.open(b"a/file")
    (root / "a" / "file").unlink()
    now = source.fstat(fd)
    os.close(fd)
    assert (now.inode_key, now.nlink, now.size) == (entry.inode_key, 0, 7)
