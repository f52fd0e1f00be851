"""What the bytes of a snapshot's files are made of: recipes, and the form in which a store keeps them. Pure, no I/O.

A recipe covers a file of CRIU's images from its first byte to its last, without gaps: zeros, parts of weight files,
parts of chunks. The recipes of a snapshot are coded together:

    "wfrcp" and a byte, the version
    count of chunks, then their ids, 32 bytes each, in the order in which the recipes first use them
    count of recipes, then each, by name: length of the name, the name (UTF-8), count of extents, the extents

Counts and all other numbers are varints (LEB128). An extent is one number, `length << 3 | in_pages << 2 | kind`, the
length being in pages of 4096 bytes where `in_pages` is set, then what its kind needs: nothing for zeros; file number
and offset of a weight; id number and offset of a chunk. Offsets in weights are counted from where the last extent of
that file ended, id numbers from the one after the last, both zigzag-coded: what goes on where it stopped takes a byte.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from checkpoint.errors import CorruptError
from checkpoint.manifest import is_image_name

ID_BYTES: Final = 32
"""Of a chunk's id."""
_MAGIC: Final = b"wfrcp\x01"
_PAGE_BYTES: Final = 4096
_ZERO: Final = 0
_WEIGHT: Final = 1
_CHUNK: Final = 2
_MOST_BYTES: Final = 1 << 60
"""No file is larger, so sums of what is read stay numbers that offsets of Linux can hold."""
_ANEW: Final = "weightfs snapshot verify tells what is damaged; make the snapshot anew"


@dataclass(frozen=True, slots=True)
class Zero:
    """`nbytes` zeros."""

    nbytes: int

    def part(self, start: int, end: int) -> Zero:
        """The bytes `[start, end)` of it."""
        return Zero(end - start)


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """The bytes `[offset, offset + nbytes)` of a weight file, `file` being its place in `Manifest.weights`."""

    file: int
    offset: int
    nbytes: int

    def part(self, start: int, end: int) -> WeightBytes:
        """The bytes `[start, end)` of it."""
        return WeightBytes(self.file, self.offset + start, end - start)


@dataclass(frozen=True, slots=True)
class ChunkBytes:
    """The bytes `[at, at + nbytes)` of the chunk that has the 32 bytes of `id`, uncompressed."""

    id: bytes
    nbytes: int
    at: int = 0

    def part(self, start: int, end: int) -> ChunkBytes:
        """The bytes `[start, end)` of it."""
        return ChunkBytes(self.id, end - start, self.at + start)


Extent: TypeAlias = Zero | WeightBytes | ChunkBytes
"""Some bytes, at least one."""


class Recipe:
    """The bytes of one file, in order; never changes.

    Args:
        extents: each of at least one byte.

    Raises:
        ValueError: one has none.
    """

    __slots__ = ("_ends", "extents")

    def __init__(self, extents: Sequence[Extent] = ()) -> None:
        self.extents: Final = tuple(extents)
        self._ends: Final = tuple(itertools.accumulate(extent.nbytes for extent in self.extents))
        if any(extent.nbytes < 1 for extent in self.extents):
            raise ValueError("an extent of no bytes")

    @property
    def nbytes(self) -> int:
        """Of the whole file."""
        return self._ends[-1] if self._ends else 0

    def part(self, start: int, end: int) -> list[Extent]:
        """What the bytes `[start, end)` are made of, in order; found by bisection.

        Raises:
            ValueError: the file does not have these bytes.
        """
        if not 0 <= start <= end <= self.nbytes:
            raise ValueError(f"[{start}, {end}) of a file of {self.nbytes} bytes")
        found: list[Extent] = []
        index = bisect.bisect_right(self._ends, start)
        while start < end:
            extent = self.extents[index]
            begins = self._ends[index] - extent.nbytes
            stops = min(end, self._ends[index])
            found.append(extent if stops - start == extent.nbytes else extent.part(start - begins, stops - begins))
            start = stops
            index += 1
        return found

    def chunks(self) -> Iterator[bytes]:
        """The ids of its chunks, each once, in the order of their first use."""
        return iter(dict.fromkeys(extent.id for extent in self.extents if isinstance(extent, ChunkBytes)))

    def __eq__(self, other: object) -> bool:
        return self.extents == other.extents if isinstance(other, Recipe) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.extents)

    def __repr__(self) -> str:
        return f"Recipe({list(self.extents)!r})"


def encode(recipes: Mapping[str, Recipe]) -> bytes:
    """The stored form of a snapshot's recipes.

    Args:
        recipes: by the name of the image.

    Raises:
        ValueError: a name is that of no image, or an id has not 32 bytes.
    """
    numbers: dict[bytes, int] = {}
    for recipe in recipes.values():
        for identifier in recipe.chunks():
            numbers.setdefault(identifier, len(numbers))
    if any(len(identifier) != ID_BYTES for identifier in numbers):
        raise ValueError(f"a chunk's id has {ID_BYTES} bytes")
    out = bytearray(_MAGIC)
    _put(out, len(numbers))
    out += b"".join(numbers)
    _put(out, len(recipes))
    reached: dict[int, int] = {}
    following = 0
    for name, recipe in recipes.items():
        if not is_image_name(name):
            raise ValueError(f"{name!r} is no image's name")
        _put(out, len(name))
        out += name.encode("ascii")
        _put(out, len(recipe.extents))
        for extent in recipe.extents:
            in_pages = extent.nbytes % _PAGE_BYTES == 0
            length = (extent.nbytes // _PAGE_BYTES if in_pages else extent.nbytes) << 3 | in_pages << 2
            if isinstance(extent, Zero):
                _put(out, length | _ZERO)
            elif isinstance(extent, WeightBytes):
                _put(out, length | _WEIGHT)
                _put(out, extent.file)
                _put(out, _zigzag(extent.offset - reached.get(extent.file, 0)))
                reached[extent.file] = extent.offset + extent.nbytes
            else:
                _put(out, length | _CHUNK)
                _put(out, _zigzag(numbers[extent.id] - following))
                _put(out, extent.at)
                following = numbers[extent.id] + 1
    return bytes(out)


def decode(content: bytes, path: str, *, weights: Sequence[int]) -> dict[str, Recipe]:
    """What `encode` was given. Takes memory in proportion to `content`, whatever that says.

    Args:
        content: all of it.
        path: where it was read, for errors.
        weights: sizes in bytes of the weight files of the manifest, which no extent may go beyond.

    Raises:
        CorruptError: it is not what `encode` gives, or needs bytes that a weight file does not have. Whether a chunk
            has the bytes that are wanted of it is for the store of chunks to say.
    """
    return _Reader(content, path, weights).recipes()


class _Reader:
    def __init__(self, content: bytes, path: str, weights: Sequence[int]) -> None:
        self._content = content
        self._path = path
        self._weights = weights
        self._at = 0
        self._ids: list[bytes] = []
        self._following = 0
        self._reached: dict[int, int] = {}

    def recipes(self) -> dict[str, Recipe]:
        if self._take(len(_MAGIC)) != _MAGIC:
            raise self._damaged("holds no recipes that this version reads")
        count = self._count(ID_BYTES)
        self._ids = [self._take(ID_BYTES) for _ in range(count)]
        if len(set(self._ids)) != count:
            raise self._damaged("names a chunk twice")
        found: dict[str, Recipe] = {}
        for _ in range(self._count(2)):
            name = self._take(self._number()).decode("ascii", "replace")
            if not is_image_name(name) or name in found:
                raise self._damaged(f"has a recipe for {name!r}, which is no image's name or has one")
            recipe = Recipe([self._extent() for _ in range(self._count(1))])
            if recipe.nbytes > _MOST_BYTES:
                raise self._damaged(f"has a recipe for {recipe.nbytes} bytes")
            found[name] = recipe
        if self._at != len(self._content):
            raise self._damaged("goes on after its end")
        return found

    def _extent(self) -> Extent:
        head = self._number()
        nbytes = (head >> 3) * (_PAGE_BYTES if head & 4 else 1)
        if not 0 < nbytes <= _MOST_BYTES:
            raise self._damaged(f"has an extent of {nbytes} bytes")
        if head & 3 == _ZERO:
            return Zero(nbytes)
        if head & 3 == _WEIGHT:
            file = self._number()
            if file >= len(self._weights):
                raise self._damaged(f"refers to weight file {file} of {len(self._weights)}")
            offset = self._reached.get(file, 0) + self._signed()
            if not 0 <= offset <= self._weights[file] - nbytes:
                raise self._damaged(f"needs {nbytes} bytes from {offset} on of a weight file of {self._weights[file]}")
            self._reached[file] = offset + nbytes
            return WeightBytes(file, offset, nbytes)
        if head & 3 == _CHUNK:
            number = self._following + self._signed()
            if not 0 <= number < len(self._ids):
                raise self._damaged(f"refers to chunk {number} of {len(self._ids)}")
            self._following = number + 1
            at = self._number()
            if at > _MOST_BYTES:
                raise self._damaged(f"needs a chunk from {at} on")
            return ChunkBytes(self._ids[number], nbytes, at)
        raise self._damaged("has an extent of no known kind")

    def _count(self, unit_bytes: int) -> int:
        """How many things of at least that many bytes follow."""
        count = self._number()
        if count * unit_bytes > len(self._content) - self._at:
            raise self._damaged("ends before what it promises")
        return count

    def _take(self, nbytes: int) -> bytes:
        if nbytes > len(self._content) - self._at:
            raise self._damaged("ends too early")
        self._at += nbytes
        return self._content[self._at - nbytes : self._at]

    def _number(self) -> int:
        """At most 64 bits."""
        value = shift = 0
        for byte in self._content[self._at : self._at + 10]:
            self._at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                if value >> 64:
                    break
                return value
            shift += 7
        raise self._damaged("has a number that does not end, or is too large")

    def _signed(self) -> int:
        number = self._number()
        return number >> 1 ^ -(number & 1)

    def _damaged(self, what: str) -> CorruptError:
        return CorruptError(what, path=self._path, mend=_ANEW)


def _put(out: bytearray, value: int) -> None:
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)


def _zigzag(value: int) -> int:
    return value << 1 if value >= 0 else -value * 2 - 1
