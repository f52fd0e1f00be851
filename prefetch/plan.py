"""What of a model is to be read, in which order: extents, in layers. Pure, no I/O."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from weightfs.formats.layout import WeightLayout


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
    """The plan of a model.

    Args:
        layout: of all its files.
        sizes: of each file in bytes; headers and padding are read too.
    """
    whole = tuple(Layer(file, (Extent(file, 0, sizes[file]),)) for file in layout.files)
    return Plan(layout.files, whole)
