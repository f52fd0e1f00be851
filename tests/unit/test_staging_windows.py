"""Windows of the page cache as pinned memory, against the driver double."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefetch.errors import StagingError
from prefetch.staging import Piece, Staging, StagingConfig
from prefetch.windows import Window
from tests.helpers.driver_double import DriverDouble
from weightfs.errors import IntegrityError, ShortReadError

WINDOW = 64 << 10
WHOLE = 40 * WINDOW + 4 * 4096
"""The file, in whole pages."""
CONFIG = StagingConfig(way="windows", window_threads=3, window_bytes=WINDOW, threads=2, buffer_bytes=WINDOW)


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
def path(tmp_path: Path) -> Path:
    (tmp_path / "weights").write_bytes(os.urandom(40 * WINDOW + 12345))
    return tmp_path / "weights"


@pytest.fixture
def fd(path: Path) -> Iterator[int]:
    opened = os.open(path, os.O_RDONLY)
    yield opened
    os.close(opened)


def mapped(path: Path) -> int:
    """How many bytes of a file this process has mapped, in whole pages; mappings that meet are one for the kernel."""
    found = re.findall(
        rf"^([0-9a-f]+)-([0-9a-f]+) .*{re.escape(str(path))}$", Path("/proc/self/maps").read_text(), re.M
    )
    return sum(int(end, 16) - int(start, 16) for start, end in found)


def test_a_file_is_on_the_device_byte_for_byte(staging: Staging, driver: DriverDouble, fd: int, path: Path) -> None:
    content = path.read_bytes()
    address = driver.device_memory(len(content))
    for _ in range(3):
        copied = staging.copy([Piece(fd, 0, len(content), address)])
        assert driver.bytes_at(address, len(content)) == content
        assert (copied.nbytes, copied.threads, copied.way) == (len(content), 3, "windows")
    staging.close()
    assert driver.counts["register"] == driver.counts["unregister"] == 3 * 41
    assert driver.counts["allocate"] == 0
    assert mapped(path) == 0


def test_pieces_that_share_pages(staging: Staging, driver: DriverDouble, fd: int, path: Path) -> None:
    content = path.read_bytes()
    wanted = [(5, 100), (70_000, 5), (1, 4), (4095, 2), (5, 100), (200_000, 100_000)]
    addresses = [driver.device_memory(nbytes) for _, nbytes in wanted]
    staging.copy([Piece(fd, offset, n, address) for (offset, n), address in zip(wanted, addresses, strict=True)])
    for (offset, nbytes), address in zip(wanted, addresses, strict=True):
        assert driver.bytes_at(address, nbytes) == content[offset : offset + nbytes]


def test_a_copy_returns_before_its_windows_are_given_up(
    staging: Staging, driver: DriverDouble, fd: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go = threading.Event()
    unregister = driver.unregister

    def held(address: int) -> None:
        assert may_go.wait(20)
        unregister(address)

    monkeypatch.setattr(driver, "unregister", held)
    size = path.stat().st_size
    staging.copy([Piece(fd, 0, size, driver.device_memory(size))])
    assert mapped(path) == WHOLE
    may_go.set()
    staging.close()
    assert mapped(path) == 0


def test_a_thread_does_not_pin_without_end(
    staging: Staging, driver: DriverDouble, fd: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefetch.windows._MOST_PINNED_BYTES", 4 * WINDOW)
    lots: list[int] = []
    add = staging._retirement.add

    def counted(windows: list[Window]) -> None:
        lots.append(sum(window.nbytes for window in windows))
        add(windows)

    monkeypatch.setattr(staging._retirement, "add", counted)
    size = path.stat().st_size
    address = driver.device_memory(size)
    staging._windows.clear()
    staging.copy([Piece(fd, 0, size, address)])
    assert max(lots) == 5 * WINDOW
    assert driver.bytes_at(address, size) == path.read_bytes()


def test_a_driver_that_pins_no_files_is_no_failure(staging: Staging, driver: DriverDouble, fd: int, path: Path) -> None:
    driver.fail("register", StagingError("cuMemHostRegister_v2 failed: CUDA_ERROR_NOT_SUPPORTED", number=801), after=7)
    size = path.stat().st_size
    address = driver.device_memory(size)
    for _ in range(2):
        assert staging.copy([Piece(fd, 0, size, address)]).way == "ring"
        assert driver.bytes_at(address, size) == path.read_bytes()


def test_a_device_that_reads_no_mapped_files(fd: int) -> None:
    driver = DriverDouble(registers=False)
    pool = Staging(driver, config=CONFIG)
    assert pool.copy([Piece(fd, 0, 10, driver.device_memory(10))]).way == "ring"
    pool.close()
    driver.check()


@pytest.mark.parametrize("call", ["use", "open_stream", "copy"])
def test_nothing_is_left_of_a_copy_that_failed(
    staging: Staging, driver: DriverDouble, fd: int, path: Path, call: str
) -> None:
    size = path.stat().st_size
    address = driver.device_memory(size)
    driver.fail(call, after=2)
    with pytest.raises(StagingError, match=f"{call} failed"):
        staging.copy([Piece(fd, 0, size, address)])
    staging.copy([Piece(fd, 0, size, address)])
    assert driver.bytes_at(address, size) == path.read_bytes()


def test_windows_that_a_gpu_may_still_read_stay(driver: DriverDouble, fd: int, path: Path) -> None:
    pool = Staging(driver, config=StagingConfig(way="windows", window_threads=1, window_bytes=WINDOW))
    driver.fail("wait_stream")
    size = path.stat().st_size
    with pytest.raises(StagingError, match="wait_stream failed"):
        pool.copy([Piece(fd, 0, size, driver.device_memory(size))])
    with pytest.raises(StagingError, match="earlier copy"):
        pool.copy([])
    pool.close()
    assert driver.counts["unregister"] == 0
    assert mapped(path) == WHOLE
    assert not driver.violations


def test_a_window_that_is_not_given_up_stays_mapped(
    driver: DriverDouble, fd: int, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pool = Staging(driver, config=CONFIG)
    size = path.stat().st_size
    driver.fail("unregister", after=3)
    pool.copy([Piece(fd, 0, size, driver.device_memory(size))])
    pool.close()
    assert mapped(path) in (WINDOW, WHOLE % WINDOW)
    assert "stays mapped: unregister failed" in caplog.text


def test_a_file_that_ends_too_soon_is_an_error(staging: Staging, driver: DriverDouble, fd: int, path: Path) -> None:
    size = path.stat().st_size
    with pytest.raises(ShortReadError, match=f"ends at byte {size}, where 1 more"):
        staging.copy([Piece(fd, 0, size + 1, driver.device_memory(size + 1))])
    assert driver.counts["register"] == 0


def test_a_file_truncated_meanwhile_is_an_error(staging: Staging, driver: DriverDouble, fd: int, path: Path) -> None:
    size = path.stat().st_size

    def truncate() -> bool:
        if driver.counts["copy"] >= 41 - 3:
            os.truncate(path, size - 1)
        return False

    with pytest.raises(IntegrityError, match="changed while it was copied"):
        staging.copy([Piece(fd, 0, size, driver.device_memory(size))], cancelled=truncate)


def test_both_ways_at_once(driver: DriverDouble, fd: int, path: Path) -> None:
    config = StagingConfig(
        way="both", threads=2, buffers=2, buffer_bytes=WINDOW // 4, window_threads=2, window_bytes=WINDOW
    )
    pool = Staging(driver, config=config)
    content = path.read_bytes()
    address = driver.device_memory(len(content))
    for _ in range(3):
        copied = pool.copy([Piece(fd, 0, len(content), address)])
        assert (copied.way, copied.threads, copied.nbytes) == ("both", 4, len(content))
        assert driver.bytes_at(address, len(content)) == content
    pool.close()
    assert driver.counts["register"] > 0
    assert driver.counts["copy"] > 3 * 41  # some of them were cut to buffers
    driver.check()


def test_the_last_windows_are_read(driver: DriverDouble, fd: int, path: Path) -> None:
    """None of the threads waits at the end for one that has just begun to pin."""
    config = StagingConfig(way="both", threads=1, buffers=2, buffer_bytes=WINDOW, window_threads=4, window_bytes=WINDOW)
    pool = Staging(driver, config=config)
    pool.copy([Piece(fd, 0, 4 * WINDOW, driver.device_memory(4 * WINDOW))])
    assert driver.counts["register"] == 0
    pool.copy([Piece(fd, 0, 6 * WINDOW, driver.device_memory(6 * WINDOW))])
    assert driver.counts["register"] <= 2
    pool.close()
    driver.check()
