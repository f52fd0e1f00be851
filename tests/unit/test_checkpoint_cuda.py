"""The real driver's room without a driver: what it calls with what, and how each answer comes out."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from enum import IntEnum
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from checkpoint import cuda
from checkpoint.cuda import CudaDriver, uuid_bytes
from checkpoint.cuda_program import Answer, Request, answer
from checkpoint.errors import CudaError
from checkpoint.nvml import Device, Nvml
from checkpoint.states import State

UUID = "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"


class Result(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_ILLEGAL_STATE = 401


class Uuid:
    """As cuda-bindings has it: its bytes are read from an address, once."""

    def __init__(self, address: int) -> None:
        self.bytes = ctypes.string_at(address, 16)


class Bindings(ModuleType):
    """`cuda.bindings.driver`, as far as it is used."""

    CUuuid = Uuid
    CUcheckpointLockArgs = SimpleNamespace
    CUcheckpointRestoreArgs = SimpleNamespace
    CUcheckpointGpuPair = SimpleNamespace

    def __init__(self) -> None:
        super().__init__("cuda.bindings.driver")
        self.calls: list[tuple[str, Any]] = []
        self.answers: dict[str, Any] = {}
        for name in ("cuInit", *(f"cuCheckpointProcess{one}" for one in ("Lock", "Checkpoint", "Restore", "Unlock"))):
            setattr(self, name, self.function(name))
        for name in ("GetState", "GetRestoreThreadId"):
            setattr(self, f"cuCheckpointProcess{name}", self.function(f"cuCheckpointProcess{name}"))

    def function(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls.append((name, arguments))
            given = self.answers.get(name, (Result.CUDA_SUCCESS,))
            if isinstance(given, Exception):
                raise given
            return given

        return call


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch) -> Bindings:
    """cuda-bindings are there, and so is the management library."""
    module = Bindings()
    package = ModuleType("cuda.bindings")
    monkeypatch.setattr(package, "driver", module, raising=False)
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", package)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", module)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    return module


class Library:
    """libnvidia-ml.so.1 with two GPUs, the second cut into instances."""

    users = 70
    result = 0

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return self.result

    def nvmlSystemGetDriverVersion(self, buffer: Any, length: Any) -> int:  # noqa: N802
        buffer.value = b"580.159.04"
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:  # noqa: N802
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:  # noqa: N802
        handle._obj.value = index.value + 1
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:  # noqa: N802
        memory._obj.total, memory._obj.free = 100 * handle.value, 60 * handle.value
        return 0

    def nvmlDeviceGetMigMode(self, handle: Any, current: Any, pending: Any) -> int:  # noqa: N802
        current._obj.value = 1
        return 3 if handle.value == 1 else 0

    def nvmlDeviceGetUUID(self, handle: Any, buffer: Any, length: Any) -> int:  # noqa: N802
        buffer.value = b"GPU-%d" % handle.value
        return 0

    def nvmlDeviceGetName(self, handle: Any, buffer: Any, length: Any) -> int:  # noqa: N802
        buffer.value = b"NVIDIA Test"
        return 0

    def nvmlDeviceGetComputeRunningProcesses_v3(self, handle: Any, count: Any, found: Any) -> int:  # noqa: N802
        if handle.value == 2:
            return 3  # not supported
        if count._obj.value < self.users:
            count._obj.value = self.users
            return 7
        for index in range(self.users):
            found[index].pid, found[index].used = 1000 + index, index
        found[0].used = (1 << 64) - 1
        count._obj.value = self.users
        return 0

    class nvmlErrorString:  # noqa: N801
        restype: Any = None

        def __new__(cls, result: int) -> bytes:  # type: ignore[misc]
            return b"Driver/library version mismatch"


def test_every_gpu_with_its_memory_and_its_users(bindings: Bindings) -> None:
    library = Nvml()
    assert library.driver_version() == "580.159.04"
    first, second = library.devices()
    assert (first.uuid, first.name, first.total_bytes, first.free_bytes) == ("GPU-1", "NVIDIA Test", 100, 60)
    assert first.used_bytes == {1000 + index: index for index in range(1, 70)}
    assert not first.mig
    assert second == Device(uuid="GPU-2", name="NVIDIA Test", total_bytes=200, free_bytes=120, used_bytes={}, mig=True)


def test_a_management_library_that_refuses_says_why(bindings: Bindings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Library, "result", 18)
    with pytest.raises(CudaError, match=r"nvmlInit_v2: Driver/library version mismatch \(18\)"):
        Nvml()


def test_a_management_library_that_is_missing(bindings: Bindings, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(CudaError, match="management library can't be loaded: libnvidia-ml"):
        Nvml()


def test_each_call_reaches_the_driver_with_its_arguments(bindings: Bindings) -> None:
    bindings.answers["cuCheckpointProcessGetState"] = (Result.CUDA_SUCCESS, 2)
    bindings.answers["cuCheckpointProcessGetRestoreThreadId"] = (Result.CUDA_SUCCESS, 77)
    driver = cuda.open_driver()
    assert bindings.calls == [("cuInit", (0,))]
    assert driver.version() == "580.159.04"
    assert len(driver.devices()) == 2
    assert driver.process_state(5) is State.CHECKPOINTED
    assert driver.restore_thread_id(5) == 77
    driver.lock(5, 1500)
    driver.checkpoint(5)
    driver.restore(5, ())
    driver.unlock(5)
    moves = [(name.removeprefix("cuCheckpointProcess"), given) for name, given in bindings.calls[3:]]
    assert moves == [
        ("Lock", (5, SimpleNamespace(timeoutMs=1500))),
        ("Checkpoint", (5, None)),
        ("Restore", (5, None)),
        ("Unlock", (5, None)),
    ]


def test_pairs_reach_the_driver_as_bytes(bindings: Bindings) -> None:
    other = UUID.replace("GPU-00", "ff")
    CudaDriver().restore(5, [(UUID, other), (other, UUID)])
    name, (pid, given) = bindings.calls[-1]
    assert (name, pid, given.gpuPairsCount) == ("cuCheckpointProcessRestore", 5, 2)
    swapped = [(one.oldUuid.bytes, one.newUuid.bytes) for one in given.gpuPairs]
    assert swapped == [(uuid_bytes(UUID), uuid_bytes(other)), (uuid_bytes(other), uuid_bytes(UUID))]


@pytest.mark.parametrize(
    ("version", "knows_pairs", "moves"), [("580.1", True, True), ("575.57.08", True, False), ("590.2", False, False)]
)
def test_whether_a_process_can_be_moved(
    bindings: Bindings, monkeypatch: pytest.MonkeyPatch, version: str, knows_pairs: bool, moves: bool
) -> None:
    if not knows_pairs:
        monkeypatch.delattr(Bindings, "CUcheckpointGpuPair")
    monkeypatch.setattr(CudaDriver, "version", lambda _: version)
    assert CudaDriver().moves() is moves


@pytest.mark.parametrize("text", ["", "GPU-", "GPU-0001", "MIG-00010203-0405-0607-0809-0a0b0c0d0e0f", UUID + "00"])
def test_what_is_no_uuid_never_reaches_the_driver(bindings: Bindings, text: str) -> None:
    driver = CudaDriver()
    with pytest.raises(CudaError, match="is not the UUID of a GPU"):
        driver.restore(5, [(UUID, text)])
    assert bindings.calls == [("cuInit", (0,))]


def test_a_refusal_carries_code_function_and_process(bindings: Bindings) -> None:
    bindings.answers["cuCheckpointProcessUnlock"] = (Result.CUDA_ERROR_ILLEGAL_STATE,)
    with pytest.raises(CudaError) as caught:
        CudaDriver().unlock(5)
    assert caught.value.result == 401
    assert caught.value.message == "cuCheckpointProcessUnlock of process 5: CUDA_ERROR_ILLEGAL_STATE (401)"


def test_a_machine_without_a_gpu(bindings: Bindings) -> None:
    bindings.answers["cuInit"] = (Result.CUDA_ERROR_NO_DEVICE,)
    with pytest.raises(CudaError, match=r"cuInit: CUDA_ERROR_NO_DEVICE \(100\)"):
        CudaDriver()


def test_a_driver_that_lacks_a_function_is_named(bindings: Bindings) -> None:
    bindings.answers["cuInit"] = RuntimeError("Failed to dlopen libcuda.so.1")
    with pytest.raises(CudaError, match=r"Failed to dlopen libcuda\.so\.1") as caught:
        CudaDriver()
    assert "driver 570" in (caught.value.mend or "")


def test_a_state_no_one_knows_is_no_state(bindings: Bindings) -> None:
    bindings.answers["cuCheckpointProcessGetState"] = (Result.CUDA_SUCCESS, 9)
    with pytest.raises(CudaError, match="state 9 of process 5"):
        CudaDriver().process_state(5)


def test_without_the_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(CudaError, match="cuda-bindings is not installed") as caught:
        cuda.open_driver()
    assert "pip install" in (caught.value.mend or "")


def test_bindings_from_before_checkpoints(bindings: Bindings) -> None:
    del bindings.cuCheckpointProcessLock
    with pytest.raises(CudaError, match="knows no checkpoints"):
        cuda.open_driver()


class TestAnswers:
    """The helper program answers every request, whatever the driver does."""

    @pytest.fixture
    def driver(self, bindings: Bindings) -> CudaDriver:
        bindings.answers["cuCheckpointProcessGetState"] = (Result.CUDA_SUCCESS, 1)
        bindings.answers["cuCheckpointProcessGetRestoreThreadId"] = (Result.CUDA_SUCCESS, 77)
        return CudaDriver()

    def test_values(self, driver: CudaDriver) -> None:
        assert answer(driver, Request(call="state", pid=5)) == Answer(number=1)
        assert answer(driver, Request(call="restore_thread", pid=5)) == Answer(number=77)
        assert answer(driver, Request(call="version")) == Answer(text="580.159.04")
        assert len(answer(driver, Request(call="devices")).devices) == 2
        for call in ("lock", "checkpoint", "restore", "unlock"):
            assert answer(driver, Request(call=call, pid=5)) == Answer()

    def test_a_refusal(self, driver: CudaDriver, bindings: Bindings) -> None:
        bindings.answers["cuCheckpointProcessLock"] = (Result.CUDA_ERROR_ILLEGAL_STATE,)
        said = answer(driver, Request(call="lock", pid=5, timeout_ms=1))
        assert said.result == 401
        assert "ILLEGAL_STATE" in said.failure
