"""Where bytes of weight files stand in a page image.

A process that has read its weights holds them as the file does, in long runs: whole files, tensors one by one, slices,
several tensors side by side. So a few bytes of each weight file are remembered, at every tensor's start and in regular
steps from there (anchors), and a page image is looked through for them. Whatever looks like an anchor is compared with
the file and followed in both directions for as long as pages are the same: nothing but a comparison of bytes decides.

Anchors are windows of 64 bytes, of which every eighth byte begins one; images are looked at every 64 bytes. So a run is
found wherever its tensor, or its file, would begin at a multiple of 8 bytes, as allocators of processors and GPUs place
them (16 or more). What stays unfound: other dtypes, transposed tensors, slices of columns whose rows
are short, runs under 64 KiB.

Importing this takes the time that NumPy takes. Its functions drop the GIL, as do reads.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from checkpoint.errors import CheckpointError, RetryError
from weightfs.errors import FormatError
from weightfs.formats import format_of, parse_header

PAGE_BYTES: Final = 4096
SHORTEST_BYTES: Final = 64 << 10
"""A run of fewer is not worth a reference."""
_STEP_BYTES: Final = 64 << 10
"""Between windows at most, as far as tensors lie side by side: 64 bytes more of a run always hold one."""
_MOST_WINDOWS: Final = 1 << 20
"""More weights than 64 GiB have anchors further apart. A window costs 1.5 us to read, and 130 bytes of memory."""
_MOST_READERS: Final = 2
"""Each window is a call that gives the GIL up. On two processors 1, 2 and 16 threads take 14 ms for 384 MiB."""
_WINDOW_BYTES: Final = 64
_WORD_BYTES: Final = 8
_BATCH: Final = 4096
_PLACES: Final = 4
"""So often the same bytes are tried where several places have them, such as copies of a file or tied weights."""
_ATTEMPTS: Final = 2
"""So often an anchor may mislead within one window: bytes that are common are no anchor."""
_SPREADS: Final = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F))
"""Two ways to find an anchor's place in a table of all (a Bloom filter): what both say is one in 70 that is none."""
_BLOCKS: Final = (64 << 10, 256 << 10, 1 << 20)
"""How much is compared at once, more the longer a run has been."""

Bytes: TypeAlias = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFile:
    """A weight file that is open.

    Attributes:
        path: for errors.
        fd: to read it with; belongs to whoever opened it.
        nbytes: its size.
        tensors: offset and length in bytes of each, ascending; of a file without a header that says so, all of it.
    """

    path: str
    fd: int
    nbytes: int
    tensors: tuple[tuple[int, int], ...]


class Match(NamedTuple):
    """The bytes `[start, end)` of an image, whole pages, are those from `offset` on of weight file number `file`."""

    start: int
    end: int
    file: int
    offset: int


@contextlib.contextmanager
def opened(paths: Iterable[str]) -> Iterator[tuple[WeightFile, ...]]:
    """Open weight files, in the given order, for as long as the context lasts.

    Whether they change meanwhile is not looked at but where a file becomes shorter: `checkpoint.weights` does that.

    Raises:
        CheckpointError: one can't be read.
        RetryError: one changes.
    """
    with contextlib.ExitStack() as held:
        yield tuple(_opened(path, held) for path in paths)


def _opened(path: str, held: contextlib.ExitStack) -> WeightFile:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        held.callback(os.close, fd)
        nbytes = os.fstat(fd).st_size
    except OSError as e:
        raise _unreadable(path, e) from e

    def read(offset: int, length: int) -> bytes:
        if len(found := _pread(path, fd, length, offset)) != length:
            raise _shorter(path)
        return found

    tensors: tuple[tuple[int, int], ...] = ((0, nbytes),)
    if format_of(os.path.basename(path)) is not None:
        with contextlib.suppress(FormatError):  # then it is bytes, whatever its name says
            layout = parse_header(os.path.basename(path), nbytes, read)
            tensors = tuple((tensor.offset, tensor.nbytes) for tensor in layout.tensors)
    return WeightFile(path=path, fd=fd, nbytes=nbytes, tensors=tensors)


class Anchors:
    """What to look for. Never changes: any number of `Finder`s may share one.

    Args:
        files: in the order of `Manifest.weights`; they must stay open.
        threads: that may read them.

    Raises:
        CheckpointError: one can't be read.
        RetryError: one changes.
    """

    def __init__(self, files: Sequence[WeightFile], *, threads: int) -> None:
        self.files: Final = tuple(files)
        words, numbers, offsets = _all_anchors(files, threads)
        order = np.argsort(words, kind="stable")
        words = words[order]
        kept = np.arange(len(words)) - np.searchsorted(words, words) < _PLACES
        self._words: Final = words[kept]
        self._numbers: Final = numbers[order[kept]]
        self._offsets: Final = offsets[order[kept]]
        bits = min(26, max(16, (16 * len(self._words)).bit_length()))
        self._shift: Final = np.uint64(64 - bits)
        self._table: Final = np.zeros(1 << bits, dtype=np.bool_)
        for spread in _SPREADS:
            self._table[self._slots(self._words, spread)] = True

    def __len__(self) -> int:
        return len(self._words)

    def _slots(self, words: NDArray[np.uint64], spread: np.uint64) -> NDArray[np.int64]:
        return (words * spread >> self._shift).view(np.int64)  # NumPy would convert unsigned ones to look up

    def seen(self, content: Bytes, begin: int) -> Iterator[tuple[int, int]]:
        """Where anchors stand, ascending: place in `content` and number of the first anchor with these bytes.

        Args:
            content: of any length.
            begin: from where on, a multiple of `PAGE_BYTES`.
        """
        if not len(self._words) or begin >= len(content):
            return
        words = content[begin : len(content) // _WINDOW_BYTES * _WINDOW_BYTES].view(np.uint64)[
            :: _WINDOW_BYTES // _WORD_BYTES
        ]
        likely = np.flatnonzero(self._table[self._slots(words, _SPREADS[0])])
        likely = likely[self._table[self._slots(words[likely], _SPREADS[1])]]
        words = words[likely]
        numbers = np.searchsorted(self._words, words)
        same = self._words[np.minimum(numbers, len(self._words) - 1)] == words
        yield from zip((likely[same] * _WINDOW_BYTES + begin).tolist(), numbers[same].tolist(), strict=True)

    def places(self, number: int) -> list[tuple[int, int]]:
        """File number and offset of the anchors that have the same bytes as the one of that number, the first."""
        end = number + 1
        while end < len(self._words) and self._words[end] == self._words[number]:
            end += 1
        return list(zip(self._numbers[number:end].tolist(), self._offsets[number:end].tolist(), strict=True))


class Finder:
    """Finds weights in parts of images. Has a buffer of 1 MiB; for one thread at a time."""

    def __init__(self, anchors: Anchors) -> None:
        self._anchors = anchors
        self._buffer = np.empty(_BLOCKS[-1], dtype=np.uint8)

    def find(self, content: Bytes, before: tuple[int, int, int] | None = None) -> list[Match]:
        """The weights in some pages, ascending, none overlapping, each of at least `SHORTEST_BYTES`.

        Args:
            content: whole pages. Places in matches count from where it begins.
            before: where to begin, the number of the file, and its offset there, of a run that came so far: whether it
                goes on is looked at first, and nothing before is. That costs half of what looking for anchors does. It
                may go on for less than `SHORTEST_BYTES`.

        Raises:
            CheckpointError: a weight file can't be read.
            RetryError: it became shorter.
        """
        found: list[Match] = []
        reached = begin = 0
        if before is not None:
            begin, file, offset = before
            highest = min(len(content), begin + (self._anchors.files[file].nbytes - offset) // PAGE_BYTES * PAGE_BYTES)
            reached = self._extend(content, begin, highest, file, offset - begin)
            if reached > begin:
                found.append(Match(begin, reached, file, offset))
        attempts: dict[int, int] = {}
        for at, number in self._anchors.seen(content, reached):
            if at < reached or attempts.get(number, 0) >= _ATTEMPTS:
                continue
            best = self._longest(content, at, number, reached)
            if best is None or best.end - best.start < SHORTEST_BYTES:
                attempts[number] = attempts.get(number, 0) + 1
            else:
                found.append(best)
                reached = best.end
        return found

    def _longest(self, content: Bytes, at: int, number: int, reached: int) -> Match | None:
        best: Match | None = None
        for file, offset in self._anchors.places(number):
            match = self._follow(content, at, reached, file, offset - at)
            if match is not None and (best is None or match.end - match.start > best.end - best.start):
                best = match
                if (best.start, best.end) == (reached, len(content)):
                    break
        return best

    def _follow(self, content: Bytes, at: int, reached: int, file: int, shift: int) -> Match | None:
        """The longest run around `at`, not from before `reached`, of bytes that are `shift` further on in a file."""
        lowest = max(reached, -(shift // PAGE_BYTES) * PAGE_BYTES)
        highest = min(len(content), (self._anchors.files[file].nbytes - shift) // PAGE_BYTES * PAGE_BYTES)
        start = max(at // PAGE_BYTES * PAGE_BYTES, lowest)
        for first in (start, start + PAGE_BYTES):  # where a tensor begins within a page, only the next one is its own
            if first < highest and self._same(content, first, min(first + PAGE_BYTES, highest), file, shift)[0]:
                break
        else:
            return None
        end = self._extend(content, first + PAGE_BYTES, highest, file, shift)
        begin = first if first > start else self._extend_back(content, first, lowest, file, shift)
        return Match(begin, end, file, begin + shift)

    def _extend(self, content: Bytes, end: int, highest: int, file: int, shift: int) -> int:
        """How far pages are the same from `end` on."""
        for nbytes in _growing():
            stop = min(end + nbytes, highest)
            if stop <= end:
                break
            same = self._same(content, end, stop, file, shift)
            if not same.all():
                return end + int(same.argmin()) * PAGE_BYTES
            end = stop
        return end

    def _extend_back(self, content: Bytes, begin: int, lowest: int, file: int, shift: int) -> int:
        """How far pages are the same before `begin`."""
        for nbytes in _growing():
            stop = max(begin - nbytes, lowest)
            if stop >= begin:
                break
            same = self._same(content, stop, begin, file, shift)
            if not same.all():
                return begin - int(same[::-1].argmin()) * PAGE_BYTES
            begin = stop
        return begin

    def _same(self, content: Bytes, start: int, end: int, file: int, shift: int) -> NDArray[np.bool_]:
        """Of each page in `[start, end)` whether it is the file's."""
        weight = self._anchors.files[file]
        buffer = self._buffer[: end - start]
        view = buffer.data
        filled = 0
        while filled < len(view):
            try:
                count = os.preadv(weight.fd, [view[filled:]], start + shift + filled)
            except OSError as e:
                raise _unreadable(weight.path, e) from e
            if not count:
                raise _shorter(weight.path)
            filled += count
        equal = content[start:end].view(np.uint64) == buffer.view(np.uint64)
        if equal.all():
            return np.ones((end - start) // PAGE_BYTES, dtype=np.bool_)
        pages: NDArray[np.bool_] = equal.reshape(-1, PAGE_BYTES // _WORD_BYTES).all(axis=1)
        return pages


def _growing() -> Iterator[int]:
    yield from _BLOCKS
    while True:
        yield _BLOCKS[-1]


def _all_anchors(
    files: Sequence[WeightFile], threads: int
) -> tuple[NDArray[np.uint64], NDArray[np.int32], NDArray[np.int64]]:
    """The bytes of each, the number of its file, and where it is there."""
    step_bytes = _STEP_BYTES
    while sum(file.nbytes for file in files) > step_bytes * _MOST_WINDOWS:
        step_bytes *= 2
    words = [np.empty(0, dtype=np.uint64)]
    numbers = [np.empty(0, dtype=np.int32)]
    offsets = [np.empty(0, dtype=np.int64)]
    with ThreadPoolExecutor(min(threads, _MOST_READERS)) as pool:
        for number, file in enumerate(files):
            windows = _windows(file, step_bytes)
            batches = [windows[at : at + _BATCH] for at in range(0, len(windows), _BATCH)]
            read = pool.map(_read_windows, [file] * len(batches), batches)
            for batch, content in zip(batches, read, strict=True):
                rows, columns = np.nonzero(_are_anchors(content))
                words.append(content[rows, columns])
                numbers.append(np.full(len(rows), number, dtype=np.int32))
                offsets.append(np.array(batch, dtype=np.int64)[rows] + columns * _WORD_BYTES)
    return np.concatenate(words), np.concatenate(numbers), np.concatenate(offsets)


def _windows(file: WeightFile, step_bytes: int) -> list[int]:
    """Offsets of the windows of a file. Small tensors share them."""
    found: list[int] = []
    last = -step_bytes
    for offset, nbytes in file.tensors:
        if nbytes < SHORTEST_BYTES and offset + nbytes - last <= step_bytes:
            continue
        starts = range(offset, offset + max(nbytes - _WINDOW_BYTES, 1), step_bytes)
        found += starts
        if offset % _WORD_BYTES:  # as it lies in a copy of the whole file, which is a multiple of 8 bytes away
            found += [start + -start % _WORD_BYTES for start in starts]
        last = starts[-1]
    return [start for start in found if start + _WINDOW_BYTES <= file.nbytes]


def _read_windows(file: WeightFile, offsets: Sequence[int]) -> NDArray[np.uint64]:
    """A row for each."""
    content = b"".join(_pread(file.path, file.fd, _WINDOW_BYTES, offset) for offset in offsets)
    if len(content) != _WINDOW_BYTES * len(offsets):
        raise _shorter(file.path)
    return np.frombuffer(content, dtype=np.uint64).reshape(-1, _WINDOW_BYTES // _WORD_BYTES)


def _are_anchors(windows: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which words are anchors: those that are not one number over and over, of 1, 2, 4 or 8 bytes."""
    half = np.uint64(32)
    constant = (windows == windows[:, :1]).all(axis=1)
    found: NDArray[np.bool_] = (windows != (windows << half | windows >> half)) & ~constant[:, None]
    return found


def _pread(path: str, fd: int, length: int, offset: int) -> bytes:
    try:
        return os.pread(fd, length, offset)
    except OSError as e:
        raise _unreadable(path, e) from e


def _shorter(path: str) -> RetryError:
    return RetryError("became shorter while it was read", path=path, mend="try again when nobody writes it")


def _unreadable(path: str, error: OSError) -> CheckpointError:
    return CheckpointError(f"can't be read: {os.strerror(error.errno or 0)}", path=path)
