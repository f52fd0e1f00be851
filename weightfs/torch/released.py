"""Weights that step aside while a process is snapshotted, and come back at the addresses they had.

    from checkpoint import snapshot_point
    from weightfs.torch import released

    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cuda")
    warm_up(model)
    with released(model):
        snapshot_point("warm")

A snapshot then holds no weights, and every restore reads them from the files they came from. Within the block the
model has none: no other thread may use it. What no file has, byte for byte, is kept in host memory.

The first block moves the weights to addresses that are theirs from then on: capture CUDA graphs, and compile what takes
addresses, after `movable(model)`.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch

from prefetch import staging
from weightfs.errors import UnfitError, UsageError, WeightfsError
from weightfs.torch.arena import Memory
from weightfs.torch.origins import Origins, paths_of
from weightfs.torch.proof import Files
from weightfs.torch.stepping import MemoryOf, Released, step_aside

log = logging.getLogger(__name__)

Weights = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]

_turn = threading.Lock()
_POOL: Final = staging.StagingConfig(way="windows")
"""A restore would wait for buffers to be pinned, and for a choice of the way; pages of files are pinned as they go."""


@contextmanager
def released(
    model: torch.nn.Module | Iterable[torch.nn.Module], *, weights: Weights | None = None
) -> Iterator[Released]:
    """Free the GPU memory of a model's weights for the block, and bring them back after it, at their addresses.

    Before they are freed all are compared with the files they came from, by name and byte for byte; what differs (as
    cast or merged weights do) is copied to the host. After the block, also when it raises, memory is mapped again, and
    filled from the files, which are held open in between; sums over it must be those of before. In a restored process
    the files may be others, as on another host, if they lie at the same paths and hold the same bytes. A model whose
    weights can't be brought back has none: it does not answer.

    The first block gives the weights addresses that they keep, in an order that is the files'. It needs 300 MiB of GPU
    memory beside the model. Graphs and compiled code that hold addresses must be made after it; see `movable`.

    For one thread, while no other uses the model. Weights on the CPU stay.

    Args:
        model: whose parameters and buffers; or several, always the same together.
        weights: the files, or folders of files, that they came from. By default what transformers remembers of the
            model. With `()` the host keeps all.

    Yields:
        What stepped aside; after the block also how long it took to come back.

    Raises:
        UsageError: a block within another, or weights whose files are unknown; nothing has changed then.
        IntegrityError: after the block, a file is not what it was.
        WeightfsError: a file can't be read, or a GPU has too little memory left.
    """
    with _released(model, weights, _cuda_memory) as report:
        yield report


def movable(model: torch.nn.Module | Iterable[torch.nn.Module], *, weights: Weights | None = None) -> Released:
    """Give a model's weights the addresses they will keep, before CUDA graphs are captured; the same as an empty block.

    Args:
        model: see `released`.
        weights: see there.

    Returns:
        What moved.

    Raises:
        WeightfsError: see there.
    """
    with released(model, weights=weights) as report:
        pass
    return report


@contextmanager
def _released(
    model: torch.nn.Module | Iterable[torch.nn.Module], weights: Weights | None, memory_of: MemoryOf
) -> Iterator[Released]:
    modules = [model] if isinstance(model, torch.nn.Module) else list(model)
    if not _turn.acquire(blocking=False):
        raise UsageError(
            "weights are released already", mend="name all modules in one block: released([first, second])"
        )
    try:
        report = Released()
        if not any(memory_of(tensor.device) for one in modules for tensor in (*one.parameters(), *one.buffers())):
            report.note = "no weights on a GPU: nothing is released"
            log.warning("%s", report.note)
            yield report
            return
        with Files() as files:
            asides = step_aside(modules, _origins(modules, weights), memory_of, files, report)
            log.info("released %d bytes, of which files have %d", report.nbytes, report.file_bytes)
            if report.elsewhere:
                log.warning("something else holds the memory of %s: it is not free", ", ".join(report.elsewhere))
            try:
                yield report
            finally:
                for aside in asides:
                    aside.come_back(report)
    finally:
        _turn.release()


def _origins(modules: Sequence[torch.nn.Module], weights: Weights | None) -> Origins:
    if weights is None:
        return Origins(paths_of(modules))
    if isinstance(weights, str | os.PathLike):
        return Origins([os.fspath(weights)])
    return Origins([os.fspath(one) for one in weights])


_memories: dict[int, Memory] = {}


def _cuda_memory(device: torch.device) -> Memory | None:
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _memories:
        _memories[index] = _CudaMemory(index)
    return _memories[index]


class _Interface:
    """What torch makes a tensor of: `__cuda_array_interface__`, version 3."""

    def __init__(self, address: int, nbytes: int, owner: object) -> None:
        self.owner = owner
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


class _CudaMemory:
    """See `arena.Memory`: one GPU, through the CUDA driver.

    A mapping alone keeps its memory: the handle is given back at once, and the memory freed with the mapping
    (cuMemRelease: "the backing memory will be freed when all outstanding mappings are unmapped and all handles
    released").
    """

    def __init__(self, index: int) -> None:
        try:
            from cuda.bindings import driver
        except ImportError as e:
            raise UnfitError("cuda-bindings is not installed", mend="pip install 'weightfs[cuda]'") from e
        self._driver: Any = driver
        self._index = index
        self._device = torch.device("cuda", index)
        self._pool: staging.Staging | None = None
        torch.zeros(1, device=self._device)  # the primary context, which the driver's calls need
        place = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._property = driver.CUmemAllocationProp()
        self._property.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._property.location.type = place
        self._property.location.id = index
        self._access = driver.CUmemAccessDesc()
        self._access.location.type = place
        self._access.location.id = index
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        recommended = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        self.granularity = int(self._call("cuMemGetAllocationGranularity", self._property, recommended))

    def reserve(self, nbytes: int) -> int:
        return int(self._call("cuMemAddressReserve", nbytes, 0, 0, 0))

    def unreserve(self, address: int, nbytes: int) -> None:
        self._call("cuMemAddressFree", address, nbytes)

    def map(self, address: int, nbytes: int) -> None:
        memory = self._call("cuMemCreate", nbytes, self._property, 0)
        try:
            self._call("cuMemMap", address, nbytes, 0, memory, 0)
        finally:
            self._call("cuMemRelease", memory)
        try:
            self._call("cuMemSetAccess", address, nbytes, [self._access], 1)
        except BaseException:
            self.unmap(address, nbytes)
            raise

    def unmap(self, address: int, nbytes: int) -> None:
        self._call("cuMemUnmap", address, nbytes)

    def tensor(self, address: int, nbytes: int, owner: object) -> torch.Tensor:
        return torch.as_tensor(_Interface(address, nbytes, owner), device=self._device)

    def scratch(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def copy(self, pieces: Sequence[staging.Piece]) -> None:
        self.wait()  # what torch still does with the memory, on streams of its own
        if self._pool is None:
            self._pool = staging.opened(self._index, _POOL)
        self._pool.copy(pieces)

    def wait(self) -> None:
        torch.cuda.synchronize(self._device)

    def settle(self) -> int:
        self.wait()
        staging.close_shared()  # a snapshot would hold what is pinned
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        torch.cuda.empty_cache()
        return int(torch.cuda.memory_reserved(self._device))

    def graphs(self) -> int:
        # Compared by type: isinstance asks some objects for their __class__, which may do anything.
        return sum(issubclass(type(one), torch.cuda.CUDAGraph) for one in gc.get_objects())

    def _call(self, function: str, *arguments: Any) -> Any:
        result, *values = getattr(self._driver, function)(*arguments)
        if int(result):
            free = f", of {torch.cuda.mem_get_info(self._device)[0]} bytes free" if function == "cuMemCreate" else ""
            raise WeightfsError(f"the CUDA driver refused {function}: {result.name}{free}", path=f"GPU {self._index}")
        return values[0] if values else None
