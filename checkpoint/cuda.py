"""The CUDA driver's checkpoint functions: the only room that imports cuda.

They are called through cuda-bindings rather than `cuda.core.checkpoint.Process`, which tells a refused call from a
failed one by the text of a RuntimeError only: what to do next depends on the code. `cuda.bindings` is imported when a
`CudaDriver` is made, so that everything else works where it is not installed.

Names, structures and results are those of the CUDA driver API's chapter "CUDA Checkpointing" (CUDA 12.8; driver 570).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Final, Protocol

from checkpoint.errors import CudaError
from checkpoint.nvml import Device, Nvml
from checkpoint.states import State

SUCCESS: Final = 0
INVALID_VALUE: Final = 1
OUT_OF_MEMORY: Final = 2
NOT_INITIALIZED: Final = 3
NO_DEVICE: Final = 100
OPERATING_SYSTEM: Final = 304
ILLEGAL_STATE: Final = 401
NOT_READY: Final = 600
NOT_SUPPORTED: Final = 801

_MEND_BINDINGS: Final = "pip install 'cuda-bindings>=12.8'"
_MOVES_FROM: Final = 580
_MEND_DRIVER: Final = "install Nvidia driver 570 or newer"

Pair = tuple[str, str]
"""A GPU of the snapshot and the GPU to restore it onto, each by UUID, with or without the prefix `GPU-`."""


class Driver(Protocol):
    """What the helper process asks of a driver. Every function blocks, and raises CudaError with the driver's code."""

    def version(self) -> str:
        """The driver's version, as `580.159.04`."""

    def devices(self) -> tuple[Device, ...]:
        """Every GPU, with its memory as it is now."""

    def moves(self) -> bool:
        """Whether it can restore a process onto other GPUs than its own, see `restore`."""

    def process_state(self, pid: int) -> State:
        """The state a process is in; a code where it is no CUDA process."""

    def lock(self, pid: int, timeout_ms: int) -> None:
        """Stop its CUDA calls once its work is done. After `timeout_ms` NOT_READY, and it runs on; 0 waits for ever."""

    def checkpoint(self, pid: int) -> None:
        """Bring its GPU memory into its own host memory and give its GPUs free."""

    def restore(self, pid: int, pairs: Sequence[Pair]) -> None:
        """The reverse. Not transactional: what failed for lack of memory fails ever after."""

    def unlock(self, pid: int) -> None:
        """Let its CUDA calls go on."""

    def restore_thread_id(self, pid: int) -> int:
        """The thread of the process that carries out what is asked of it."""


def open_driver() -> Driver:
    """The real one, initialised: seconds where there are many GPUs.

    Raises:
        CudaError: no cuda-bindings, no driver, no GPU, or a driver without checkpoints; says which, and the mend.
    """
    return CudaDriver()


class CudaDriver:
    """The driver of this machine, in this process."""

    def __init__(self) -> None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise CudaError("the Python package cuda-bindings is not installed", mend=_MEND_BINDINGS) from error
        if not hasattr(driver, "cuCheckpointProcessLock"):
            raise CudaError("the Python package cuda-bindings knows no checkpoints", mend=_MEND_BINDINGS)
        self._driver: Any = driver
        # Needed before a restore, unless the GPU is in persistence mode.
        self._call("cuInit", 0)
        self._nvml = Nvml()

    def version(self) -> str:
        """See `Driver`."""
        return self._nvml.driver_version()

    def devices(self) -> tuple[Device, ...]:
        """See `Driver`."""
        return self._nvml.devices()

    def moves(self) -> bool:
        """See `Driver`."""
        # In CUDA 12.8 and 12.9 the arguments of a restore are reserved, and a driver of theirs takes no pairs.
        return hasattr(self._driver, "CUcheckpointGpuPair") and int(self.version().partition(".")[0]) >= _MOVES_FROM

    def process_state(self, pid: int) -> State:
        """See `Driver`."""
        number = int(self._call("cuCheckpointProcessGetState", pid))
        try:
            return State(number)
        except ValueError as error:
            raise CudaError(f"the driver says state {number} of process {pid}, which is not known") from error

    def lock(self, pid: int, timeout_ms: int) -> None:
        """See `Driver`."""
        arguments = self._driver.CUcheckpointLockArgs()
        arguments.timeoutMs = timeout_ms
        self._call("cuCheckpointProcessLock", pid, arguments)

    def checkpoint(self, pid: int) -> None:
        """See `Driver`."""
        self._call("cuCheckpointProcessCheckpoint", pid, None)

    def restore(self, pid: int, pairs: Sequence[Pair]) -> None:
        """See `Driver`."""
        arguments = None
        if pairs:
            arguments = self._driver.CUcheckpointRestoreArgs()
            arguments.gpuPairs = [self._pair(*pair) for pair in pairs]
            arguments.gpuPairsCount = len(pairs)
        self._call("cuCheckpointProcessRestore", pid, arguments)

    def unlock(self, pid: int) -> None:
        """See `Driver`."""
        self._call("cuCheckpointProcessUnlock", pid, None)

    def restore_thread_id(self, pid: int) -> int:
        """See `Driver`."""
        return int(self._call("cuCheckpointProcessGetRestoreThreadId", pid))

    def _pair(self, old: str, new: str) -> Any:
        # The bindings give a CUuuid no way in but the address of its bytes, which must outlive the copy into the pair.
        bytes_of = [ctypes.create_string_buffer(uuid_bytes(text), 16) for text in (old, new)]
        pair = self._driver.CUcheckpointGpuPair()
        pair.oldUuid, pair.newUuid = (self._driver.CUuuid(ctypes.addressof(one)) for one in bytes_of)
        return pair

    def _call(self, function: str, *arguments: Any) -> Any:
        """The value a driver function gives, or its code as an error."""
        try:
            result, *values = getattr(self._driver, function)(*arguments)
        except Exception as error:
            raise CudaError(f"{function}: {error}", mend=_MEND_DRIVER) from error
        if int(result) != SUCCESS:
            raise refusal(function, int(result), str(getattr(result, "name", "")), arguments)
        return values[0] if values else None


def refusal(function: str, result: int, name: str, arguments: Sequence[Any] = ()) -> CudaError:
    """The error that a driver's function gives for a code other than SUCCESS."""
    of = f" of process {arguments[0]}" if function.startswith("cuCheckpointProcess") and arguments else ""
    return CudaError(f"{function}{of}: {name or 'error'} ({result})", result=result)


def uuid_bytes(text: str) -> bytes:
    """The 16 bytes of a GPU's UUID.

    Raises:
        CudaError: it is none.
    """
    try:
        found = bytes.fromhex(text.removeprefix("GPU-").replace("-", ""))
    except ValueError:
        found = b""
    if len(found) != 16:
        raise CudaError(f"{text!r} is not the UUID of a GPU", mend="nvidia-smi -L shows them")
    return found
