"""Any pieces of any files, over buffers of any size: what is on the device is what the files have there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefetch.pieces import PAGE_BYTES, Piece, jobs_of
from prefetch.staging import Staging, StagingConfig, Way
from tests.helpers.driver_double import DriverDouble

FILE_BYTES = 40 * PAGE_BYTES + 77
CUTS = st.tuples(st.integers(0, 1), st.integers(0, FILE_BYTES), st.integers(0, 12 * PAGE_BYTES))
SIZES = st.tuples(st.integers(1, 8), st.integers(1, 4), st.integers(1, 3))
RUNS = st.tuples(st.integers(0, 1), st.integers(0, FILE_BYTES - 1), st.lists(st.integers(0, 9000), max_size=12))
"""Pieces one behind the other, as tensors lie in a file."""


@pytest.fixture(scope="module")
def files() -> Iterator[list[tuple[int, bytes]]]:
    with tempfile.TemporaryFile() as one, tempfile.TemporaryFile() as other:
        contents = []
        for file in (one, other):
            content = os.urandom(FILE_BYTES)
            file.write(content)
            file.flush()
            contents.append((file.fileno(), content))
        yield contents


def cut(cuts: list[tuple[int, int, int]], runs: list[tuple[int, int, list[int]]]) -> list[tuple[int, int, int]]:
    """(file, offset, nbytes) of every piece, within the file."""
    found = [(file, offset, min(nbytes, FILE_BYTES - offset)) for file, offset, nbytes in cuts]
    for file, offset, lengths in runs:
        for nbytes in lengths:
            nbytes = min(nbytes, FILE_BYTES - offset)
            found.append((file, offset, nbytes))
            offset += nbytes
    return found


@given(st.lists(CUTS, max_size=6), st.lists(RUNS, max_size=3), st.integers(1, 16), st.booleans())
def test_jobs_are_the_pieces(
    cuts: list[tuple[int, int, int]], runs: list[tuple[int, int, list[int]]], pages: int, together: bool
) -> None:
    pieces, address = [], 1 << 20
    for file, offset, nbytes in cut(cuts, runs):
        pieces.append(Piece(file, offset, nbytes, address))
        address += nbytes + (0 if together else 3)
    jobs = jobs_of(pieces, pages * PAGE_BYTES)
    moved = []
    for job in jobs:
        assert job.offset % PAGE_BYTES == 0
        assert 0 < job.nbytes <= pages * PAGE_BYTES
        assert job.spans
        assert job.spans[-1].at + job.spans[-1].nbytes == job.nbytes
        at = 0
        for span in job.spans:
            assert span.at >= at
            assert span.nbytes > 0
            at = span.at + span.nbytes
            moved += [(job.fd, job.offset + span.at, span.nbytes, span.address)]
    # Joined where they meet, the spans in their order are the pieces in theirs.
    assert joined(moved) == joined([piece for piece in pieces if piece.nbytes])


def joined(parts: list[Piece] | list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    found: list[tuple[int, int, int, int]] = []
    for fd, offset, nbytes, address in parts:
        if found:
            last_fd, last_offset, last_nbytes, last_address = found[-1]
            if (fd, offset, address) == (last_fd, last_offset + last_nbytes, last_address + last_nbytes):
                found[-1] = (fd, last_offset, last_nbytes + nbytes, last_address)
                continue
        found.append((fd, offset, nbytes, address))
    return found


@given(st.lists(CUTS, max_size=6), st.lists(RUNS, max_size=3), st.sampled_from(("ring", "windows", "both")), SIZES)
def test_the_device_has_what_the_files_have(
    files: list[tuple[int, bytes]],
    cuts: list[tuple[int, int, int]],
    runs: list[tuple[int, int, list[int]]],
    way: Way,
    sizes: tuple[int, int, int],
) -> None:
    pages, threads, buffers = sizes
    driver = DriverDouble(slowest_s=0.0002)
    config = StagingConfig(
        way=way,
        threads=threads,
        buffers=buffers,
        buffer_bytes=pages * PAGE_BYTES,
        window_threads=threads,
        window_bytes=pages * PAGE_BYTES,
    )
    wanted = cut(cuts, runs)
    addresses = [driver.device_memory(nbytes) for _, _, nbytes in wanted]
    pieces = [
        Piece(files[file][0], offset, nbytes, address)
        for (file, offset, nbytes), address in zip(wanted, addresses, strict=True)
    ]
    pool = Staging(driver, config=config)
    copied = pool.copy(pieces)
    pool.close()
    driver.check()
    assert copied.nbytes == sum(nbytes for _, _, nbytes in wanted)
    for (file, offset, nbytes), address in zip(wanted, addresses, strict=True):
        assert driver.bytes_at(address, nbytes) == files[file][1][offset : offset + nbytes]


def test_a_buffer_is_of_pages() -> None:
    with pytest.raises(ValueError, match="no multiple"):
        jobs_of([], PAGE_BYTES + 1)
    with pytest.raises(ValueError, match="no piece"):
        jobs_of([Piece(3, -1, 5, 0)], PAGE_BYTES)
