"""What of a model is still to be read, in which order: that of its plan, until its loader is seen to read elsewhere.

A loader that reads a model in another order than foreseen waits for the disk, beside the filler, at each place where
the filler was not yet: with `read_ahead_kb` 128 it gets 0.15 GB/s there of a disk that gives the filler 1.5. So the
filler looks for parts that it did not read and that came into memory nevertheless, and goes on from there in the order
of the files, which is how loaders read on. Pure: who asks says how much of a part is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from prefetch.plan import Extent

CHUNK_BYTES: Final = 4 << 20
"""What a thread reads before it looks whether somebody else is to have the disk."""
RUN_BYTES: Final = 16 << 20
"""What it reads where nobody is: each run begins with small pages (see `Stream`), and where a loader comes up to the
filler it disturbs fewer of them. Of a loader beside it at `read_ahead_kb` 128, medians of 5 rounds in turn: 1.4 GB/s
with runs of 4 MiB, 1.8 with 16, 1.6 with 32, and 0.8 without the filler, which takes 0.17, 0.12 and 0.12 s a GB."""
EARLY_BYTES: Final = 256 << 20
"""So much is read in chunks, for the first layers to be there first: eight threads are in 128 MiB of runs at once."""
_PIECE_BYTES: Final = 64 << 20
"""Of so much together it is asked how much is in memory."""
_GAIN_BYTES: Final = 2 << 20
"""Less than that is headers, and first pages of tensors: who maps a file may look at each of them before it reads."""
_SEEN_BYTES: Final = 1 << 20


class Course(Iterator[Extent]):
    """Reads of `CHUNK_BYTES` at most, then of `RUN_BYTES`, which end where a multiple of that does.

    For one thread at a time.

    Args:
        extents: in the order to read them.
        early_bytes: how much of them is read in chunks.
    """

    def __init__(self, extents: Iterable[Extent], early_bytes: int = EARLY_BYTES) -> None:
        self._left = list(extents)[::-1]
        self._early_bytes = early_bytes

    def __next__(self) -> Extent:
        if not self._left:
            raise StopIteration
        first, rest = _split(self._left.pop(), CHUNK_BYTES if self._early_bytes > 0 else RUN_BYTES)
        self._left += rest
        self._early_bytes -= first.nbytes
        return first

    def put_back(self, extent: Extent) -> None:
        """Have that read next, after all."""
        self._left.append(extent)

    def left(self) -> list[Extent]:
        """What no read began of, in order. From any thread."""
        return self._left[::-1]

    def lead(self, place: Extent) -> None:
        """Go on with what lies at and behind the beginning of `place`, in the order of the files; then all the rest."""
        here, before = [], []
        for extent in sorted(self._left, key=lambda one: (one.file, one.offset)):
            if (extent.file, extent.end) <= (place.file, place.offset):
                before.append(extent)
            elif (extent.file, extent.offset) >= (place.file, place.offset):
                here.append(extent)
            else:
                before.append(Extent(extent.file, extent.offset, place.offset - extent.offset))
                here.append(Extent(extent.file, place.offset, extent.end - place.offset))
        self._left = (here + before)[::-1]


class Lookout:
    """Looks for the loader of what is being read, now and then.

    Args:
        resident: bytes in memory of an extent.
    """

    def __init__(self, resident: Callable[[Extent], int]) -> None:
        self._resident = resident
        self._seen: dict[tuple[str, int], int] = {}  # bytes in memory, by where a piece begins

    def elsewhere(self, left: list[Extent]) -> Extent | None:
        """Where somebody else has read most of what is `left` since the last look: what lies behind that.

        Args:
            left: what we did not begin to read; its first piece, which is begun next, does not count.
        """
        before, most, where = self._seen, _GAIN_BYTES, None
        self._seen = {}
        pieces = (piece for extent in left for piece in _cut(extent, _PIECE_BYTES))
        for number, piece in enumerate(pieces):
            key = piece.file, piece.offset
            found = self._seen[key] = self._resident(piece)
            gained = found - before.get(key, found)
            if gained >= most and number:
                most, where = gained, piece
        return None if where is None else self._behind(where)

    def _behind(self, piece: Extent) -> Extent | None:
        """What of a piece lies behind the last of its chunks that is in memory, nearly; its end if that is the last."""
        last = None
        for chunk in _cut(piece, CHUNK_BYTES):
            if chunk.nbytes >= _SEEN_BYTES and self._resident(chunk) * 4 >= chunk.nbytes * 3:
                last = chunk
        return None if last is None else Extent(piece.file, last.end, piece.end - last.end)


def _split(extent: Extent, nbytes: int) -> tuple[Extent, list[Extent]]:
    """What of an extent comes before the next multiple, and what is left of it, if any is."""
    end = min(extent.end, (extent.offset // nbytes + 1) * nbytes)
    rest = [Extent(extent.file, end, extent.end - end)] if end < extent.end else []
    return Extent(extent.file, extent.offset, end - extent.offset), rest


def _cut(extent: Extent, nbytes: int) -> Iterator[Extent]:
    rest = [extent]
    while rest:
        first, rest = _split(rest[0], nbytes)
        yield first
