"""Bytes of files that are to be on a GPU, cut into reads of one buffer each. Pure and synchronous.

A copy is never of two pieces, even where their addresses meet: those may be of two allocations, which no copy may span.
A read begins at the start of a page and is of one buffer at most, so that it can go past the page cache (O_DIRECT) or
be a window of a mapping without being cut anew. Pieces that lie one behind the other in a file share a read even where
their addresses do not: a thousand small tensors are a few reads with a thousand copies. Small holes between them are
read as well, because a read costs more than 64 KiB do.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from typing import Final, NamedTuple

PAGE_BYTES: Final = mmap.PAGESIZE
_HOLE_BYTES: Final = 64 << 10


class Piece(NamedTuple):
    """Bytes of a file, and where on the device they go.

    Attributes:
        fd: open for reading, and kept open until the copy is over; its position is neither used nor moved.
        offset: of the first byte in the file.
        nbytes: 0 is nothing to do.
        address: of the first byte on the device, as the driver counts (CUdeviceptr), of any alignment.
    """

    fd: int
    offset: int
    nbytes: int
    address: int


class Span(NamedTuple):
    """A part of a job that goes to one address: `nbytes` bytes from `at`, counted from the job's first byte."""

    at: int
    nbytes: int
    address: int


class Job(NamedTuple):
    """One read and its copies.

    Attributes:
        fd: see Piece.
        offset: a multiple of PAGE_BYTES.
        nbytes: up to the end of the last span, one buffer at most; rounded up to pages it still is.
        spans: in the file's order; they never overlap.
    """

    fd: int
    offset: int
    nbytes: int
    spans: tuple[Span, ...]


def jobs_of(pieces: Iterable[Piece], job_bytes: int) -> list[Job]:
    """Cut pieces into jobs, in the pieces' order.

    Args:
        pieces: what is to be copied; the same bytes may go to several addresses.
        job_bytes: the most a job reads, a multiple of PAGE_BYTES.

    Raises:
        ValueError: a number is negative, or `job_bytes` no multiple of PAGE_BYTES.
    """
    if job_bytes <= 0 or job_bytes % PAGE_BYTES:
        raise ValueError(f"a buffer of {job_bytes} bytes is no multiple of {PAGE_BYTES}")
    jobs: list[Job] = []
    fd, start, end = -1, 0, 0
    spans: list[Span] = []
    for piece in pieces:
        if min(piece) < 0:
            raise ValueError(f"no piece of a file: {piece}")
        offset, left, address = piece.offset, piece.nbytes, piece.address
        while left:
            if piece.fd != fd or not end <= offset <= end + _HOLE_BYTES or offset >= start + job_bytes:
                if spans:
                    jobs.append(Job(fd, start, end - start, tuple(spans)))
                fd, start, spans = piece.fd, offset // PAGE_BYTES * PAGE_BYTES, []
            taken = min(left, start + job_bytes - offset)
            spans.append(Span(offset - start, taken, address))
            offset, left, address = offset + taken, left - taken, address + taken
            end = offset
    if spans:
        jobs.append(Job(fd, start, end - start, tuple(spans)))
    return jobs


def cut(job: Job, job_bytes: int) -> list[Job]:
    """A job as jobs of `job_bytes` at most, see `jobs_of`."""
    if job.nbytes <= job_bytes:
        return [job]
    return jobs_of((Piece(job.fd, job.offset + at, nbytes, address) for at, nbytes, address in job.spans), job_bytes)


def split(pieces: Iterable[Piece], nbytes: int) -> tuple[list[Piece], list[Piece]]:
    """The first `nbytes` bytes of pieces, or all there are, and the rest."""
    head: list[Piece] = []
    tail: list[Piece] = []
    for piece in pieces:
        taken = min(piece.nbytes, nbytes)
        nbytes -= taken
        if taken:
            head.append(piece._replace(nbytes=taken))
        if taken < piece.nbytes:
            fd, offset, whole, address = piece
            tail.append(Piece(fd, offset + taken, whole - taken, address + taken))
    return head, tail
