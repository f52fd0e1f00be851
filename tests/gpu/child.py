"""A process for the driver to checkpoint: `python child.py KIND [MIB]`, told what to do by lines on stdin.

KIND is how far it goes with CUDA: `plain` not at all, `loaded` loads libcuda, `initialised` calls cuInit, `context`
holds a context and MIB of GPU memory filled with a pattern. It answers every line with one of its own: `ok ...`.

    check        whether the pattern is still there, read back from the GPU
    busy         let the GPU wait for a word in host memory, so that its work does not end
    rest         write that word
    managed      64 MiB of managed memory more
    export       a handle for other processes to share its memory: `ok HEX`
    import HEX   share another's memory
    seen         what of the driver's shows in its mappings and descriptors: `ok NAMES`
    fork         a forked child that does nothing: `ok PID`
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import warnings
from typing import Any

MIB = 1 << 20
WORD = 0x5AFE0001
SLICE = 256 * MIB


class Gpu:
    def __init__(self, mib: int) -> None:
        from cuda.bindings import driver

        self.driver: Any = driver
        self.call("cuInit", 0)
        self.device = self.call("cuDeviceGet", 0)
        self.context = self.call("cuDevicePrimaryCtxRetain", self.device)
        self.call("cuCtxSetCurrent", self.context)
        self.nbytes = mib * MIB
        self.memory: Any = self.call("cuMemAlloc", self.nbytes) if mib else None
        if self.memory is not None:
            self.call("cuMemsetD32", self.memory, WORD, self.nbytes // 4)
            self.call("cuCtxSynchronize")
        self.flag = self.call("cuMemHostAlloc", 4096, driver.CU_MEMHOSTALLOC_DEVICEMAP)
        self.stream = self.call("cuStreamCreate", 1)

    def call(self, function: str, *arguments: Any) -> Any:
        result, *values = getattr(self.driver, function)(*arguments)
        if int(result):
            raise RuntimeError(f"{function}: {result}")
        return values[0] if len(values) == 1 else values

    def intact(self) -> bool:
        """Every byte, slice by slice, since a copy of all would need as much memory again."""
        room = bytearray(min(SLICE, self.nbytes))
        pattern = bytes(WORD.to_bytes(4, "little") * (len(room) // 4))
        address = ctypes.addressof(ctypes.c_char.from_buffer(room))
        for offset in range(0, self.nbytes, SLICE):
            count = min(SLICE, self.nbytes - offset)
            self.call("cuMemcpyDtoH", address, int(self.memory) + offset, count)
            # Whole slices are compared in place: copies of them made up half of the time, 17 s for 16 GB.
            if (room if count == len(room) else room[:count]) != pattern[:count]:
                return False
        return True

    def busy(self) -> None:
        ctypes.c_uint32.from_address(int(self.flag)).value = 0
        there = self.call("cuMemHostGetDevicePointer", self.flag, 0)
        equal = self.driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_EQ
        self.call("cuStreamWaitValue32", self.stream, there, 1, int(equal))

    def rest(self) -> None:
        ctypes.c_uint32.from_address(int(self.flag)).value = 1

    def export(self) -> str:
        handle = self.call("cuIpcGetMemHandle", self.memory)
        return bytes(handle.reserved).hex()

    def share(self, text: str) -> None:
        handle = self.driver.CUipcMemHandle()
        handle.reserved = bytes.fromhex(text)
        self.call("cuIpcOpenMemHandle", handle, 1)


def seen() -> str:
    """Without numbers, which differ each time."""
    with open("/proc/self/maps", encoding="utf-8") as file:
        names = {line.split(maxsplit=5)[5].strip() for line in file if len(line.split(maxsplit=5)) > 5}
    for fd in os.listdir("/proc/self/fd"):
        try:
            names.add(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue
    ours = {re.sub(r"[0-9]+", "N", name) for name in names if re.search("nvidia|shm|memfd|socket", name)}
    return ",".join(sorted(name.replace(" ", "_") for name in ours))


def main() -> None:
    kind, mib = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0
    gpu = None
    if kind == "loaded":
        ctypes.CDLL("libcuda.so.1")
    elif kind == "initialised":
        ctypes.CDLL("libcuda.so.1").cuInit(0)
    elif kind == "context":
        gpu = Gpu(mib)
    print(f"ok {os.getpid()}", flush=True)
    for line in sys.stdin:
        print(answer(gpu, *line.split()), flush=True)


def answer(gpu: Gpu | None, command: str, *arguments: str) -> str:
    try:
        if command == "fork":
            warnings.simplefilter("ignore")  # of forking with threads: it only waits
            child = os.fork()
            if not child:
                signal.pause()
            return f"ok {child}"
        if command == "seen":
            return f"ok {seen()}"
        if gpu is None:
            return "ok"
        match command:
            case "check":
                return "ok" if gpu.intact() else "no: its memory is not what it was"
            case "busy":
                gpu.busy()
            case "rest":
                gpu.rest()
            case "managed":
                gpu.call("cuMemAllocManaged", 64 * MIB, 1)
            case "export":
                return f"ok {gpu.export()}"
            case "import":
                gpu.share(*arguments)
    except Exception as error:  # noqa: BLE001  it is what the child answers
        return f"no: {type(error).__name__}: {error}"
    return "ok"


if __name__ == "__main__":
    main()
