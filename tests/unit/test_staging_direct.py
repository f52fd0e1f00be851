"""What is not in memory is read past the page cache, and arrives whole whatever refuses that."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefetch import direct
from prefetch.residency import drop, resident_bytes
from prefetch.staging import Piece, Staging, StagingConfig
from tests.helpers.driver_double import DriverDouble
from weightfs.errors import ShortReadError

BUFFER = 256 << 10
SIZE = 20 * BUFFER + 12345


@pytest.fixture
def driver() -> DriverDouble:
    return DriverDouble()


@pytest.fixture
def staging(driver: DriverDouble) -> Iterator[Staging]:
    pool = Staging(driver, config=StagingConfig(way="windows", threads=3, buffers=2, buffer_bytes=BUFFER))
    yield pool
    pool.close()
    driver.check()


@pytest.fixture
def content() -> bytes:
    return os.urandom(SIZE)


@pytest.fixture
def fd(tmp_path: Path, content: bytes) -> Iterator[int]:
    """A file that is on the disk and not in memory."""
    path = tmp_path / "weights"
    path.write_bytes(content)
    opened = os.open(path, os.O_RDONLY)
    os.fsync(opened)
    drop(opened)
    if resident_bytes(opened, 0, SIZE):
        pytest.skip(f"this machine lacks a disk below {tmp_path} whose page cache can be dropped")
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip(f"this machine lacks a filesystem with O_DIRECT below {tmp_path}")
    yield opened
    os.close(opened)


@pytest.mark.parametrize("start", [0, 1, 4095, 70_000])
def test_what_is_not_in_memory_is_read_past_the_cache(
    staging: Staging, driver: DriverDouble, fd: int, content: bytes, start: int
) -> None:
    address = driver.device_memory(SIZE)
    copied = staging.copy([Piece(fd, start, SIZE - start, address)])
    assert driver.bytes_at(address, SIZE - start) == content[start:]
    assert copied.way == "ring"
    assert copied.past_cache_bytes == SIZE - start // 4096 * 4096
    assert resident_bytes(fd, 0, SIZE) == 0


def test_through_the_cache_where_that_is_asked_for(
    staging: Staging, driver: DriverDouble, fd: int, content: bytes
) -> None:
    address = driver.device_memory(SIZE)
    assert staging.copy([Piece(fd, 0, SIZE, address)], past_cache=False).past_cache_bytes == 0
    assert driver.bytes_at(address, SIZE) == content
    assert resident_bytes(fd, 0, SIZE) == SIZE
    assert staging.copy([Piece(fd, 0, SIZE, address)]).way == "windows"


def test_what_is_in_memory_is_read_from_there(staging: Staging, driver: DriverDouble, fd: int, content: bytes) -> None:
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    os.pread(fd, 10 * BUFFER, 0)
    assert resident_bytes(fd, 0, 10 * BUFFER) == 10 * BUFFER
    address = driver.device_memory(SIZE)
    copied = staging.copy([Piece(fd, 0, SIZE, address)])
    assert driver.bytes_at(address, SIZE) == content
    assert copied.past_cache_bytes == SIZE - 10 * BUFFER


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_filesystem_that_refuses_it(
    staging: Staging, driver: DriverDouble, fd: int, content: bytes, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    refused = []
    of_the_kernel = os.open

    def refuse(path: str, flags: int, *arguments: Any) -> int:
        if flags & os.O_DIRECT:
            refused.append(path)
            raise OSError(number, os.strerror(number))
        return of_the_kernel(path, flags, *arguments)

    monkeypatch.setattr(os, "open", refuse)
    address = driver.device_memory(SIZE)
    assert staging.copy([Piece(fd, 0, SIZE, address)]).past_cache_bytes == 0
    assert driver.bytes_at(address, SIZE) == content
    assert refused == [f"/proc/self/fd/{fd}"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_read_that_is_refused_or_fails(
    staging: Staging, driver: DriverDouble, fd: int, content: bytes, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    preadv = os.preadv

    def refuse(one: int, buffers: Any, offset: int) -> int:
        if one != fd:
            raise OSError(number, os.strerror(number))
        return preadv(one, buffers, offset)

    monkeypatch.setattr(os, "preadv", refuse)
    address = driver.device_memory(SIZE)
    if number == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            staging.copy([Piece(fd, 0, SIZE, address)])
    else:
        staging.copy([Piece(fd, 0, SIZE, address)])
        assert driver.bytes_at(address, SIZE) == content


def test_a_short_read_is_taken_up_where_it_ended(
    staging: Staging, driver: DriverDouble, fd: int, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda one, buffers, offset: preadv(one, [buffers[0][: 16 * 4096]], offset))
    address = driver.device_memory(SIZE)
    staging.copy([Piece(fd, 0, SIZE, address)])
    assert driver.bytes_at(address, SIZE) == content


def test_a_file_that_is_cut_before_it_is_read(staging: Staging, driver: DriverDouble, fd: int, tmp_path: Path) -> None:
    asked = iter(range(100))

    def truncate() -> bool:
        if not next(asked):
            os.truncate(tmp_path / "weights", SIZE - BUFFER)
        return False

    with pytest.raises(ShortReadError, match="ends at byte"):
        staging.copy([Piece(fd, 0, SIZE, driver.device_memory(SIZE))], cancelled=truncate)


def test_descriptors_are_given_back(staging: Staging, driver: DriverDouble, fd: int) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    staging.copy([Piece(fd, 0, SIZE, driver.device_memory(SIZE))])
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_who_may_not_know_reads_through_the_cache(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: int) -> int:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr("weightfs.linux.mincore", refused)
    assert direct.Reads([Piece(fd, 0, SIZE, 0)], past_cache=True).all_resident
