"""How a model's weights leave a GPU and come back: what `released` does, whatever the GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from weightfs.errors import UsageError, WeightfsError
from weightfs.torch.arena import Arena, Memory, arenas
from weightfs.torch.fused import LEAST_BYTES, parts_of
from weightfs.torch.origins import Origin, Origins, Stamp
from weightfs.torch.proof import ALIGNMENT, Contents, Files, Lot, check, fill, holds, keep, prove

_COMPILED: Final = "_orig_mod."
"""What torch.compile puts into the names of a module that it wraps."""
_NO_WEIGHTS: Final = "this process has no weights any more: restore it again, or start it anew"

MemoryOf = Callable[[torch.device], Memory | None]
"""The memory of a device; None for one whose weights stay where they are."""


@dataclass(slots=True, kw_only=True)
class Released:
    """What stepped aside, and how long each part of it took.

    Attributes:
        nbytes: of all weights that did.
        file_bytes: of those, what files have and a snapshot need not.
        kept: what no file has, byte for byte, and the host keeps meanwhile: bytes by name.
        left: what stayed where it was, by name: why.
        elsewhere: names whose old memory something else still holds, so that it is not free.
        torch_bytes: GPU memory that torch's allocator holds meanwhile: other tensors, and what they keep of segments.
        note: what is to be said of the whole; empty when all is well.
        phases: seconds by name: `prove`, `drop`; and after the block `map`, `copy`, `check`, `place`.
    """

    nbytes: int = 0
    file_bytes: int = 0
    kept: dict[str, int] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    elsewhere: tuple[str, ...] = ()
    torch_bytes: int = 0
    note: str = ""
    phases: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add to the seconds of a phase."""
        started = time.perf_counter()
        yield
        self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - started


class _Tenant:
    """A tensor of the modules: where in its storage it lies."""

    __slots__ = ("_mode", "names", "offset", "shape", "stride", "tensor", "view")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.names: list[str] = []
        self.tensor = tensor
        self.view: torch.Tensor | None = None
        self.offset = tensor.storage_offset()
        self.shape = tensor.shape
        self.stride = tensor.stride()
        # A tensor made in inference mode can hold only what was made in it, and the reverse.
        self._mode = torch.inference_mode(tensor.is_inference())

    def place(self, storage: torch.UntypedStorage) -> None:
        """Have it lie in another storage when it comes back."""
        with self._mode:
            empty = torch.empty(0, dtype=self.tensor.dtype, device=self.tensor.device)
            self.view = empty.set_(storage, self.offset, self.shape, self.stride)

    def leave(self) -> None:
        """Have no elements."""
        with self._mode:
            self.view = self.tensor.data
            self.tensor.data = torch.empty(0, dtype=self.tensor.dtype, device=self.tensor.device)

    def come_back(self) -> None:
        """Be what it was."""
        assert self.view is not None
        with self._mode:
            self.tensor.data = self.view
        self.view = None


class _Stock:
    """A storage, with the tensors in it."""

    __slots__ = ("claims", "live", "nbytes", "tenants")

    def __init__(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.live = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        self.nbytes = storage.nbytes()
        self.tenants: list[_Tenant] = []
        self.claims: tuple[tuple[int, Origin], ...] = ()

    @property
    def name(self) -> str:
        return self.tenants[0].names[0]


class Aside:
    """What shares an arena: it leaves, and comes back.

    Args:
        memory: of the GPU.
        arena: where they lie, or will.
        stocks: by where in the arena they begin.
        origins: where their bytes may have come from.
        files: to hold those that they did come from.

    Raises:
        WeightfsError: a file can't be read, or there is no room for the proof.
    """

    def __init__(
        self, memory: Memory, arena: Arena, stocks: Mapping[int, _Stock], origins: Origins, files: Files
    ) -> None:
        self._memory = memory
        self._arena = arena
        self._stocks = stocks
        lots = [Lot(begin=begin, live=one.live, claims=one.claims) for begin, one in sorted(stocks.items())]
        known = arena.contents
        if known is None or known.begins != stocks.keys() or not _is_current(known, origins) or not holds(arena, known):
            known = prove(memory, lots, arena.nbytes, origins.stamps)
        arena.contents = None
        self._contents: Contents = known
        self._kept = keep(known, lots)
        self._files = files
        files.hold(known.stamps)

    def count(self, report: Released) -> None:
        """Say what will step aside."""
        for begin, stock in self._stocks.items():
            inside = (span.within(begin, begin + stock.nbytes) for span in self._contents.kept)
            kept = sum(span.nbytes for span in inside if span is not None)
            if kept:
                report.kept[stock.name] = kept
            report.nbytes += stock.nbytes
            report.file_bytes += stock.nbytes - kept

    def leave(self, report: Released) -> None:
        """Take the weights from the model and free their memory; they have a place to come back to."""
        is_new = not self._arena.is_mapped
        self._memory.wait()
        former: list[tuple[str, StorageWeakRef]] = []
        for stock in self._stocks.values():
            for tenant in stock.tenants:
                tenant.leave()
                if is_new:
                    tenant.view = None
            if is_new:
                former.append((stock.name, StorageWeakRef(stock.live.untyped_storage())))
                del stock.live
        report.elsewhere += tuple(name for name, storage in former if not storage.expired())
        if is_new:
            self._memory.settle()
            try:
                self._arena.map()  # now, so that it is known to succeed before a snapshot counts on it
            except WeightfsError as e:
                e.mend = (
                    "load the model again, and call weightfs.torch.movable(model) before anything else needs the GPU"
                )
                raise
            for begin, stock in self._stocks.items():
                stock.live = self._arena.region(begin, stock.nbytes)
                for tenant in stock.tenants:
                    tenant.place(stock.live.untyped_storage())
        self._arena.unmap()
        report.torch_bytes += self._memory.settle()

    def come_back(self, report: Released) -> None:
        """Bring the weights back, or leave the model without any.

        Raises:
            IntegrityError: a file is not what it was.
            WeightfsError: a file can't be read, or the GPU has not that much left.
        """
        try:
            with report.phase("map"):
                self._arena.map()
            with report.phase("copy"):
                fill(self._memory, self._arena, self._contents, self._kept, self._files)
            with report.phase("check"):
                check(self._arena, self._contents)
        except BaseException as e:
            self._arena.unmap()
            if isinstance(e, OSError):
                raise WeightfsError(f"weights can't be read again: {e.strerror}", mend=_NO_WEIGHTS) from e
            if isinstance(e, WeightfsError):
                e.mend = _NO_WEIGHTS
            raise
        with report.phase("place"):
            for stock in self._stocks.values():
                for tenant in stock.tenants:
                    tenant.come_back()
        self._arena.contents = self._contents


def step_aside(
    modules: Sequence[torch.nn.Module], origins: Origins, memory_of: MemoryOf, files: Files, report: Released
) -> list[Aside]:
    """Take the weights from some modules; gives what is to come back.

    What can fail for a reason of the model or its files does so before anything is taken.

    Args:
        modules: whose parameters and buffers, all of them.
        origins: where these may have come from.
        memory_of: see there.
        files: which stay open until all are back.
        report: to be filled in.

    Raises:
        UsageError: part of what left together before is missing, or CUDA graphs hold addresses that would change.
        WeightfsError: a file can't be read, or a GPU is too full.
    """
    with report.phase("prove"):
        groups = _grouped(modules, memory_of, report)
        _claim([stock for stocks in groups.values() for stock in stocks], origins)
        asides = [_aside(memory, arena, stocks, origins, files) for (memory, arena), stocks in groups.items()]
        del groups
        for aside in asides:
            aside.count(report)
    with report.phase("drop"):
        gone: list[Aside] = []
        try:
            for aside in asides:
                aside.leave(report)
                gone.append(aside)
        except BaseException:
            for aside in gone:
                aside.come_back(report)
            raise
    return asides


def _aside(memory: Memory, arena: Arena | None, stocks: list[_Stock], origins: Origins, files: Files) -> Aside:
    if arena is None:
        if graphs := memory.graphs():
            raise UsageError(
                f"the weights would move, and {graphs} CUDA graphs of this process may hold the addresses they have",
                mend="call weightfs.torch.movable(model) before graphs are captured",
            )
        begins, nbytes = _layout(stocks)
        return Aside(memory, Arena(memory, nbytes), begins, origins, files)
    begins = {stock.live.data_ptr() - arena.address: stock for stock in stocks}
    if arena.begins() - begins.keys():
        raise UsageError("of the modules that were released together before, some are missing", mend="name all of them")
    return Aside(memory, arena, begins, origins, files)


def _layout(stocks: Iterable[_Stock]) -> tuple[dict[int, _Stock], int]:
    """Where each will lie, in the order of the files, so that runs of a file become runs of memory; and the end."""

    def place(stock: _Stock) -> tuple[bool, int, int]:
        first = stock.claims[0][1] if stock.claims else None
        return (False, first.rank, first.offset) if first else (True, 0, 0)

    begins = {}
    end = 0
    for stock in sorted(stocks, key=place):
        begins[end] = stock
        end += -(-stock.nbytes // ALIGNMENT) * ALIGNMENT
    return begins, end


def _claim(stocks: Sequence[_Stock], origins: Origins) -> None:
    """Say of each storage what of it may have come from where: by the names of its tensors, else by their bytes."""
    found: dict[_Stock, list[tuple[int, Origin]]] = {stock: [] for stock in stocks}
    others: list[tuple[_Stock, int, torch.Tensor]] = []
    taken: set[Origin] = set()
    for stock in stocks:
        for tenant in stock.tenants:
            begin, nbytes = tenant.offset * tenant.tensor.element_size(), tenant.tensor.nbytes
            if not tenant.tensor.is_contiguous():
                continue
            if origin := origins.find(tenant.names, nbytes):
                found[stock].append((begin, origin))
                taken.add(origin)
            elif nbytes >= LEAST_BYTES:
                others.append((stock, begin, stock.live[begin : begin + nbytes]))
    untaken = [origin for origin in origins if origin not in taken]
    if others and untaken:
        for (stock, begin, _), parts in zip(others, parts_of([one for *_, one in others], untaken), strict=True):
            found[stock] += [(begin + at, origin) for at, origin in parts]
    for stock, claims in found.items():
        kept: list[tuple[int, Origin]] = []
        for at, origin in sorted(claims, key=lambda claim: claim[0]):
            if not kept or at >= kept[-1][0] + kept[-1][1].nbytes:
                kept.append((at, origin))
        stock.claims = tuple(kept)


def _grouped(
    modules: Sequence[torch.nn.Module], memory_of: MemoryOf, report: Released
) -> dict[tuple[Memory, Arena | None], list[_Stock]]:
    """The storages of the modules' tensors, by GPU and by the arena they lie in already."""
    tenants: dict[int, _Tenant] = {}
    for module in modules:
        for name, tensor in _tensors(module):
            tenants.setdefault(id(tensor), _Tenant(tensor)).names.append(name.replace(_COMPILED, ""))
    memories: dict[torch.device, Memory | None] = {}
    stocks: dict[tuple[torch.device, int, int], _Stock] = {}  # a storage may be the first part of another
    for tenant in tenants.values():
        tensor = tenant.tensor
        if tensor.device not in memories:
            memories[tensor.device] = memory_of(tensor.device)
        if why := _why_left(tensor, memories[tensor.device]):
            report.left[tenant.names[0]] = why
        elif nbytes := tensor.untyped_storage().nbytes():
            key = tensor.device, tensor.untyped_storage().data_ptr(), nbytes
            stocks.setdefault(key, _Stock(tensor)).tenants.append(tenant)
    groups: dict[tuple[Memory, Arena | None], list[_Stock]] = {}
    for (device, address, _), stock in stocks.items():
        memory = memories[device]
        assert memory is not None
        home = next((one for one in arenas() if address in one), None)
        groups.setdefault((memory, home), []).append(stock)
    return groups


def _tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _why_left(tensor: torch.Tensor, memory: Memory | None) -> str:
    if memory is None:
        return f"is on {tensor.device}"
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        return f"is a {type(tensor).__name__}, whose parts are not known here"
    return ""


def _is_current(contents: Contents, origins: Origins) -> bool:
    return all(origins.stamps.get(path) == stamp == Stamp.of(path) for path, stamp in contents.stamps.items())
