"""The CUDA driver as `prefetch.devices` asks for it: the only room of prefetch that imports cuda, and late.

Contexts, streams and events go through cuda-bindings. What every buffer needs is called in the same library by ctypes:

- What waits (for a copy, for pages to be pinned) gives the GIL away meanwhile. cuda-bindings 12.8 keeps it (its
  driver.pyx), and one thread that waits for an event would stop all that read.
- What only begins something keeps it. To have the GIL back, among a dozen threads that want it, takes longer than the
  call: with four such calls a buffer, buffers of 1 MiB came at 12 GB/s where those of 4 came at 32 (H100, 14 threads).

Names and results are those of the CUDA driver API (12.8 and 13.3); the primary context is the one that torch uses.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from typing import Any, Final

from prefetch.errors import NoDeviceError, StagingError

SUCCESS: Final = 0
OUT_OF_MEMORY: Final = 2
_HOST_ALLOC_PORTABLE: Final = 1
_REGISTER_PORTABLE: Final = 1
_REGISTER_READ_ONLY: Final = 8
_STREAM_NON_BLOCKING: Final = 1
_EVENT_BLOCKING_SYNC: Final = 1  # sleeps: a dozen threads that spin would take the processors of those that read
_EVENT_DISABLE_TIMING: Final = 2
_READ_ONLY_REGISTER_SUPPORTED: Final = 113
_LIBRARY: Final = "libcuda.so.1"
_MEND_BINDINGS: Final = "pip install 'cuda-bindings>=12.8'"
_MEND_DRIVER: Final = "install Nvidia driver 570 or newer"
_MEND_PINNED: Final = "allow more locked memory: ulimit -l unlimited, or docker --ulimit memlock=-1"
_WAITING: Final[dict[str, list[Any]]] = {
    "cuMemHostAlloc": [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_uint],
    "cuMemFreeHost": [ctypes.c_void_p],
    "cuMemHostRegister_v2": [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint],
    "cuMemHostUnregister": [ctypes.c_void_p],
    "cuEventSynchronize": [ctypes.c_void_p],
    "cuStreamSynchronize": [ctypes.c_void_p],
}
_BEGINNING: Final[dict[str, list[Any]]] = {
    "cuMemcpyHtoDAsync_v2": [ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p],
    "cuEventRecord": [ctypes.c_void_p, ctypes.c_void_p],
    "cuEventQuery": [ctypes.c_void_p],
}


class Driver:
    """The driver of this machine; see `prefetch.devices.Driver` for what each call does.

    Raises:
        NoDeviceError: no cuda-bindings, no driver, or one that does not start; says which, and the mend.
    """

    def __init__(self) -> None:
        try:
            library = ctypes.CDLL(_LIBRARY)
        except OSError as error:
            raise NoDeviceError(f"no Nvidia driver: {_LIBRARY} is not there", mend=_MEND_DRIVER) from error
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise NoDeviceError("the Python package cuda-bindings is not installed", mend=_MEND_BINDINGS) from error
        self._driver: Any = driver
        self._functions = _functions(library, _WAITING) | _functions(ctypes.PyDLL(_LIBRARY), _BEGINNING)
        self._copy = self._functions["cuMemcpyHtoDAsync_v2"]
        self._reached = self._functions["cuEventQuery"]
        self._blocks: dict[int, mmap.mmap] = {}
        self._contexts: dict[int, list[Any]] = {}
        try:
            self._call("cuInit", 0)
        except StagingError as error:
            raise NoDeviceError(f"the Nvidia driver does not start: {error.message}", mend="nvidia-smi") from error

    def retain(self, device: int) -> None:
        """See `prefetch.devices.Driver`."""
        count = int(self._call("cuDeviceGetCount"))
        if not 0 <= device < count:
            raise NoDeviceError(f"there is no GPU {device}: this process sees {count}", mend="nvidia-smi -L")
        context = self._call("cuDevicePrimaryCtxRetain", self._device(device))  # the driver counts
        self._contexts.setdefault(device, []).append(context)

    def release(self, device: int) -> None:
        """See `prefetch.devices.Driver`."""
        self._contexts[device].pop()
        self._call("cuDevicePrimaryCtxRelease", self._device(device))

    def pci_address(self, device: int) -> str:
        """See `prefetch.devices.Driver`."""
        name: bytes = self._call("cuDeviceGetPCIBusId", 32, self._device(device))
        return name.split(b"\0")[0].decode().lower()

    def use(self, device: int) -> None:
        """See `prefetch.devices.Driver`."""
        self._call("cuCtxSetCurrent", self._contexts[device][-1])

    def can_register(self, device: int) -> bool:
        """See `prefetch.devices.Driver`."""
        attribute = self._driver.CUdevice_attribute(_READ_ONLY_REGISTER_SUPPORTED)
        return bool(self._call("cuDeviceGetAttribute", attribute, self._device(device)))

    def allocate(self, nbytes: int) -> int:
        """See `prefetch.devices.Driver`."""
        try:
            return self.allocate_huge(nbytes)
        except (OSError, StagingError):  # no memory of that kind, or a driver that does not take it
            return self.allocate_plain(nbytes)

    def allocate_huge(self, nbytes: int) -> int:
        """Pinned memory in huge pages, touched by this thread.

        cuMemHostAlloc pins 2.3 GB/s however many threads ask for it (H100, 16 processors): 144 MiB take as long as 3
        GB take to be copied. What several threads have touched only needs to be registered.

        Raises:
            OSError: there is no memory.
            StagingError: the driver does not take it.
        """
        block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        try:
            with contextlib.suppress(OSError):  # a kernel without huge pages
                block.madvise(mmap.MADV_HUGEPAGE)
            block.madvise(mmap.MADV_DONTFORK)  # a child's copy is no use to it, and takes time
            address = ctypes.addressof(ctypes.c_char.from_buffer(block))
            ctypes.memset(address, 0, nbytes)
            self._direct("cuMemHostRegister_v2", address, nbytes, _REGISTER_PORTABLE)
        except BaseException:
            block.close()
            raise
        self._blocks[address] = block
        return address

    def allocate_plain(self, nbytes: int) -> int:
        """Pinned memory of the driver's own."""
        address = ctypes.c_void_p()
        self._direct("cuMemHostAlloc", ctypes.byref(address), nbytes, _HOST_ALLOC_PORTABLE)
        assert address.value is not None
        return address.value

    def free(self, address: int) -> None:
        """See `prefetch.devices.Driver`."""
        block = self._blocks.get(address)
        if block is None:
            self._direct("cuMemFreeHost", address)
        else:
            self._direct("cuMemHostUnregister", address)
            del self._blocks[address]
            block.close()

    def allocate_device(self, nbytes: int) -> int:
        """See `prefetch.devices.Driver`."""
        return int(self._call("cuMemAlloc", nbytes))

    def free_device(self, address: int) -> None:
        """See `prefetch.devices.Driver`."""
        self._call("cuMemFree", address)

    def register(self, address: int, nbytes: int) -> None:
        """See `prefetch.devices.Driver`."""
        self._direct("cuMemHostRegister_v2", address, nbytes, _REGISTER_READ_ONLY)

    def unregister(self, address: int) -> None:
        """See `prefetch.devices.Driver`."""
        self._direct("cuMemHostUnregister", address)

    def open_stream(self) -> int:
        """See `prefetch.devices.Driver`."""
        return int(self._call("cuStreamCreate", _STREAM_NON_BLOCKING))

    def close_stream(self, stream: int) -> None:
        """See `prefetch.devices.Driver`."""
        self._call("cuStreamDestroy", stream)

    def open_event(self) -> int:
        """See `prefetch.devices.Driver`."""
        return int(self._call("cuEventCreate", _EVENT_BLOCKING_SYNC | _EVENT_DISABLE_TIMING))

    def close_event(self, event: int) -> None:
        """See `prefetch.devices.Driver`."""
        self._call("cuEventDestroy", event)

    def copy(self, address: int, host_address: int, nbytes: int, stream: int) -> None:
        """See `prefetch.devices.Driver`."""
        if number := self._copy(address, host_address, nbytes, stream):
            raise self._error("cuMemcpyHtoDAsync", number)

    def record(self, event: int, stream: int) -> None:
        """See `prefetch.devices.Driver`."""
        self._direct("cuEventRecord", event, stream)

    def wait_event(self, event: int) -> None:
        """See `prefetch.devices.Driver`."""
        if self._reached(event):  # not yet, or an error, which the wait then says
            self._direct("cuEventSynchronize", event)

    def wait_stream(self, stream: int) -> None:
        """See `prefetch.devices.Driver`."""
        self._direct("cuStreamSynchronize", stream)

    def _device(self, device: int) -> Any:
        return self._call("cuDeviceGet", device)

    def _direct(self, function: str, *arguments: Any) -> None:
        if number := self._functions[function](*arguments):
            raise self._error(function, number)

    def _call(self, function: str, *arguments: Any) -> Any:
        """What a function of cuda-bindings gives, or its code as an error."""
        try:
            number, *given = getattr(self._driver, function)(*arguments)
        except RuntimeError as error:  # how cuda-bindings says that it finds no driver
            raise NoDeviceError(f"{function}: {error}", mend=_MEND_DRIVER) from error
        if int(number):
            raise self._error(function, int(number))
        return given[0] if given else None

    def _error(self, function: str, number: int) -> StagingError:
        try:
            name = self._driver.CUresult(number).name
        except ValueError:
            name = f"error {number}"
        mend = _MEND_PINNED if number == OUT_OF_MEMORY and "MemHost" in function else None
        return StagingError(f"{function} failed: {name}", mend=mend, number=number)


def _functions(library: ctypes.CDLL, signatures: dict[str, list[Any]]) -> dict[str, Any]:
    """Functions of the driver's library, each of which gives a CUresult."""
    found: dict[str, Any] = {}
    for name, arguments in signatures.items():
        found[name] = getattr(library, name)
        found[name].argtypes = arguments
        found[name].restype = ctypes.c_int
    return found
