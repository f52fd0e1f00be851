"""Files of a mount through the pool of pinned memory; the GPU is the tests' double."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from prefetch.residency import drop, resident_bytes
from prefetch.staging import Piece, Staging, StagingConfig, Way
from tests.helpers.driver_double import DriverDouble
from tests.helpers.mounting import Mounter, both_engines, needs_passthrough, wait_until_settled

SIZE = (8 << 20) + 4321


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "weights.bin").write_bytes(os.urandom(SIZE))
    wait_until_settled(str(tmp_path / "source" / "weights.bin"))
    return tmp_path / "source"


@both_engines
@pytest.mark.parametrize("way", ["ring", "windows", "both"])
def test_every_byte_of_a_file_of_the_mount(mounter: Mounter, source: Path, engine: str, way: Way) -> None:
    driver = DriverDouble()
    pool = Staging(driver, config=StagingConfig(way=way, threads=2, buffer_bytes=128 << 10, window_bytes=512 << 10))
    address = driver.device_memory(SIZE)
    with mounter(str(source), engine, "--prefetch", "off") as mount, open(mount.path("weights.bin"), "rb") as file:
        file.read()  # in memory, of the mount as well
        copied = pool.copy([Piece(file.fileno(), 0, SIZE, address)])
        pool.close()
    assert copied.way == way
    assert driver.bytes_at(address, SIZE) == (source / "weights.bin").read_bytes()
    driver.check()


@needs_passthrough
def test_what_is_not_in_memory_is_seen_through_the_mount(mounter: Mounter, source: Path) -> None:
    driver = DriverDouble()
    pool = Staging(driver, config=StagingConfig(threads=2, buffer_bytes=1 << 20))
    address = driver.device_memory(SIZE)
    backing = os.open(source / "weights.bin", os.O_RDONLY)
    os.fsync(backing)
    with mounter(str(source), "passthrough", "--prefetch", "off") as mount:
        with open(mount.path("weights.bin"), "rb") as file:
            drop(backing)
            if resident_bytes(backing, 0, SIZE):
                pytest.skip(f"this machine lacks a disk below {source} whose page cache can be dropped")
            copied = pool.copy([Piece(file.fileno(), 0, SIZE, address)])
            assert copied.past_cache_bytes == SIZE
            assert resident_bytes(backing, 0, SIZE) == 0
            assert driver.bytes_at(address, SIZE) == (source / "weights.bin").read_bytes()
            assert pool.copy([Piece(file.fileno(), 0, SIZE, address)]).past_cache_bytes == 0  # in memory by now
        pool.close()
    os.close(backing)
    driver.check()
