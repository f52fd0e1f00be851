"""The order in which a loader wants a model, from the reads it was seen to make. Pure; see `prefetch.orders` for files.

What is observed of a loader is coarser than what it asked for: the kernel reads ahead of it, in chunks, and its threads
come in any order. So the order that is learned is one of tensors, each as a whole.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import Final

from prefetch.plan import Extent
from weightfs.formats.layout import WeightLayout

MAX_EXTENTS: Final = 4096
"""Of one learned order. What comes after is read as `plan_of` would anyway."""
TOUCH_BYTES: Final = 512 << 10
"""So much of a larger tensor must have been read. At a read-ahead of 128 KiB the kernel reads 64 KiB before a page
fault (seen with safetensors) and up to 256 KiB behind a read, which may be the neighbours'."""


def learn(layout: WeightLayout, sizes: Mapping[str, int], reads: Iterable[Extent]) -> list[Extent]:
    """The extents a loader wanted, in order of first touch, each byte once.

    A tensor, with the gap behind it, counts as touched once `TOUCH_BYTES` of it were read, or all of it. One of which
    less was read is passed over: nobody asked for it, or for hardly any of it. The header is an extent like any other.

    Args:
        layout: of all the model's files; reads of other files, or behind a file's end, are passed over.
        sizes: of each file in bytes.
        reads: as observed, in order of time.

    Returns:
        `MAX_EXTENTS` at most; neighbours that were touched one after the other are one extent.
    """
    starts = {file: sorted(found) for file, found in _starts(layout, sizes).items()}
    touched: dict[tuple[str, int], None] = {}  # file and position, in order
    missing: dict[tuple[str, int], int] = {}  # bytes that a touch still takes
    for read in reads:
        begins = starts.get(read.file)
        if not begins or read.offset < 0 or read.nbytes <= 0 or read.offset >= sizes[read.file]:
            continue
        for position in range(bisect_right(begins, read.offset) - 1, len(begins)):
            begin, end = _bounds(begins, position, sizes[read.file])
            if begin >= read.end:
                break
            one = read.file, position
            if one not in touched:
                there = min(read.end, end) - max(read.offset, begin)
                missing[one] = missing.get(one, min(end - begin, TOUCH_BYTES)) - there
                if missing[one] <= 0:
                    touched[one] = None
    found: list[Extent] = []
    for file, position in touched:
        begin, end = _bounds(starts[file], position, sizes[file])
        if found and found[-1].file == file and found[-1].end == begin:
            found[-1] = Extent(file, found[-1].offset, end - found[-1].offset)
        elif len(found) == MAX_EXTENTS:
            break
        else:
            found.append(Extent(file, begin, end - begin))
    return found


def _bounds(starts: list[int], position: int, size: int) -> tuple[int, int]:
    """Begin and end of what begins at that position."""
    return starts[position], starts[position + 1] if position + 1 < len(starts) else size


def _starts(layout: WeightLayout, sizes: Mapping[str, int]) -> dict[str, set[int]]:
    """Where each file's header and its tensors begin."""
    found = {file: {0} if sizes[file] else set() for file in layout.files}
    for tensor in layout.tensors:
        if tensor.nbytes and tensor.offset < sizes[tensor.file]:
            found[tensor.file].add(tensor.offset)
    return found
