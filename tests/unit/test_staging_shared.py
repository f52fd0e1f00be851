"""One pool a process and device; what forks, interrupts and ends in the middle."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefetch import staging as room
from prefetch.errors import NoDeviceError, StagingError
from prefetch.staging import Piece, Staging, StagingConfig, close_shared, shared
from tests.helpers.driver_double import DriverDouble

SIZE = 5 << 20
CONFIG = StagingConfig(way="ring", threads=3, buffers=2, buffer_bytes=64 << 10)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[DriverDouble]:
    double = DriverDouble(devices=2)
    monkeypatch.setattr("prefetch.pinned.Driver", lambda: double)
    yield double
    close_shared()
    double.check()


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "weights").write_bytes(os.urandom(SIZE))
    opened = os.open(tmp_path / "weights", os.O_RDONLY)
    yield opened
    os.close(opened)


def test_one_pool_a_device(driver: DriverDouble) -> None:
    assert shared(0) is shared()
    assert shared(1) is not shared(0)
    assert driver.retained == {0: 1, 1: 1}


def test_a_pool_that_was_closed_is_made_anew(driver: DriverDouble, fd: int) -> None:
    first = shared()
    close_shared()
    assert not +driver.retained
    assert shared() is not first
    address = driver.device_memory(SIZE)
    shared().copy([Piece(fd, 0, SIZE, address)])
    assert driver.bytes_at(address, SIZE) == os.pread(fd, SIZE, 0)


def test_a_device_that_is_not_there_is_not_remembered(driver: DriverDouble) -> None:
    for _ in range(2):
        with pytest.raises(NoDeviceError, match="no GPU 2"):
            shared(2)


def test_a_child_has_no_pool_of_its_parent(driver: DriverDouble) -> None:
    shared()
    child = os.fork()
    if not child:
        os._exit(0 if not room._shared else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert room._shared


def test_ctrl_c_waits_for_the_gpu(driver: DriverDouble, fd: int) -> None:
    pool = Staging(driver, config=CONFIG)
    address = driver.device_memory(SIZE)
    asked = iter(range(1000))
    driver.gate.clear()

    def interrupt() -> bool:
        if next(asked) == 3:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            threading.Timer(0.1, driver.gate.set).start()
        return False

    with pytest.raises(KeyboardInterrupt):
        pool.copy([Piece(fd, 0, SIZE, address)], cancelled=interrupt)
    assert not driver._underway
    assert driver.counts["copy"] < SIZE // CONFIG.buffer_bytes
    pool.copy([Piece(fd, 0, SIZE, address)])
    assert driver.bytes_at(address, SIZE) == os.pread(fd, SIZE, 0)
    pool.close()


def test_a_thread_that_can_not_start_ends_all(driver: DriverDouble, fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Staging(driver, config=CONFIG)
    started = iter(range(1000))
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("staging") and next(started) == 2:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    address = driver.device_memory(SIZE)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        pool.copy([Piece(fd, 0, SIZE, address)])
    monkeypatch.undo()
    pool.copy([Piece(fd, 0, SIZE, address)])
    pool.close()


def test_close_waits_for_a_copy(driver: DriverDouble, fd: int) -> None:
    pool = Staging(driver, config=CONFIG)
    address = driver.device_memory(SIZE)
    driver.gate.clear()
    copier = threading.Thread(target=pool.copy, args=([Piece(fd, 0, SIZE, address)],))
    copier.start()
    while not driver.counts["copy"]:
        assert copier.is_alive()
    closer = threading.Thread(target=pool.close)
    closer.start()
    driver.gate.set()
    copier.join()
    closer.join()
    assert driver.bytes_at(address, SIZE) == os.pread(fd, SIZE, 0)
    with pytest.raises(StagingError, match="closed"):
        pool.copy([])
