"""The pool of pinned memory on the real driver: every byte, both ways, and what it gives back."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefetch.pinned import Driver
from prefetch.staging import Piece, Staging, StagingConfig, Way, close_shared, shared
from weightfs.errors import IntegrityError

NBYTES = (64 << 20) + 12345


class Gpu:
    """Memory of the first GPU."""

    def __init__(self) -> None:
        from cuda.bindings import driver as cuda

        self._cuda = cuda
        self.driver = Driver()
        self.driver.retain(0)
        self.driver.use(0)
        self.address = int(self._call("cuMemAlloc", NBYTES))

    def _call(self, name: str, *arguments: Any) -> Any:
        number, *given = getattr(self._cuda, name)(*arguments)
        assert int(number) == 0, number
        return given[0] if given else None

    def clear(self) -> None:
        self._call("cuMemsetD8", self.address, 0, NBYTES)
        self._call("cuCtxSynchronize")

    def content(self) -> bytes:
        buffer = bytearray(NBYTES)
        self._call("cuMemcpyDtoH", buffer, self.address, NBYTES)
        return bytes(buffer)

    def close(self) -> None:
        self._call("cuMemFree", self.address)
        self.driver.release(0)


@pytest.fixture
def memory() -> Iterator[Gpu]:
    found = Gpu()
    yield found
    found.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "weights").write_bytes(os.urandom(NBYTES))
    return tmp_path / "weights"


@pytest.fixture
def fd(path: Path) -> Iterator[int]:
    opened = os.open(path, os.O_RDONLY)
    yield opened
    os.close(opened)


@pytest.mark.parametrize("way", ["ring", "windows"])
def test_every_byte(memory: Gpu, path: Path, fd: int, way: Way) -> None:
    config = StagingConfig(way=way, threads=4, buffers=2, buffer_bytes=1 << 20, window_bytes=1 << 20)
    pool = Staging(memory.driver, config=config)
    content = path.read_bytes()
    for cut in (NBYTES, 3_000_001, 70_001):
        memory.clear()
        pieces = [Piece(fd, at, min(cut, NBYTES - at), memory.address + at) for at in range(0, NBYTES, cut)]
        assert pool.copy(pieces[::-1]).way == way
        assert memory.content() == content
    pool.close()


def test_a_file_truncated_meanwhile_is_an_error_and_no_signal(memory: Gpu, path: Path, fd: int) -> None:
    pool = Staging(memory.driver, config=StagingConfig(way="windows", window_threads=1, window_bytes=1 << 20))
    asked = iter(range(1000))

    def truncate() -> bool:
        if next(asked) == 10:
            os.truncate(path, 5 << 20)
        return False

    with pytest.raises(IntegrityError):
        pool.copy([Piece(fd, 0, NBYTES, memory.address)], cancelled=truncate)
    pool.close()


def test_one_pool_a_process(memory: Gpu, path: Path, fd: int) -> None:
    pool = shared(0)
    assert shared(0) is pool
    threads = [threading.Thread(target=pool.copy, args=([Piece(fd, 0, NBYTES, memory.address)],)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert memory.content() == path.read_bytes()
    close_shared()
    assert shared(0) is not pool
    close_shared()
