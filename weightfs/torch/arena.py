"""A range of a GPU's addresses that outlives the memory behind it, and the seam to the driver that gives both.

CUDA keeps addresses and memory apart (CUDA Driver API, "Virtual Memory Management"): a range is reserved once, and
memory is mapped into it, unmapped, and mapped again at the same addresses. What was compiled or captured with the
addresses, as a CUDA graph is, holds whenever memory is there.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from prefetch.staging import Piece

if TYPE_CHECKING:
    import torch

    from weightfs.torch.proof import Contents


class Memory(Protocol):
    """One GPU: its addresses, its memory, and the way from files into it. Called by one thread at a time."""

    granularity: int
    """Addresses and lengths of ranges are multiples of it, in bytes."""

    def reserve(self, nbytes: int) -> int:
        """A range of addresses without memory."""

    def unreserve(self, address: int, nbytes: int) -> None:
        """Give it back; nothing is mapped in it."""

    def map(self, address: int, nbytes: int) -> None:
        """Put memory behind a range; what it holds is undefined.

        Raises:
            WeightfsError: the GPU has not that much left.
        """

    def unmap(self, address: int, nbytes: int) -> None:
        """Take the memory away again, once the GPU does nothing with it, and free it."""

    def tensor(self, address: int, nbytes: int, owner: object) -> torch.Tensor:
        """The range as bytes, mapped or not; the storage holds `owner` for as long as it lives."""

    def scratch(self, nbytes: int) -> torch.Tensor:
        """Bytes of torch's own memory."""

    def copy(self, pieces: Sequence[Piece]) -> None:
        """Bring bytes of files to their addresses; returns when they are there.

        Raises:
            OSError: a file can't be read.
            WeightfsError: one ends too early, or the driver refused.
        """

    def wait(self) -> None:
        """Return once the GPU has done all that was asked of it."""

    def settle(self) -> int:
        """Give back what neither tensors nor copies need any more; bytes that torch keeps all the same."""

    def graphs(self) -> int:
        """CUDA graphs of this process, which may have been captured with any address."""


class Region:
    """What the storages within an arena hold on to: with the last of them the arena goes."""

    __slots__ = ("__weakref__", "arena", "begin")

    def __init__(self, arena: Arena, begin: int) -> None:
        self.arena = arena
        self.begin = begin


class Arena:
    """A reserved range, and the storages that lie in it.

    The range is given back when no storage lies in it any more. Not at the end of the process: the driver does that,
    and may be gone before.

    Args:
        memory: of the GPU.
        nbytes: at least so many.
    """

    def __init__(self, memory: Memory, nbytes: int) -> None:
        grain = memory.granularity
        self.nbytes = -(-nbytes // grain) * grain
        self.address = memory.reserve(self.nbytes)
        self.contents: Contents | None = None
        """What was proven of it last, if it may still hold that."""
        self._memory = memory
        self._mapped: list[bool] = [False]
        self._regions: weakref.WeakValueDictionary[int, Region] = weakref.WeakValueDictionary()
        self._end = weakref.finalize(self, _give_back, memory, self.address, self.nbytes, self._mapped)
        self._end.atexit = False
        _arenas.add(self)

    @property
    def is_mapped(self) -> bool:
        """Whether there is memory behind it."""
        return self._mapped[0]

    def map(self) -> None:
        """Put memory behind all of it.

        Raises:
            WeightfsError: the GPU has not that much left; nothing is mapped then.
        """
        self._memory.map(self.address, self.nbytes)
        self._mapped[0] = True

    def unmap(self) -> None:
        """Free the memory; the addresses stay reserved. Does nothing where there is none."""
        if self.is_mapped:
            self._memory.wait()
            self._memory.unmap(self.address, self.nbytes)
            self._mapped[0] = False

    def region(self, begin: int, nbytes: int) -> torch.Tensor:
        """Bytes `[begin, begin + nbytes)` as a storage of their own."""
        region = Region(self, begin)
        made = self._memory.tensor(self.address + begin, nbytes, region)
        self._regions[begin] = region
        return made

    def whole(self) -> torch.Tensor:
        """All of it, which must not be kept."""
        return self._memory.tensor(self.address, self.nbytes, self)

    def begins(self) -> set[int]:
        """Where the storages begin that live in it."""
        return set(self._regions)

    def __contains__(self, address: int) -> bool:
        """Whether an address lies in it."""
        return self.address <= address < self.address + self.nbytes


_arenas: weakref.WeakSet[Arena] = weakref.WeakSet()


def arenas() -> Iterator[Arena]:
    """All of this process that have storages in them."""
    yield from list(_arenas)


def _give_back(memory: Memory, address: int, nbytes: int, mapped: list[bool]) -> None:
    if mapped[0]:
        memory.wait()
        memory.unmap(address, nbytes)
    memory.unreserve(address, nbytes)
