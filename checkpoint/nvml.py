"""What Nvidia's management library says of the GPUs: identity, memory, and who uses it.

Asked instead of the CUDA driver because it needs no context: one takes 0.3 s and some 500 MB of the GPU it asks about.
By ctypes because the library's name, functions and structures are the same in every driver, while `cuda.bindings.nvml`
exists from 13.2 on only. Functions and structures are those of `nvml.h`.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

import msgspec

from checkpoint.errors import CudaError

_LIBRARY: Final = "libnvidia-ml.so.1"
_SUCCESS: Final = 0
_INSUFFICIENT_SIZE: Final = 7
_NAME_BYTES: Final = 96  # NVML_DEVICE_NAME_V2_BUFFER_SIZE, and that of a UUID
_UNKNOWN_BYTES: Final = (1 << 64) - 1  # NVML_VALUE_NOT_AVAILABLE


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU.

    Attributes:
        uuid: as nvidia-smi writes it, `GPU-` and 36 characters. The one name that is the same in every process.
        name: its model.
        total_bytes: memory it has.
        free_bytes: memory nobody holds now.
        used_bytes: what each process holds, by pid; a process whose share the driver can't tell is left out.
        mig: it is cut into instances (MIG), which the driver can't checkpoint.
    """

    uuid: str
    name: str
    total_bytes: int
    free_bytes: int
    used_bytes: dict[int, int]
    mig: bool


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class _Process(ctypes.Structure):
    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


class Nvml:
    """The library, loaded and initialised. Synchronous; a call takes about a millisecond.

    Raises:
        CudaError: it is missing, or can't be initialised.
    """

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(_LIBRARY)
        except OSError as error:
            raise CudaError(f"the driver's management library can't be loaded: {error}") from error
        self._call("nvmlInit_v2")

    def driver_version(self) -> str:
        """The driver's version, as `580.159.04`."""
        return self._text("nvmlSystemGetDriverVersion")

    def devices(self) -> tuple[Device, ...]:
        """Every GPU of this machine, also those that CUDA_VISIBLE_DEVICES hides.

        Raises:
            CudaError: the library refused.
        """
        count = ctypes.c_uint()
        self._call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        return tuple(self._device(index) for index in range(count.value))

    def _device(self, index: int) -> Device:
        handle = ctypes.c_void_p()
        self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
        memory = _Memory()
        self._call("nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory))
        current, pending = ctypes.c_uint(), ctypes.c_uint()
        # A GPU that knows no instances answers that it does not support the question.
        asked = self._library.nvmlDeviceGetMigMode(handle, ctypes.byref(current), ctypes.byref(pending))
        return Device(
            uuid=self._text("nvmlDeviceGetUUID", handle),
            name=self._text("nvmlDeviceGetName", handle),
            total_bytes=memory.total,
            free_bytes=memory.free,
            used_bytes=self._users(handle),
            mig=asked == _SUCCESS and current.value == 1,
        )

    def _users(self, handle: ctypes.c_void_p) -> dict[int, int]:
        """What each process holds. A device that can't tell has none: the figure only helps to plan."""
        room = 64
        while True:
            count, found = ctypes.c_uint(room), (_Process * room)()
            result = self._library.nvmlDeviceGetComputeRunningProcesses_v3(handle, ctypes.byref(count), found)
            if result != _INSUFFICIENT_SIZE:
                break
            room = count.value + 16
        if result != _SUCCESS:
            return {}
        return {one.pid: one.used for one in found[: count.value] if one.used != _UNKNOWN_BYTES}

    def _text(self, function: str, *handle: ctypes.c_void_p) -> str:
        buffer = ctypes.create_string_buffer(_NAME_BYTES)
        self._call(function, *handle, buffer, ctypes.c_uint(_NAME_BYTES))
        return buffer.value.decode(errors="replace")

    def _call(self, function: str, *arguments: Any) -> None:
        result: int = getattr(self._library, function)(*arguments)
        if result != _SUCCESS:
            explain = self._library.nvmlErrorString
            explain.restype = ctypes.c_char_p
            raise CudaError(f"{function}: {explain(result).decode(errors='replace')} ({result})")
