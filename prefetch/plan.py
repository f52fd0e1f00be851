"""What of a model is to be read, in which order: extents, in layers. Pure, no I/O."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from prefetch.order import Place, places
from weightfs.formats.layout import WeightLayout

PAGE_BYTES: Final = 4096
GAP_BYTES: Final = 1 << 20
"""A gap in a learned order that is smaller is read along: one large read takes less time than two."""
_HEADER: Final = ((-1, -1), "header")

_Key = tuple[Place, str]


@dataclass(frozen=True, slots=True)
class Extent:
    """The half-open byte range `[offset, offset + nbytes)` of one file, by its name in the model's folder."""

    file: str
    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.nbytes


@dataclass(frozen=True, slots=True)
class Layer:
    """What a loader needs together.

    Attributes:
        label: as users see it: `header`, `embedding`, a block's number, `norm`, `head`, `other`; see `places`.
        extents: in reading order, none overlapping another of the plan.
    """

    label: str
    extents: tuple[Extent, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all its extents."""
        return sum(extent.nbytes for extent in self.extents)


@dataclass(frozen=True, slots=True)
class Read:
    """One read of an order that does not follow the layers.

    Attributes:
        label: of the layer that all of it belongs to.
        extent: what to read.
    """

    label: str
    extent: Extent


@dataclass(frozen=True, slots=True)
class Plan:
    """Every byte of a model's files once, in the order to read them.

    Attributes:
        files: names within the model's folder, in shard order.
        layers: in the order a loader needs them; what is shown, counted and pinned.
        reads: the same bytes in the order to read them where that is another one (it was learned, or names say
            nothing of several files); empty where layers are read one after another.
    """

    files: tuple[str, ...]
    layers: tuple[Layer, ...]
    reads: tuple[Read, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(layer.nbytes for layer in self.layers)

    def steps(self) -> tuple[Layer, ...]:
        """What is read one after another: the layers, or runs of reads of one layer, which then may come twice."""
        if not self.reads:
            return self.layers
        runs = itertools.groupby(self.reads, key=lambda read: read.label)
        return tuple(Layer(label, tuple(read.extent for read in run)) for label, run in runs)

    def extents(self, labels: Collection[str] | None = None) -> Iterator[Extent]:
        """Every extent in reading order, or those of the layers named."""
        if self.reads:
            for read in self.reads:
                if labels is None or read.label in labels:
                    yield read.extent
            return
        for layer in self.layers:
            if labels is None or layer.label in labels:
                yield from layer.extents


def plan_of(layout: WeightLayout, sizes: Mapping[str, int], learned: Sequence[Extent] | None = None) -> Plan:
    """The plan of a model in the order a loader needs it: headers, then layers as `prefetch.order` has them.

    Args:
        layout: of all its files; tensors that overlap are no fault here.
        sizes: of each file in bytes; headers, padding and what lies behind the last tensor are read too. Gaps go with
            the tensor before them, and a page that layers share with the one needed first.
        learned: what a loader touched, in its order: is read first, in that order, each byte once. May be of part of
            the model only, and of files or ranges that are no more.
    """
    by_file: dict[str, list[tuple[int, _Key]]] = {file: [] for file in layout.files}
    keys = places(layout.tensors)
    for tensor, key in zip(layout.tensors, keys, strict=True):
        if tensor.nbytes:
            by_file[tensor.file].append((tensor.offset, key))
    found: dict[_Key, list[Extent]] = {}
    for file, starts in by_file.items():
        starts.sort()
        for key, extent in _runs(file, sizes[file], starts):
            found.setdefault(key, []).append(extent)
    layers = tuple(Layer(key[1], tuple(found[key])) for key in sorted(found))
    if not learned and len(layout.files) > 1 and all(label == "other" for _, label in keys):
        learned = [Extent(file, 0, sizes[file]) for file in layout.files]
    return Plan(layout.files, layers, tuple(_reads(layout.files, layers, learned)) if learned else ())


def whole_file_plan(layout: WeightLayout, sizes: Mapping[str, int]) -> Plan:
    """The plan that reads each file from its beginning to its end, a layer a file."""
    files = [file for file in layout.files if sizes[file]]
    return Plan(layout.files, tuple(Layer(file, (Extent(file, 0, sizes[file]),)) for file in files))


def _runs(file: str, size: int, starts: Iterable[tuple[int, _Key]]) -> Iterator[tuple[_Key, Extent]]:
    """A file cut between pages where one layer's tensors meet another's, its header first."""
    pages: list[tuple[int, _Key]] = []  # first page, and whose it and those up to the next entry's are
    at, key = 0, _HEADER
    for offset, following in starts:
        if following != key:
            _claim(pages, at, min(offset, size), key)
            at, key = offset, following
    _claim(pages, at, size, key)
    begin, owner = 0, None
    for page, claimed in pages:
        if claimed != owner:
            if owner is not None:
                yield owner, Extent(file, begin, page * PAGE_BYTES - begin)
            begin, owner = page * PAGE_BYTES, claimed
    if owner is not None:
        yield owner, Extent(file, begin, size - begin)


def _claim(pages: list[tuple[int, _Key]], start: int, end: int, key: _Key) -> None:
    """Note whose the pages of `[start, end)` are. The last entry is of one page, which who comes next may share."""
    if end <= start:
        return
    first, last = start // PAGE_BYTES, (end - 1) // PAGE_BYTES
    if pages and pages[-1][0] == first:
        pages[-1] = first, min(pages[-1][1], key)
    else:
        pages.append((first, key))
    if last > first + 1:
        pages.append((first + 1, key))
    if last > first:
        pages.append((last, key))


class _Unread:
    """What of one file is not read yet: pieces by offset, each of one layer."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.pieces: list[tuple[int, int]] = []  # end, position of the layer

    def add(self, start: int, end: int, layer: int) -> None:
        """Add a piece behind all others."""
        self.starts.append(start)
        self.pieces.append((end, layer))

    def at(self, offset: int) -> tuple[int, int] | None:
        """End and layer of the piece that holds a byte."""
        position = bisect_right(self.starts, offset) - 1
        return self.pieces[position] if position >= 0 and self.pieces[position][0] > offset else None

    def take(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """Take out what there is of a range: start, end and layer of each part, ascending."""
        position = bisect_right(self.starts, start) - 1
        if position >= 0 and end < self.pieces[position][0]:  # the middle of one piece, as nearly always
            stop, layer = self.pieces[position]
            if self.starts[position] == start:
                self.starts[position] = end
            else:
                self.pieces[position] = start, layer
                self.starts.insert(position + 1, end)
                self.pieces.insert(position + 1, (stop, layer))
            return [(start, end, layer)]
        first = last = max(0, position)
        taken, left = [], []
        while last < len(self.starts) and self.starts[last] < end:
            begin, (stop, layer) = self.starts[last], self.pieces[last]
            low, high = max(begin, start), min(stop, end)
            if low < high:
                taken.append((low, high, layer))
                left += [(one, until, layer) for one, until in ((begin, low), (high, stop)) if one < until]
            else:
                left.append((begin, stop, layer))
            last += 1
        self.starts[first:last] = [one for one, _, _ in left]
        self.pieces[first:last] = [(until, layer) for _, until, layer in left]
        return taken


def _reads(files: Sequence[str], layers: Sequence[Layer], learned: Iterable[Extent]) -> Iterator[Read]:
    """The learned extents, widened to whole pages, and behind them the rest, layer by layer."""
    unread = {file: _Unread() for file in files}
    pieces = [(extent, position) for position, layer in enumerate(layers) for extent in layer.extents]
    for extent, position in sorted(pieces, key=lambda one: one[0].offset):
        unread[extent.file].add(extent.offset, extent.end, position)
    last: tuple[str, int, int, int] | None = None  # file, start, end, layer
    for asked in learned:
        here = unread.get(asked.file)
        if here is None or asked.nbytes <= 0 or asked.end <= 0:
            continue
        start = max(asked.offset, 0) // PAGE_BYTES * PAGE_BYTES
        if last is not None and last[0] == asked.file and 0 < start - last[2] < GAP_BYTES:
            gap = here.at(last[2])
            if gap is not None and gap[1] == last[3] and gap[0] >= start:
                start = last[2]
        for begin, end, layer in here.take(start, -(-asked.end // PAGE_BYTES) * PAGE_BYTES):
            if last is not None and last[0] == asked.file and last[2] == begin and last[3] == layer:
                last = asked.file, last[1], end, layer
                continue
            if last is not None:
                yield _read(layers, last)
            last = asked.file, begin, end, layer
    if last is not None:
        yield _read(layers, last)
    rest = [
        (layer, number, start, end)
        for number, file in enumerate(files)
        for start, (end, layer) in zip(unread[file].starts, unread[file].pieces, strict=True)
    ]
    for layer, number, start, end in sorted(rest):
        yield _read(layers, (files[number], start, end, layer))


def _read(layers: Sequence[Layer], one: tuple[str, int, int, int]) -> Read:
    file, start, end, layer = one
    return Read(layers[layer].label, Extent(file, start, end - start))
