"""The CUDA driver's calls of `weightfs.torch.released`, against a double of its virtual memory management."""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch", reason="this machine lacks torch")

import torch

from prefetch import staging
from weightfs.errors import UnfitError, WeightfsError
from weightfs.torch.released import _cuda_memory, _CudaMemory, _memories

MIB = 1 << 20


class Result(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2


class Driver(ModuleType):
    """As cuda.bindings.driver: each call gives a tuple that begins with its result.

    Memory lives as long as a handle or a mapping of it does; a range can be used once access is set.
    """

    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE="device")
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED="pinned")
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE="rw")
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_RECOMMENDED="recommended")

    def __init__(self) -> None:
        super().__init__("cuda.bindings.driver")
        self.room = 64 * MIB
        self.reserved: dict[int, int] = {}
        self.handles: dict[int, int] = {}
        self.mapped: dict[int, int] = {}
        self.usable: set[int] = set()
        self.refused = ""
        self._next = 1 << 40

    def CUmemAllocationProp(self) -> Any:  # noqa: N802
        return SimpleNamespace(type=None, location=SimpleNamespace(type=None, id=None))

    def CUmemAccessDesc(self) -> Any:  # noqa: N802
        return SimpleNamespace(flags=None, location=SimpleNamespace(type=None, id=None))

    def cuMemGetAllocationGranularity(self, prop: Any, option: str) -> Any:  # noqa: N802
        assert prop.location.id == 1
        assert (prop.type, prop.location.type, option) == ("pinned", "device", "recommended")
        return Result.CUDA_SUCCESS, 2 * MIB

    def cuMemAddressReserve(self, size: int, alignment: int, address: int, flags: int) -> Any:  # noqa: N802
        assert size % (2 * MIB) == alignment == address == flags == 0
        self._next += 1 << 30
        self.reserved[self._next] = size
        return Result.CUDA_SUCCESS, self._next

    def cuMemAddressFree(self, address: int, size: int) -> Any:  # noqa: N802
        assert address not in self.mapped
        assert self.reserved.pop(address) == size
        return (Result.CUDA_SUCCESS,)

    def cuMemCreate(self, size: int, prop: Any, flags: int) -> Any:  # noqa: N802
        assert (prop.location.id, flags) == (1, 0)
        if size > self.room:
            return Result.CUDA_ERROR_OUT_OF_MEMORY, None
        handle = len(self.handles) + 100
        self.handles[handle] = size
        return Result.CUDA_SUCCESS, handle

    def cuMemMap(self, address: int, size: int, offset: int, handle: int, flags: int) -> Any:  # noqa: N802
        if self.refused == "cuMemMap":
            return (Result.CUDA_ERROR_INVALID_VALUE,)
        assert self.reserved[address] == size == self.handles[handle]
        assert offset == flags == 0
        self.mapped[address] = size
        return (Result.CUDA_SUCCESS,)

    def cuMemRelease(self, handle: int) -> Any:  # noqa: N802
        del self.handles[handle]
        return (Result.CUDA_SUCCESS,)

    def cuMemSetAccess(self, address: int, size: int, access: list[Any], count: int) -> Any:  # noqa: N802
        if self.refused == "cuMemSetAccess":
            return (Result.CUDA_ERROR_INVALID_VALUE,)
        assert self.mapped[address] == size
        assert [(one.flags, one.location.id) for one in access] == [("rw", 1)]
        assert count == 1
        self.usable.add(address)
        return (Result.CUDA_SUCCESS,)

    def cuMemUnmap(self, address: int, size: int) -> Any:  # noqa: N802
        assert self.mapped.pop(address) == size
        self.usable.discard(address)
        return (Result.CUDA_SUCCESS,)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    package = ModuleType("cuda.bindings")
    package.driver = made  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", package)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: torch.empty(0))
    for name, given in {"synchronize": None, "empty_cache": None, "memory_reserved": 5, "mem_get_info": (7, 9)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, given=given: given)
    return made


def test_memory_comes_and_goes_and_the_addresses_stay(driver: Driver) -> None:
    memory = _CudaMemory(1)
    address = memory.reserve(4 * MIB)
    for _ in range(2):
        memory.map(address, 4 * MIB)
        assert driver.usable == {address}
        assert not driver.handles, "the mapping alone keeps the memory"
        memory.unmap(address, 4 * MIB)
        assert not driver.mapped
        assert driver.reserved == {address: 4 * MIB}
    memory.unreserve(address, 4 * MIB)
    assert not driver.reserved


@pytest.mark.parametrize("call", ["cuMemMap", "cuMemSetAccess"])
def test_what_the_driver_refuses_leaves_nothing(driver: Driver, call: str) -> None:
    memory = _CudaMemory(1)
    address = memory.reserve(4 * MIB)
    driver.refused = call
    with pytest.raises(WeightfsError, match=f"GPU 1: the CUDA driver refused {call}: CUDA_ERROR_INVALID_VALUE"):
        memory.map(address, 4 * MIB)
    assert not driver.handles
    assert not driver.mapped


def test_a_full_gpu_is_named(driver: Driver) -> None:
    memory = _CudaMemory(1)
    address = memory.reserve(128 * MIB)
    with pytest.raises(WeightfsError, match="OUT_OF_MEMORY, of 7 bytes free"):
        memory.map(address, 128 * MIB)
    assert not driver.mapped


def test_no_pool_is_left_for_a_snapshot(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pool:
        def __init__(self) -> None:
            self.copied: list[Any] = []
            self.closed = False

        def copy(self, pieces: Any) -> None:
            assert not self.closed
            self.copied += pieces

        def close(self) -> None:
            self.closed = True

    pools: list[Pool] = []

    def opened(device: int, config: Any) -> Pool:
        assert (device, config.way) == (1, "windows")
        pools.append(Pool())
        return pools[-1]

    monkeypatch.setattr(staging, "opened", opened)
    memory = _CudaMemory(1)
    memory.copy([staging.Piece(0, 0, 1, 1)])
    memory.copy([staging.Piece(0, 1, 1, 2)])
    assert memory.settle() == 5
    assert [(len(pool.copied), pool.closed) for pool in pools] == [(2, True)]
    memory.copy([staging.Piece(0, 0, 1, 1)])
    assert len(pools) == 2


def test_without_the_bindings_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(UnfitError, match="cuda-bindings") as caught:
        _CudaMemory(0)
    assert caught.value.mend == "pip install 'weightfs[cuda]'"


def test_a_gpu_has_one_and_a_cpu_none(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _cuda_memory(torch.device("cpu")) is None
    found = _cuda_memory(torch.device("cuda", 1))
    assert found is not None
    monkeypatch.delitem(_memories, 1)
    assert _cuda_memory(torch.device("cuda", 1)) is not found


@pytest.fixture(autouse=True)
def no_memory_stays() -> Iterator[None]:
    yield
    _memories.clear()
