"""Nothing that weightfs opens lies outside the source."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.support import open_descriptors
from tests.unit.test_source_local import errno_from
from weightfs.errors import UnsupportedError
from weightfs.source.base import WouldBlockError
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


# Confinement

CALLS: dict[str, Callable[[LocalSource, bytes], object]] = {
    "lstat": lambda source, path: source.lstat(path),
    "lstat-cached": lambda source, path: source.lstat(path, cached_only=True),
    "open": lambda source, path: source.open(path),
    "open-cached": lambda source, path: source.open(path, cached_only=True),
    "names": lambda source, path: source.names(path),
    "entries": lambda source, path: source.entries(path),
    "readlink": lambda source, path: source.readlink(path),
    "getxattr": lambda source, path: source.getxattr(path, b"user.x"),
    "listxattr": lambda source, path: source.listxattr(path),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("path", [b"..", b"../outside/secret", b"a/../../outside/secret", b"a/b/../../../outside"])
def test_dots_do_not_lead_out(source: LocalSource, call: Callable[[LocalSource, bytes], object], path: bytes) -> None:
    before = open_descriptors()
    with pytest.raises((OSError, WouldBlockError)) as caught:
        call(source, path)
    assert isinstance(caught.value, WouldBlockError) or getattr(caught.value, "errno", None) == errno.EXDEV
    assert open_descriptors() == before


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_absolute_paths_do_not_lead_out(
    source: LocalSource, tmp_path: Path, call: Callable[[LocalSource, bytes], object]
) -> None:
    with pytest.raises((OSError, WouldBlockError)):
        call(source, os.fsencode(tmp_path / "outside" / "secret"))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("target", ["a", "../outside", "{outside}", "/proc/self/root", "loop"])
def test_symlinks_above_are_never_followed(
    source: LocalSource, root: Path, tmp_path: Path, call: Callable[[LocalSource, bytes], object], target: str
) -> None:
    (root / "loop").symlink_to(target.format(outside=tmp_path / "outside"))
    for path in (b"loop/file", b"loop/secret", b"loop/"):
        with pytest.raises((OSError, WouldBlockError)) as caught:
            call(source, path)
        assert isinstance(caught.value, WouldBlockError) or getattr(caught.value, "errno", None) == errno.ELOOP


def test_a_symlink_itself_is_seen_and_not_opened(source: LocalSource, root: Path, tmp_path: Path) -> None:
    (root / "link").symlink_to(tmp_path / "outside" / "secret")
    assert source.lstat(b"link").is_symlink
    with pytest.raises(UnsupportedError, match="symlink"):
        source.open(b"link")


def test_a_folder_swapped_for_a_symlink_at_any_moment_gives_nothing_from_outside(
    source: LocalSource, root: Path, tmp_path: Path
) -> None:
    """A folder and a symlink out of the source take turns at one name while it is read."""
    (tmp_path / "outside" / "file").write_bytes(b"secret!")
    (root / "link").symlink_to(tmp_path / "outside")
    stop = threading.Event()

    def swap() -> None:
        names = os.fsencode(root / "a"), os.fsencode(root / "link"), os.fsencode(root / "spare")
        while not stop.is_set():
            os.rename(names[0], names[2])
            os.rename(names[1], names[0])
            os.rename(names[0], names[1])
            os.rename(names[2], names[0])

    thread = threading.Thread(target=swap)
    thread.start()
    read = refused = 0
    try:
        while read < 30 or refused < 30:
            assert read + refused < 100_000
            try:
                fd, entry = source.open(b"a/file")
            except OSError as e:
                assert e.errno in (errno.ENOENT, errno.ELOOP, errno.EAGAIN)
                refused += 1
                continue
            try:
                assert os.read(fd, 100) == b"content"
                assert entry.size == 7
                read += 1
            finally:
                os.close(fd)
    finally:
        stop.set()
        thread.join()


def test_a_root_that_is_renamed_stays_the_root(source: LocalSource, root: Path, tmp_path: Path) -> None:
    root.rename(tmp_path / "moved")
    (tmp_path / "source").symlink_to("outside")
    assert source.lstat(b"top").size == 3
    assert errno_from(lambda: source.lstat(b"secret")) == errno.ENOENT
