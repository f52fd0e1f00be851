"""Which way is taken, and what `weightfs doctor` says of it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefetch import staging as room
from prefetch.errors import NoDeviceError, StagingError
from prefetch.pieces import Piece, split
from prefetch.staging import Rates, Staging, StagingConfig
from tests.helpers.driver_double import DriverDouble
from weightfs.cli import staging_checks

MIB = 1 << 20
SIZE = 12 * MIB + 77
CONFIG = StagingConfig(threads=2, buffers=2, buffer_bytes=MIB, window_threads=2, window_bytes=MIB)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_measured", {})
    monkeypatch.setattr(room, "_TRIAL_BYTES", 2 * MIB)
    monkeypatch.setattr(room, "_TRIAL_FROM_BYTES", 8 * MIB)
    monkeypatch.setattr(room, "_PROBE_BYTES", 4 * MIB)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "weights").write_bytes(os.urandom(SIZE))
    opened = os.open(tmp_path / "weights", os.O_RDONLY)
    yield opened
    os.close(opened)


def slow(driver: DriverDouble, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a call of the driver take long."""
    real = getattr(driver, call)

    def slowly(*arguments: int) -> object:
        time.sleep(0.05)  # what is measured is time
        return real(*arguments)

    monkeypatch.setattr(driver, call, slowly)


FEW = StagingConfig(threads=1, buffers=1, buffer_bytes=128 << 10, window_threads=1, window_bytes=256 << 10)


@pytest.mark.parametrize(("slow_call", "way"), [("register", "ring"), ("wait_event", "both")])
def test_a_large_copy_finds_out(fd: int, monkeypatch: pytest.MonkeyPatch, slow_call: str, way: str) -> None:
    driver = DriverDouble(slowest_s=0)
    slow(driver, slow_call, monkeypatch)
    pool = Staging(driver, config=FEW)
    address = driver.device_memory(SIZE)
    content = os.pread(fd, SIZE, 0)
    copied = pool.copy([Piece(fd, 0, SIZE, address)])
    assert (copied.way, copied.nbytes) == (way, SIZE)
    assert driver.bytes_at(address, SIZE) == content
    assert driver.counts["register"] >= 1
    pool.close()
    # What a process has found out it knows, also where another pool was made since.
    before = driver.counts["register"]
    pool = Staging(driver, config=FEW)
    assert pool.copy([Piece(fd, 0, SIZE, address)]).way == way
    assert (driver.counts["register"] == before) == (way == "ring")
    pool.close()
    driver.check()


def test_a_small_copy_finds_out_nothing(fd: int) -> None:
    driver = DriverDouble()
    pool = Staging(driver, config=CONFIG)
    for _ in range(2):
        assert pool.copy([Piece(fd, 0, 7 * MIB, driver.device_memory(SIZE))]).way == "both"
    pool.close()
    assert room._measured == {}


def test_a_trial_that_is_refused(fd: int) -> None:
    driver = DriverDouble()
    driver.fail("register", after=1)
    pool = Staging(driver, config=CONFIG)
    address = driver.device_memory(SIZE)
    copied = pool.copy([Piece(fd, 0, SIZE, address)])
    assert (copied.way, copied.nbytes) == ("ring", SIZE)
    assert driver.bytes_at(address, SIZE) == os.pread(fd, SIZE, 0)
    pool.close()
    driver.check()


def test_pieces_too_small_to_pin_are_read(fd: int) -> None:
    driver = DriverDouble()
    pool = Staging(driver, config=StagingConfig(way="windows", window_bytes=4 * MIB))
    addresses = [driver.device_memory(100) for _ in range(11)]
    pieces = [Piece(fd, number * MIB, 100, address) for number, address in enumerate(addresses)]
    assert pool.copy(pieces).way == "ring"
    assert driver.counts["register"] == 0
    pool.close()


@pytest.mark.parametrize(("slow_call", "way"), [("register", "ring"), ("wait_event", "windows")])
def test_the_probe_tries_both(fd: int, monkeypatch: pytest.MonkeyPatch, slow_call: str, way: str) -> None:
    driver = DriverDouble(slowest_s=0)
    slow(driver, slow_call, monkeypatch)
    pool = Staging(driver, config=FEW)
    rates = pool.probe()
    assert rates.way == way
    assert sorted(rates.bytes_per_s) == ["both", "ring", "windows"]
    assert rates.refusal is None
    assert pool.copy([Piece(fd, 0, SIZE, driver.device_memory(SIZE))]).way == way
    pool.close()
    driver.check()


@pytest.mark.parametrize("call", ["allocate_device", "copy", "free_device"])
def test_a_probe_that_fails_leaves_nothing(call: str) -> None:
    driver = DriverDouble()
    driver.fail(call)
    pool = Staging(driver, config=CONFIG)
    with pytest.raises(StagingError, match=f"{call} failed"):
        pool.probe()
    if call == "free_device":
        return
    pool.close()
    driver.check()


def test_doctor_says_which_way_and_why() -> None:
    driver = DriverDouble()
    check = staging_checks.staging(lambda _: Staging(driver, config=CONFIG))
    assert check.state == "ok"
    assert check.detail.startswith(("ring: ", "windows: ", "both: "))
    assert "GB/s" in check.detail


@pytest.mark.parametrize("registers", [True, False])
def test_doctor_says_why_windows_are_not_used(registers: bool) -> None:
    driver = DriverDouble(registers=registers)
    driver.fail("register", StagingError("cuMemHostRegister_v2 failed: CUDA_ERROR_NOT_SUPPORTED", number=801))
    check = staging_checks.staging(lambda _: Staging(driver, config=CONFIG))
    wanted = "cuMemHostRegister_v2 failed" if registers else "mapped for reading only"
    assert check.state == "ok"
    assert check.detail.startswith("ring: ")
    assert wanted in check.detail


def test_doctor_says_what_is_missing() -> None:
    def none(_: int) -> Staging:
        raise NoDeviceError("the Python package cuda-bindings is not installed", mend="pip install cuda-bindings")

    check = staging_checks.staging(none)
    assert (check.state, check.mend) == ("missing", "pip install cuda-bindings")
    driver = DriverDouble()
    driver.fail("allocate_device")
    check = staging_checks.staging(lambda _: Staging(driver, config=CONFIG))
    assert (check.state, check.needed) == ("degraded", False)


def test_a_machine_without_a_driver_says_so() -> None:
    code = "from weightfs.cli.staging_checks import staging; one = staging(); print(one.state, one.detail, one.mend)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    if done.stdout.startswith("missing"):
        assert "Nvidia driver" in done.stdout or "cuda-bindings" in done.stdout
    else:
        assert "GB/s" in done.stdout


def test_importing_needs_no_cuda() -> None:
    code = "import sys, prefetch.staging, prefetch.pinned; print([one for one in sys.modules if 'cuda' in one])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_the_faster_way() -> None:
    assert Rates(bytes_per_s={"ring": 2}).way == "ring"
    assert Rates(bytes_per_s={"ring": 2, "both": 1, "windows": 3}).way == "windows"


def test_pieces_are_split_by_bytes() -> None:
    pieces = [Piece(3, 0, 10, 100), Piece(3, 50, 0, 7), Piece(4, 5, 10, 200)]
    assert split(pieces, 14) == ([pieces[0], Piece(4, 5, 4, 200)], [Piece(4, 9, 6, 204)])
    assert split(pieces, 10) == ([pieces[0]], [pieces[2]])
    assert split(pieces, 0) == ([], [pieces[0], pieces[2]])
    assert split(pieces, 99) == ([pieces[0], pieces[2]], [])
