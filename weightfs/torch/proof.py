"""Proof that bytes of a GPU are bytes of files, and the way back from the files, proven again.

Both go through the arena's range block by block. A block's sums are those of its rows and of its columns, as 64-bit
integers that wrap: two passes over the memory at its own speed, some milliseconds for 7 GB. They find any mistake (a
file that changed, a copy that went astray), not a forgery, which whoever may write the weights has no need of.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from blake3 import blake3

from prefetch.staging import Piece
from weightfs.errors import IntegrityError, WeightfsError
from weightfs.torch.arena import Arena, Memory
from weightfs.torch.origins import Origin, Stamp

if TYPE_CHECKING:
    import torch

BLOCK_BYTES: Final = 256 << 20
"""The GPU memory that a proof needs beside the model, and an eighth of it or less for comparing."""
ALIGNMENT: Final = 512
"""Of a storage in an arena, in bytes; as torch's allocator gives them, so that kernels choose as they did."""
_ROW: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A run of bytes of the arena, `[begin, begin + nbytes)`.

    Attributes:
        begin: from the start of the arena.
        nbytes: at least 1.
        path: the file that has the same bytes; None when there is none, and the host keeps them.
        offset: where in that file.
    """

    begin: int
    nbytes: int
    path: str | None = None
    offset: int = 0

    def within(self, begin: int, end: int) -> Span | None:
        """The part of it that lies in `[begin, end)`."""
        low, high = max(begin, self.begin), min(end, self.begin + self.nbytes)
        if low >= high:
            return None
        return replace(self, begin=low, nbytes=high - low, offset=self.offset + low - self.begin)

    def continues(self, other: Span) -> bool:
        """Whether it follows `other` both in the arena and where its bytes come from."""
        return (
            self.begin == other.begin + other.nbytes
            and self.path == other.path
            and (self.path is None or self.offset == other.offset + other.nbytes)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What an arena holds.

    Attributes:
        begins: of the storages in it.
        spans: in order of their begin, without overlaps. What they leave out is zero.
        stamps: what each of the files was, by path.
        sums: one a block.
    """

    begins: frozenset[int]
    spans: tuple[Span, ...]
    stamps: Mapping[str, Stamp]
    sums: tuple[bytes, ...]

    @property
    def kept(self) -> tuple[Span, ...]:
        """Those no file has."""
        return tuple(span for span in self.spans if span.path is None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lot:
    """A storage and its place.

    Attributes:
        begin: in the arena.
        live: its bytes as they are now.
        claims: where parts of it may come from, by their offset in it; without overlaps, in order.
    """

    begin: int
    live: torch.Tensor
    claims: tuple[tuple[int, Origin], ...]

    def spans(self) -> Iterator[Span]:
        """The whole of it, claim by claim, with what nothing is claimed of between them."""
        at = 0
        for begin, origin in self.claims:
            if begin > at:
                yield Span(begin=self.begin + at, nbytes=begin - at)
            yield Span(begin=self.begin + begin, nbytes=origin.nbytes, path=origin.path, offset=origin.offset)
            at = begin + origin.nbytes
        if at < self.live.numel():
            yield Span(begin=self.begin + at, nbytes=self.live.numel() - at)


def prove(memory: Memory, lots: Sequence[Lot], nbytes: int, stamps: Mapping[str, Stamp]) -> Contents:
    """Compare every claim with its file. A claim that does not hold is for the host to keep.

    Args:
        memory: of the GPU.
        lots: in order of their begin.
        nbytes: of the arena.
        stamps: of the files, taken before.

    Raises:
        OSError: a file can't be read.
        WeightfsError: there is no room for a block, or a file ends too early.
    """
    found: list[Span] = []
    sums = []
    scratch = memory.scratch(min(BLOCK_BYTES, nbytes))
    with Files() as files:
        for block in range(0, nbytes, BLOCK_BYTES):
            room = scratch[: min(BLOCK_BYTES, nbytes - block)]
            room.zero_()
            parts = list(_within(lots, block, block + room.numel()))
            memory.copy(files.pieces(_joined(part for part, _ in parts), room.data_ptr() - block))
            for part, lot in parts:
                here = room[part.begin - block :][: part.nbytes]
                live = lot.live[part.begin - lot.begin :][: part.nbytes]
                if part.path is not None and _same(here, live):
                    found.append(part)
                else:
                    here.copy_(live)
                    found.append(Span(begin=part.begin, nbytes=part.nbytes))
            sums.append(_sum(room))
    spans = tuple(_joined(found))
    paths = {span.path for span in spans}
    return Contents(
        begins=frozenset(lot.begin for lot in lots),
        spans=spans,
        stamps={path: stamps[path] for path in stamps if path in paths},
        sums=tuple(sums),
    )


def keep(contents: Contents, lots: Sequence[Lot]) -> list[torch.Tensor]:
    """What the host keeps, one tensor for each of `contents.kept`; ordinary memory, which a snapshot can hold."""
    copies = []
    for span in contents.kept:
        parts = [
            lot.live[part.begin - lot.begin :][: part.nbytes].cpu()
            for part, lot in _within(lots, span.begin, span.begin + span.nbytes)
        ]
        copies.append(parts[0].new_empty(span.nbytes))
        at = 0
        for part in parts:
            copies[-1][at : at + part.numel()] = part
            at += part.numel()
    return copies


def fill(memory: Memory, arena: Arena, contents: Contents, kept: Sequence[torch.Tensor], files: Files) -> None:
    """Bring back what the arena held; `check` must follow.

    Args:
        memory: of the GPU.
        arena: mapped.
        contents: what it held.
        kept: what `keep` gave.
        files: which holds those of the contents.

    Raises:
        IntegrityError: a file has another size.
        WeightfsError: a copy failed.
        OSError: a file can't be read.
    """
    files.require(contents.stamps)
    whole = arena.whole()
    at = 0
    for span in contents.spans:
        if span.begin > at:
            whole[at : span.begin].zero_()
        at = span.begin + span.nbytes
    whole[at:].zero_()
    for span, content in zip(contents.kept, kept, strict=True):
        whole[span.begin :][: span.nbytes].copy_(content)
    memory.copy(files.pieces(contents.spans, arena.address))


def holds(arena: Arena, contents: Contents) -> bool:
    """Whether the arena holds just that."""
    return not _wrong(arena, contents)


def check(arena: Arena, contents: Contents) -> None:
    """Raise unless the arena holds just that.

    Raises:
        IntegrityError: it does not.
    """
    if wrong := _wrong(arena, contents):
        spans = [span for at in wrong for span in contents.spans if span.within(at, at + BLOCK_BYTES)]
        path = next((span.path for span in spans if span.path is not None), None)
        raise IntegrityError("has other weights than it had when they were given up", path=path)


def _wrong(arena: Arena, contents: Contents) -> list[int]:
    whole = arena.whole()
    begins = range(0, arena.nbytes, BLOCK_BYTES)
    sums = [_sums(whole[at : at + BLOCK_BYTES]) for at in begins]  # all are under way before the first is waited for
    return [at for at, one, known in zip(begins, sums, contents.sums, strict=True) if _digest(one) != known]


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether bytes are the same; eight at a time where they lie so, since torch makes a byte of every comparison."""
    import torch

    places = [place for tensor in (one, other) for place in (tensor.data_ptr(), tensor.storage_offset())]
    if not any(number % 8 for number in (one.numel(), *places)):
        one, other = one.view(torch.int64), other.view(torch.int64)
    return bool(one.equal(other))


def _sum(block: torch.Tensor) -> bytes:
    return _digest(_sums(block))


def _sums(block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    rows = block.view(torch.int64).view(-1, _ROW)
    return rows.sum(0), rows.sum(1)


def _digest(sums: tuple[torch.Tensor, torch.Tensor]) -> bytes:
    digest = blake3()
    for one in sums:
        digest.update(one.cpu().numpy().data.cast("B"))
    return digest.digest()


def _within(lots: Sequence[Lot], begin: int, end: int) -> Iterator[tuple[Span, Lot]]:
    for lot in lots:
        if lot.begin < end and lot.begin + lot.live.numel() > begin:
            for span in lot.spans():
                if part := span.within(begin, end):
                    yield part, lot


def _joined(spans: Iterable[Span]) -> Iterator[Span]:
    last: Span | None = None
    for span in spans:
        if last is not None and span.continues(last):
            last = replace(last, nbytes=last.nbytes + span.nbytes)
            continue
        if last is not None:
            yield last
        last = span
    if last is not None:
        yield last


class Files(ExitStack):
    """Weight files, open until the block ends.

    A snapshot notes the bytes of weight files that a process has open, and a restore compares them (BLAKE3) before
    anything is done: that is why they are held open while the weights are away.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fds: dict[str, int] = {}

    def hold(self, paths: Iterable[str]) -> None:
        """Open what is not open yet.

        Raises:
            WeightfsError: one can't be opened.
        """
        for path in paths:
            if path not in self._fds:
                try:
                    self._fds[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as e:
                    raise WeightfsError(f"can't be opened: {os.strerror(e.errno or 0)}", path=path) from e
                self.callback(os.close, self._fds[path])

    def pieces(self, spans: Iterable[Span], address: int) -> list[Piece]:
        """Pieces of the spans that have a file, in the order of the files, so that each is read from its start on.

        Raises:
            WeightfsError: a file can't be opened.
        """
        some = [(span, span.path) for span in spans if span.path is not None]
        self.hold(path for _, path in some)
        ranks = {path: rank for rank, path in enumerate(self._fds)}
        some.sort(key=lambda one: (ranks[one[1]], one[0].offset))
        return [Piece(self._fds[path], span.offset, span.nbytes, address + span.begin) for span, path in some]

    def require(self, stamps: Mapping[str, Stamp]) -> None:
        """Raise unless files have the sizes they had.

        Raises:
            IntegrityError: one has another.
            OSError: one can't be asked.
        """
        for path, stamp in stamps.items():
            size = os.fstat(self._fds[path]).st_size
            if size != stamp.size:
                raise IntegrityError(f"has {size} bytes, not {stamp.size} as before", path=path)
