"""The pool of pinned buffers against a driver whose copies are late: see tests/helpers/driver_double."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefetch.errors import CopyCancelledError, NoDeviceError, StagingError
from prefetch.staging import Piece, Staging, StagingConfig
from tests.helpers.driver_double import DriverDouble
from tests.unit.support import within
from weightfs.errors import IntegrityError, ShortReadError

BUFFER = 64 << 10
CONFIG = StagingConfig(threads=3, buffers=2, buffer_bytes=BUFFER)


@pytest.fixture
def driver() -> DriverDouble:
    return DriverDouble()


@pytest.fixture
def staging(driver: DriverDouble) -> Iterator[Staging]:
    pool = Staging(driver, config=CONFIG)
    yield pool
    pool.close()
    driver.check()


@pytest.fixture
def content() -> bytes:
    return os.urandom(40 * BUFFER + 12345)


@pytest.fixture
def fd(tmp_path: Path, content: bytes) -> Iterator[int]:
    (tmp_path / "weights").write_bytes(content)
    opened = os.open(tmp_path / "weights", os.O_RDONLY)
    yield opened
    os.close(opened)


def test_a_file_is_on_the_device_byte_for_byte(staging: Staging, driver: DriverDouble, fd: int, content: bytes) -> None:
    address = driver.device_memory(len(content))
    for _ in range(3):
        copied = staging.copy([Piece(fd, 0, len(content), address)])
        assert driver.bytes_at(address, len(content)) == content
        assert (copied.nbytes, copied.threads, copied.way) == (len(content), 3, "ring")
    assert driver.most_pinned_bytes == 3 * 2 * BUFFER


def test_pieces_come_in_their_order(staging: Staging, driver: DriverDouble, fd: int, content: bytes) -> None:
    address = driver.device_memory(len(content))
    offsets = [20 * BUFFER, 0, 30 * BUFFER, 10 * BUFFER]
    pieces = [Piece(fd, offset, BUFFER, address + offset) for offset in offsets]
    one = Staging(driver, config=StagingConfig(threads=1, buffers=2, buffer_bytes=BUFFER))
    one.copy(pieces)
    one.close()
    assert driver.copied == [address + offset for offset in offsets]


def test_nothing_is_nothing_to_do(staging: Staging, driver: DriverDouble) -> None:
    assert staging.copy([]).nbytes == 0
    assert driver.counts["allocate"] == 0


def test_a_small_copy_takes_no_more_threads_than_it_has_reads(staging: Staging, driver: DriverDouble, fd: int) -> None:
    assert staging.copy([Piece(fd, 1, 10, driver.device_memory(10))]).threads == 1
    assert driver.counts["allocate"] == 1


def test_no_more_is_read_than_buffers_are_free(
    staging: Staging, driver: DriverDouble, fd: int, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = threading.Semaphore(0)
    count = [0]
    preadv = os.preadv

    def counted(*arguments: object) -> int:
        count[0] += 1
        reads.release()
        return preadv(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", counted)
    driver.gate.clear()
    address = driver.device_memory(len(content))
    copier = threading.Thread(target=staging.copy, args=([Piece(fd, 0, len(content), address)],))
    copier.start()
    for _ in range(6):
        assert reads.acquire(timeout=20)
    while driver.counts["wait_event"] < 3:  # all three threads have come to a buffer that is being copied
        assert not reads.acquire(timeout=0.01)
    assert count[0] == 6
    driver.gate.set()
    within(20, copier.join)
    assert driver.bytes_at(address, len(content)) == content


def test_a_file_that_ends_too_soon_is_an_error(
    staging: Staging, driver: DriverDouble, fd: int, content: bytes, tmp_path: Path
) -> None:
    address = driver.device_memory(len(content) + 1)
    with pytest.raises(ShortReadError, match=f"ends at byte {len(content)}") as caught:
        staging.copy([Piece(fd, 0, len(content) + 1, address)])
    assert caught.value.path == str(tmp_path / "weights")
    assert staging.copy([Piece(fd, 0, 10, address)]).nbytes == 10  # the pool is good for the next one


def test_one_thread_that_fails_ends_all(staging: Staging, driver: DriverDouble, fd: int, content: bytes) -> None:
    address = driver.device_memory(len(content))
    driver.fail("copy", after=5)
    with pytest.raises(StagingError, match="copy failed"):
        staging.copy([Piece(fd, 0, len(content), address)])
    assert driver.counts["copy"] < 20
    assert driver.bytes_at(address, len(content)) != content
    staging.copy([Piece(fd, 0, len(content), address)])
    assert driver.bytes_at(address, len(content)) == content


@pytest.mark.parametrize("call", ["use", "open_stream", "open_event", "allocate", "record"])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_nothing_is_left_of_a_copy_that_failed(
    staging: Staging, driver: DriverDouble, fd: int, content: bytes, call: str, after: int
) -> None:
    address = driver.device_memory(len(content))
    if call in ("use", "open_stream"):
        after = min(after, 2)
    driver.fail(call, after=after)
    with pytest.raises(StagingError, match=f"{call} failed"):
        staging.copy([Piece(fd, 0, len(content), address)])
    staging.copy([Piece(fd, 0, len(content), address)])
    assert driver.bytes_at(address, len(content)) == content


def test_a_copy_can_be_called_off(staging: Staging, driver: DriverDouble, fd: int, content: bytes) -> None:
    address = driver.device_memory(len(content))
    asked = iter(range(100))
    with pytest.raises(CopyCancelledError):
        staging.copy([Piece(fd, 0, len(content), address)], cancelled=lambda: next(asked) >= 4)
    assert driver.counts["copy"] <= 4


def test_what_a_gpu_may_still_read_is_never_given_back(driver: DriverDouble, fd: int, content: bytes) -> None:
    pool = Staging(driver, config=StagingConfig(threads=1, buffers=2, buffer_bytes=BUFFER))
    address = driver.device_memory(len(content))
    driver.fail("wait_stream")
    with pytest.raises(StagingError, match="wait_stream failed"):
        pool.copy([Piece(fd, 0, len(content), address)])
    with pytest.raises(StagingError, match="earlier copy"):
        pool.copy([Piece(fd, 0, len(content), address)])
    pool.close()
    assert driver.counts["free"] == 0
    assert not driver.violations


def test_a_closed_pool_refuses(driver: DriverDouble, fd: int) -> None:
    pool = Staging(driver, config=CONFIG)
    pool.close()
    pool.close()
    with pytest.raises(StagingError, match="closed"):
        pool.copy([Piece(fd, 0, 10, driver.device_memory(10))])
    driver.check()


def test_a_file_that_changes_meanwhile_is_an_error(
    staging: Staging, driver: DriverDouble, fd: int, content: bytes, tmp_path: Path
) -> None:
    def touch() -> bool:
        os.utime(tmp_path / "weights", (1, 1))
        return False

    with pytest.raises(IntegrityError, match="changed while it was copied"):
        staging.copy([Piece(fd, 0, len(content), driver.device_memory(len(content)))], cancelled=touch)


def test_a_device_that_is_not_there(driver: DriverDouble) -> None:
    with pytest.raises(NoDeviceError, match="no GPU 7"):
        Staging(driver, device=7)
    driver.check()


def test_copies_of_several_threads_take_turns(staging: Staging, driver: DriverDouble, fd: int, content: bytes) -> None:
    addresses = [driver.device_memory(len(content)) for _ in range(4)]
    threads = [
        threading.Thread(target=staging.copy, args=([Piece(fd, 0, len(content), address)],)) for address in addresses
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        within(30, thread.join)
    assert all(driver.bytes_at(address, len(content)) == content for address in addresses)
    assert driver.most_pinned_bytes == 3 * 2 * BUFFER


def test_few_processors_have_few_threads(driver: DriverDouble, fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    pool = Staging(driver, config=StagingConfig(buffers=2, buffer_bytes=4096))
    assert pool.copy([Piece(fd, 0, 1 << 20, driver.device_memory(1 << 20))]).threads == 3
    pool.close()
    driver.check()
