"""Pages through a pipe, with a file standing for the kernel."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.support import open_descriptors
from weightfs import wire
from weightfs.conduit import Conduit
from weightfs.handles import Place

DATA = os.urandom(300_000)
LARGEST = 254 << 12


@pytest.fixture
def source(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "source").write_bytes(DATA)
    fd = os.open(tmp_path / "source", os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "kernel", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


@pytest.fixture
def conduit(kernel: int) -> Iterator[Conduit]:
    made = Conduit(kernel, LARGEST)
    yield made
    made.close()


def received(kernel: int) -> bytes:
    return os.pread(kernel, 1 << 22, 0)


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 1), (0, 4096), (1, 4096), (4095, 200_000), (0, 300_000), (7, 0)])
def test_header_and_pages_are_one_message(conduit: Conduit, kernel: int, source: int, offset: int, nbytes: int) -> None:
    assert conduit.load(wire.OUT_HEADER, 42, Place(source, offset, nbytes))
    conduit.send()
    assert received(kernel) == wire.OUT_HEADER.pack(16 + nbytes, 0, 42) + DATA[offset : offset + nbytes]


def test_the_largest_read_fits_at_any_offset(conduit: Conduit, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(2 << 20))
    with open(tmp_path / "large", "rb") as large:
        for offset in (0, 1, 4095):
            assert conduit.load(wire.OUT_HEADER, 1, Place(large.fileno(), offset, LARGEST))
            conduit.drop()


def test_a_file_that_ends_early_leaves_the_pipe_empty(conduit: Conduit, kernel: int, source: int) -> None:
    assert not conduit.load(wire.OUT_HEADER, 1, Place(source, 299_000, 5000))
    assert conduit.load(wire.OUT_HEADER, 2, Place(source, 0, 10))
    conduit.send()
    assert received(kernel) == wire.OUT_HEADER.pack(26, 0, 2) + DATA[:10]


def test_what_can_not_be_spliced_is_left_to_others(conduit: Conduit, tmp_path: Path) -> None:
    closed = os.open(tmp_path / "source", os.O_WRONLY | os.O_CREAT)
    assert not conduit.load(wire.OUT_HEADER, 1, Place(closed, 0, 10))
    os.close(closed)
    assert not conduit.load(wire.OUT_HEADER, 1, Place(-1, 0, 10))
    assert conduit.usable


def test_a_refused_message_is_gone(source: int, kernel: int, tmp_path: Path) -> None:
    read_only = os.open(tmp_path / "kernel", os.O_RDONLY)
    conduit = Conduit(read_only, LARGEST)
    assert conduit.load(wire.OUT_HEADER, 1, Place(source, 0, 10))
    with pytest.raises(OSError, match="Bad file") as caught:
        conduit.send()
    assert caught.value.errno == errno.EBADF
    os.dup2(kernel, read_only)
    assert conduit.load(wire.OUT_HEADER, 2, Place(source, 5, 10))
    conduit.send()
    assert received(kernel) == wire.OUT_HEADER.pack(26, 0, 2) + DATA[5:15]
    conduit.close()
    os.close(read_only)


def test_without_a_large_pipe_it_is_not_used(kernel: int, source: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_descriptors()

    def refused(*_: object) -> int:
        raise PermissionError(errno.EPERM, "pipe-max-size")

    monkeypatch.setattr(fcntl, "fcntl", refused)
    conduit = Conduit(kernel, LARGEST)
    assert not conduit.usable
    assert not conduit.load(wire.OUT_HEADER, 1, Place(source, 0, 10))
    assert open_descriptors() == before
    conduit.close()


def test_descriptors_are_given_back(kernel: int, source: int) -> None:
    before = open_descriptors()
    conduit = Conduit(kernel, LARGEST)
    for _ in range(5):
        conduit.load(wire.OUT_HEADER, 1, Place(source, 0, 10))
        conduit.drop()
    assert len(open_descriptors()) == len(before) + 2
    conduit.close()
    assert open_descriptors() == before


def test_closing_twice_closes_no_descriptor_of_somebody_else(kernel: int) -> None:
    conduit = Conduit(kernel, LARGEST)
    conduit.close()
    others = os.pipe()  # takes the numbers just given back
    conduit.close()
    for fd in others:
        os.close(fd)  # raises if it was closed already
