"""What of a model is to be read, in which order: extents, in layers. Pure, no I/O."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from prefetch.order import Place, places
from weightfs.formats.layout import WeightLayout

PAGE_BYTES: Final = 4096
_HEADER: Final = (-1, -1)


@dataclass(frozen=True, slots=True)
class Extent:
    """The half-open byte range `[offset, offset + nbytes)` of one file, by its name in the model's folder."""

    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Layer:
    """What a loader needs together.

    Attributes:
        label: as users see it: `embedding`, a block's number, `norm`, `head`, `other`.
        extents: in reading order, none overlapping another of the plan.
    """

    label: str
    extents: tuple[Extent, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all its extents."""
        return sum(extent.nbytes for extent in self.extents)


@dataclass(frozen=True, slots=True)
class Plan:
    """Every byte of a model's files once, in the order to read them.

    Attributes:
        files: names within the model's folder, in shard order.
        layers: in reading order.
    """

    files: tuple[str, ...]
    layers: tuple[Layer, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(layer.nbytes for layer in self.layers)

    def extents(self) -> Iterator[Extent]:
        """Every extent, in reading order."""
        for layer in self.layers:
            yield from layer.extents


def plan_of(layout: WeightLayout, sizes: Mapping[str, int]) -> Plan:
    """The plan of a model in the order a loader needs it: headers, then layers as `prefetch.order` has them.

    Args:
        layout: of all its files.
        sizes: of each file in bytes; headers, padding and what lies behind the last tensor are read too. Gaps go with
            the tensor before them, and a page that two layers share with the one needed first.
    """
    placed = [
        (tensor, *place) for tensor, place in zip(layout.tensors, places(layout.tensors), strict=True) if tensor.nbytes
    ]
    by_file: dict[str, list[tuple[int, Place, str]]] = {file: [] for file in layout.files}
    for tensor, place, label in placed:
        by_file[tensor.file].append((tensor.offset, place, label))
    found: dict[tuple[Place, str], list[Extent]] = {}
    for file, starts in by_file.items():
        for key, extent in _runs(file, sizes[file], sorted(starts)):
            found.setdefault(key, []).append(extent)
    layers = [Layer(label, tuple(found[place, label])) for place, label in sorted(found)]
    return Plan(layout.files, tuple(layers))


def whole_file_plan(layout: WeightLayout, sizes: Mapping[str, int]) -> Plan:
    """The plan that reads each file from its beginning to its end, a layer a file."""
    files = [file for file in layout.files if sizes[file]]
    return Plan(layout.files, tuple(Layer(file, (Extent(file, 0, sizes[file]),)) for file in files))


def _runs(file: str, size: int, starts: list[tuple[int, Place, str]]) -> Iterator[tuple[tuple[Place, str], Extent]]:
    """A file cut where one layer's tensors meet another's, its header first."""
    at, key = 0, (_HEADER, "header")
    for offset, place, label in starts:
        following = place, label
        if following == key:
            continue
        down, up = offset // PAGE_BYTES * PAGE_BYTES, -(-offset // PAGE_BYTES) * PAGE_BYTES
        end = min(down if following < key else up, size)
        if end > at:
            yield key, Extent(file, at, end - at)
            at = end
        key = following
    if size > at:
        yield key, Extent(file, at, size - at)
