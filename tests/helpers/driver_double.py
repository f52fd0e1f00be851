"""A CUDA driver on the CPU's memory, whose copies really go on while the caller does something else.

Each stream is a thread that copies late and in order. What must not happen is remembered, not raised, and told by
`check`: a host buffer that was written before its copy was over (its bytes have another checksum by then), memory that
was freed or unregistered while it was being copied, used after that or given back twice, a call from a thread that uses
no device, a handle of nobody, and whatever is left at the end.
"""

from __future__ import annotations

import ctypes
import mmap
import queue
import random
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable

from prefetch.errors import NoDeviceError, StagingError

_PAGE = mmap.PAGESIZE


class _Stream:
    """A queue of work and the thread that does it."""

    def __init__(self) -> None:
        self.work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while (task := self.work.get()) is not None:
            task()


class DriverDouble:
    """See the module. Satisfies `prefetch.devices.Driver`.

    Args:
        devices: how many GPUs there are.
        registers: whether memory that may only be read can be registered.
        slowest_s: a copy takes up to that long.
        seed: of how long copies take.

    Attributes:
        violations: what must not have happened.
        counts: calls by name.
        failing: calls by name to what they raise, once each, after as many calls as the number says.
        gate: copies wait until it is set.
        copied: the device addresses of the copies, in the order in which they were asked for.
        most_pinned_bytes: the most that was allocated at once.
    """

    def __init__(self, *, devices: int = 1, registers: bool = True, slowest_s: float = 0.0005, seed: int = 0) -> None:
        self._devices = devices
        self._registers = registers
        self._slowest_s = slowest_s
        self._random = random.Random(seed)
        self._turn = threading.RLock()
        self._thread = threading.local()
        self._numbers = iter(range(1000, 1 << 60))
        self._pinned: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self._sizes: dict[int, int] = {}
        self._registered: dict[int, int] = {}
        self._device_memory: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self._allocated: set[int] = set()
        self._streams: dict[int, _Stream] = {}
        self._events: dict[int, threading.Event] = {}
        self._underway: dict[int, tuple[int, int]] = {}
        self._graveyard: list[object] = []  # freed memory stays mapped: a late copy is told of, and does not crash
        self.retained: Counter[int] = Counter()
        self.violations: list[str] = []
        self.counts: Counter[str] = Counter()
        self.failing: dict[str, tuple[int, BaseException]] = {}
        self.copied: list[int] = []
        self.most_pinned_bytes = 0
        self.gate = threading.Event()
        self.gate.set()

    # What tests use

    def device_memory(self, nbytes: int) -> int:
        """Memory of the device; gives its address. It stays for as long as the double."""
        block = ctypes.create_string_buffer(max(nbytes, 1))
        self._device_memory[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def bytes_at(self, address: int, nbytes: int) -> bytes:
        """What the device has there."""
        return ctypes.string_at(address, nbytes)

    def fail(self, call: str, error: BaseException | None = None, *, after: int = 0) -> None:
        """Have one call of a name raise, after as many that do not."""
        self.failing[call] = (after, error or StagingError(f"{call} failed: CUDA_ERROR_UNKNOWN", number=999))

    def check(self) -> None:
        """Assert that nothing was violated and nothing is left."""
        with self._turn:
            assert not self.violations, self.violations
            left = {
                "pinned": len(self._sizes),
                "device": len(self._allocated),
                "registered": len(self._registered),
                "streams": len(self._streams),
                "events": len(self._events),
                "contexts": +self.retained,
            }
            assert not any(left.values()), left

    # What staging uses

    def retain(self, device: int) -> None:
        self._called("retain", anywhere=True)
        if device >= self._devices:
            raise NoDeviceError(f"there is no GPU {device}: this process sees {self._devices}")
        self.retained[device] += 1

    def release(self, device: int) -> None:
        self._called("release", anywhere=True)
        self.retained[device] -= 1
        if self.retained[device] < 0:
            self._violated(f"device {device} released twice")

    def pci_address(self, device: int) -> str:
        self._called("pci_address", anywhere=True)
        return f"0000:{device:02x}:00.0"

    def use(self, device: int) -> None:
        self._called("use", anywhere=True)
        if not self.retained[device]:
            self._violated(f"use of device {device}, which was not retained")
        self._thread.device = device

    def can_register(self, device: int) -> bool:
        self._called("can_register", anywhere=True)
        return self._registers

    def allocate(self, nbytes: int) -> int:
        self._called("allocate")
        block = ctypes.create_string_buffer(nbytes + _PAGE)
        address = -(-ctypes.addressof(block) // _PAGE) * _PAGE
        with self._turn:
            self._pinned[address] = block
            self._sizes[address] = nbytes
            self.most_pinned_bytes = max(self.most_pinned_bytes, sum(self._sizes.values()))
        return address

    def free(self, address: int) -> None:
        self._called("free")
        with self._turn:
            nbytes = self._sizes.pop(address, None)
            if nbytes is None:
                self._violated(f"free of {address:#x}, which is not allocated (any more)")
                return
            self._not_underway("free", address, nbytes)
            self._graveyard.append(self._pinned.pop(address))

    def allocate_device(self, nbytes: int) -> int:
        self._called("allocate_device")
        with self._turn:
            address = self.device_memory(nbytes)
            self._allocated.add(address)
        return address

    def free_device(self, address: int) -> None:
        self._called("free_device")
        with self._turn:
            if address in self._allocated:
                self._allocated.remove(address)
                self._graveyard.append(self._device_memory.pop(address))
            else:
                self._violated(f"free of the device's {address:#x}, which is not allocated (any more)")

    def register(self, address: int, nbytes: int) -> None:
        self._called("register")
        with self._turn:
            if address % _PAGE or nbytes % _PAGE:
                self._violated(f"register of parts of pages: {address:#x}, {nbytes} bytes")
            for other, length in self._registered.items():
                if address < other + length and other < address + nbytes:
                    raise StagingError("cuMemHostRegister failed: HOST_MEMORY_ALREADY_REGISTERED", number=712)
            self._registered[address] = nbytes

    def unregister(self, address: int) -> None:
        self._called("unregister")
        with self._turn:
            nbytes = self._registered.pop(address, None)
            if nbytes is None:
                self._violated(f"unregister of {address:#x}, which is not registered (any more)")
                return
            self._not_underway("unregister", address, nbytes)

    def open_stream(self) -> int:
        self._called("open_stream")
        with self._turn:
            stream = next(self._numbers)
            self._streams[stream] = _Stream()
        return stream

    def close_stream(self, stream: int) -> None:
        self._called("close_stream")
        with self._turn:
            found = self._streams.pop(stream, None)
        if found is None:
            self._violated("a stream closed twice")
        else:
            found.work.put(None)

    def open_event(self) -> int:
        self._called("open_event")
        with self._turn:
            event = next(self._numbers)
            self._events[event] = threading.Event()
            self._events[event].set()
        return event

    def close_event(self, event: int) -> None:
        self._called("close_event")
        with self._turn:
            if self._events.pop(event, None) is None:
                self._violated("an event closed twice")

    def copy(self, address: int, host_address: int, nbytes: int, stream: int) -> None:
        self._called("copy")
        with self._turn:
            queue_of = self._streams.get(stream)
            if queue_of is None:
                self._violated("a copy on a stream that is not there")
                return
            if not self._holds(self._sizes, host_address, nbytes) and not self._holds(
                self._registered, host_address, nbytes
            ):
                self._violated(f"a copy from {host_address:#x}, which is neither allocated nor registered")
                return
            if not any(
                start <= address and address + nbytes <= start + len(block)
                for start, block in self._device_memory.items()
            ):
                raise StagingError("cuMemcpyHtoDAsync failed: CUDA_ERROR_INVALID_VALUE", number=1)
            number = next(self._numbers)
            self._underway[number] = (host_address, nbytes)
            self.copied.append(address)
            pause_s = self._random.random() * self._slowest_s
        before = zlib.crc32(ctypes.string_at(host_address, nbytes))

        def carry_out() -> None:
            self.gate.wait()
            time.sleep(pause_s)
            half = nbytes // 2
            ctypes.memmove(address, host_address, half)
            ctypes.memmove(address + half, host_address + half, nbytes - half)
            after = zlib.crc32(ctypes.string_at(host_address, nbytes))
            with self._turn:
                if after != before:
                    self._violated(f"the buffer at {host_address:#x} was written before its copy was over")
                del self._underway[number]

        queue_of.work.put(carry_out)

    def record(self, event: int, stream: int) -> None:
        self._called("record")
        with self._turn:
            if event not in self._events or stream not in self._streams:
                self._violated("an event or a stream that is not there")
                return
            reached = self._events[event] = threading.Event()  # who waits for an earlier record is not held up by this
            self._streams[stream].work.put(reached.set)

    def wait_event(self, event: int) -> None:
        self._called("wait_event")
        with self._turn:
            reached = self._events.get(event)
        if reached is None:
            self._violated("wait for an event that is not there")
        else:
            reached.wait()

    def wait_stream(self, stream: int) -> None:
        self._called("wait_stream")
        empty = threading.Event()
        with self._turn:
            if stream not in self._streams:
                self._violated("wait for a stream that is not there")
                return
            self._streams[stream].work.put(empty.set)
        empty.wait()

    def _called(self, name: str, *, anywhere: bool = False) -> None:
        with self._turn:
            self.counts[name] += 1
            if not anywhere and getattr(self._thread, "device", None) is None:
                self._violated(f"{name} in {threading.current_thread().name}, which uses no device")
            if name in self.failing:
                left, error = self.failing[name]
                if not left:
                    del self.failing[name]
                    raise error
                self.failing[name] = (left - 1, error)

    @staticmethod
    def _holds(blocks: dict[int, int], address: int, nbytes: int) -> bool:
        return any(start <= address and address + nbytes <= start + length for start, length in blocks.items())

    def _not_underway(self, call: str, address: int, nbytes: int) -> None:
        for start, length in self._underway.values():
            if address < start + length and start < address + nbytes:
                self._violated(f"{call} of {address:#x} during a copy from it")

    def _violated(self, what: str) -> None:
        with self._turn:
            self.violations.append(what)
