"""A file of CRIU's images as a recipe: zeros, weights that are elsewhere already, and chunks of what is left.

Twice over the file, both times with many threads. First each page is looked at: is it zeros, is it a page of a weight
file, might a chunk begin there. Then what is left is read again, cut, and handed over chunk by chunk.

Chunks begin where the content says so. Page images hold one mapping after the other, so a page more in the first one
shifts all that follows; cut at multiples of a size, the next snapshot of the same server would share nothing behind it.

Importing this takes the time that NumPy takes.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from checkpoint.errors import CheckpointError
from checkpoint.extents import ChunkBytes, Extent, Recipe, WeightBytes, Zero
from checkpoint.weightfinding import PAGE_BYTES, SHORTEST_BYTES, Anchors, Finder, Match

MOST_CHUNK_BYTES: Final = 256 << 10
"""The largest chunk that is cut.

Two snapshots of one transformers server on a CPU, 302 MiB each, in MiB after zstd level 1; cut at multiples of 64, 256,
512 KiB the first takes 81, 78, 78 and the second adds 47, 52, 54. Cut by content, by the pages that a chunk has at
least, one of which may begin one, and that it has at most: 4, 16, 32 takes 80.6 and 14.5; 8, 16, 64 takes 79.8 and
17.1; 8, 32, 64 takes 79.1 and 20.0; 16, 64, 128 takes 78.7 and 26.1. Finer ones cost more to read back: as it is, a
chunk has 84 KiB.
"""
_LEAST_CHUNK_PAGES: Final = 8
_MOST_CHUNK_PAGES: Final = MOST_CHUNK_BYTES // PAGE_BYTES
_CUT_ONE_OF: Final = 16
"""Of so many pages one may begin a chunk; a power of two."""
_LEAST_ZERO_PAGES: Final = 4
"""Fewer zeros stay in their chunk, where they cost next to nothing."""
_PIECE_PAGES: Final = 1024
_MOST_TOGETHER: Final = 16
"""So many pieces, one after the other, are one thread's: a run of weights is followed from each into the next.

So 16 threads on two processors give way to each other 540 times for 384 MiB, not 5300; what that is worth on 16
processors was not measured.
"""
_MARGIN_PAGES: Final = 2 * SHORTEST_BYTES // PAGE_BYTES
"""Seen on both sides of a piece as well, so that of a run that begins or ends near its edge enough shows to find it."""
_WORDS: Final = PAGE_BYTES // 8
_SAMPLED: Final = slice(3, None, 16)
"""The words of a page that say whether a chunk may begin there."""
_MIX: Final = np.cumprod(np.full(32, 0x9E3779B97F4A7C15, dtype=np.uint64))
"""Never to change: chunks of older snapshots would not be met again."""

AddChunk: TypeAlias = Callable[[memoryview], bytes]
"""Gives a chunk's id, 32 bytes. Called by many threads at once. The bytes are there for the length of the call only."""
Pages: TypeAlias = NDArray[np.bool_]
T = TypeVar("T")


def ingest(path: str, anchors: Anchors, add_chunk: AddChunk, *, threads: int) -> Recipe:
    """Take a file in. It must not change meanwhile; what is a weight's was compared with that file byte by byte.

    Args:
        path: of the file, of any size.
        anchors: of the weight files that it may have bytes of; whether those change is for the caller to see.
        add_chunk: takes what is neither zeros nor weights.
        threads: that read, compare, and call `add_chunk`, 1 or more. Each has 6 MiB of memory.

    Returns:
        What the file is made of. Zeros and weights are whole pages.

    Raises:
        CheckpointError: the file, or a weight file, can't be read.
        RetryError: a weight file became shorter.
        Exception: whatever `add_chunk` raises.
    """
    image = _Image(path)
    try:
        survey = _surveyed(image, anchors, threads)
        spans = list(_spans(survey, image.nbytes))
        identifiers = _added(image, [span for span in spans if span.extent is None], add_chunk, threads)
    finally:
        image.close()
    return Recipe([span.extent or ChunkBytes(identifiers[span.start], span.end - span.start) for span in spans])


class _Image:
    """The file, open."""

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.nbytes: Final = os.fstat(self._fd).st_size
        except OSError as e:
            raise self._unreadable(e) from e

    def close(self) -> None:
        os.close(self._fd)

    def read(self, into: memoryview, at: int) -> None:
        """Fill all of it."""
        filled = 0
        while filled < len(into):
            try:
                count = os.preadv(self._fd, [into[filled:]], at + filled)
            except OSError as e:
                raise self._unreadable(e) from e
            if not count:
                raise CheckpointError("became shorter while it was read", path=self._path)
            filled += count

    def _unreadable(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"can't be read: {os.strerror(error.errno or 0)}", path=self._path)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Survey:
    """What was seen of a file's whole pages.

    Attributes:
        zero: whether a page is zeros.
        cuts: whether a chunk may begin there.
        matches: pages of weights, ascending, none overlapping.
    """

    zero: Pages
    cuts: Pages
    matches: list[Match]


class _Span(NamedTuple):
    """The bytes `[start, end)` of a file; None stands for a chunk."""

    start: int
    end: int
    extent: Extent | None


def _surveyed(image: _Image, anchors: Anchors, threads: int) -> _Survey:
    count = image.nbytes // PAGE_BYTES
    zero, cuts = np.zeros(count, dtype=np.bool_), np.zeros(count, dtype=np.bool_)
    found: list[Match] = []

    def work(pieces: Iterator[int]) -> None:
        finder = Finder(anchors)
        buffer = np.empty((_PIECE_PAGES + 2 * _MARGIN_PAGES) * PAGE_BYTES, dtype=np.uint8)
        for begin in pieces:
            reached: Match | None = None
            for start in range(begin, min(begin + together, count), _PIECE_PAGES):
                end = min(start + _PIECE_PAGES, count)
                first, last = max(0, start - _MARGIN_PAGES), min(end + _MARGIN_PAGES, count)
                content = buffer[: (last - first) * PAGE_BYTES]
                image.read(content.data, first * PAGE_BYTES)
                here = [
                    clipped
                    for match in finder.find(content, _going_on(reached, start, first))
                    if (clipped := _clipped(match, first * PAGE_BYTES, start * PAGE_BYTES, end * PAGE_BYTES))
                ]
                found.extend(here)
                reached = here[-1] if here and here[-1].end == end * PAGE_BYTES else None
                if reached is None or reached.start > start * PAGE_BYTES:
                    pages = content.view(np.uint64).reshape(-1, _WORDS)[start - first : end - first]
                    zero[start:end] = _zero(pages)
                    cuts[start:end] = _cuts(pages)

    together = _PIECE_PAGES * max(1, min(_MOST_TOGETHER, count // _PIECE_PAGES // (4 * threads)))
    _together(work, range(0, count, together), threads)
    return _Survey(zero=zero, cuts=cuts, matches=list(_joined(sorted(found))))


def _going_on(reached: Match | None, start: int, first: int) -> tuple[int, int, int] | None:
    """What `Finder.find` is to look at first in what begins at page `first`: a run that came up to page `start`."""
    if reached is None:
        return None
    return (start - first) * PAGE_BYTES, reached.file, reached.offset + reached.end - reached.start


def _clipped(match: Match, moved: int, low: int, high: int) -> Match | None:
    """A match `moved` bytes further on, what is within `[low, high)` of it; None where that is nothing."""
    start, end = max(match.start + moved, low), min(match.end + moved, high)
    return Match(start, end, match.file, match.offset + start - match.start - moved) if start < end else None


def _zero(pages: NDArray[np.uint64]) -> Pages:
    """Which pages are zeros: of most, a few words say that they are not."""
    likely = np.flatnonzero(~pages[:, _SAMPLED].any(axis=1))
    found = np.zeros(len(pages), dtype=np.bool_)
    found[likely] = ~pages[likely].any(axis=1)
    return found


def _cuts(pages: NDArray[np.uint64]) -> Pages:
    """Where chunks may begin, told by the page alone: the same wherever it stands, in any snapshot."""
    mixed = (pages[:, _SAMPLED] * _MIX).sum(axis=1, dtype=np.uint64)
    found: Pages = mixed >> np.uint64(32) & np.uint64(_CUT_ONE_OF - 1) == 0
    return found


def _joined(matches: Iterable[Match]) -> Iterator[Match]:
    """Those that go on in the next piece as one, without what is too short."""
    last: Match | None = None
    for match in matches:
        if last is not None and _goes_on(last, match):
            last = Match(last.start, match.end, last.file, last.offset)
        else:
            if last is not None and last.end - last.start >= SHORTEST_BYTES:
                yield last
            last = match
    if last is not None and last.end - last.start >= SHORTEST_BYTES:
        yield last


def _goes_on(one: Match, other: Match) -> bool:
    return (one.end, one.file, one.offset + one.end - one.start) == (other.start, other.file, other.offset)


def _spans(survey: _Survey, nbytes: int) -> Iterator[_Span]:
    """The whole file, in order."""
    reached = 0
    for extent_at, extent in sorted(_elsewhere(survey), key=lambda one: one[0]):
        yield from _chunks(survey.cuts, reached, extent_at)
        yield _Span(extent_at, extent_at + extent.nbytes, extent)
        reached = extent_at + extent.nbytes
    yield from _chunks(survey.cuts, reached, nbytes)


def _elsewhere(survey: _Survey) -> Iterator[tuple[int, Extent]]:
    """Weights and zeros, each with its place; zeros among weights are the weights'."""
    zero = survey.zero.copy()
    for match in survey.matches:
        zero[match.start // PAGE_BYTES : match.end // PAGE_BYTES] = False
        yield match.start, WeightBytes(match.file, match.offset, match.end - match.start)
    edges = np.flatnonzero(np.diff(zero.astype(np.int8), prepend=0, append=0)).tolist()
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        if end - start >= _LEAST_ZERO_PAGES:
            yield start * PAGE_BYTES, Zero((end - start) * PAGE_BYTES)


def _chunks(cuts: Pages, start: int, end: int) -> Iterator[_Span]:
    """Cut what begins at a page; at its end a file may have a part of one."""
    first = start // PAGE_BYTES
    marks = (np.flatnonzero(cuts[first : -(-end // PAGE_BYTES)]) + first).tolist()
    index = 0
    while start < end:
        least, most = start // PAGE_BYTES + _LEAST_CHUNK_PAGES, start // PAGE_BYTES + _MOST_CHUNK_PAGES
        index = bisect.bisect_left(marks, least, index)
        stop = min(end, PAGE_BYTES * min(most, marks[index] if index < len(marks) else most))
        yield _Span(start, stop, None)
        start = stop


def _added(image: _Image, spans: list[_Span], add_chunk: AddChunk, threads: int) -> dict[int, bytes]:
    """Ids by where the chunk begins."""
    found: dict[int, bytes] = {}

    def work(shared: Iterator[_Span]) -> None:
        buffer = memoryview(bytearray(MOST_CHUNK_BYTES))
        for span in shared:
            content = buffer[: span.end - span.start]
            image.read(content, span.start)
            found[span.start] = add_chunk(content)

    _together(work, spans, threads)
    return found


def _together(work: Callable[[Iterator[T]], None], items: Sequence[T], threads: int) -> None:
    """Have threads share items until none are left, or one failed: then the others stop, and its error is raised."""
    shared = iter(items)

    def share() -> None:
        try:
            work(shared)
        except BaseException:
            for _ in shared:
                pass
            raise

    threads = min(threads, len(items))
    if threads <= 1:
        work(shared)
        return
    with ThreadPoolExecutor(threads) as pool:
        running = [pool.submit(share) for _ in range(threads)]
        try:
            for one in running:
                one.result()
        finally:
            for _ in shared:
                pass
