"""What staging asks of a GPU's driver: `prefetch.pinned` has the real one, tests a double on the CPU's memory."""

from __future__ import annotations

from typing import Protocol


class Driver(Protocol):
    """Host memory that a GPU reads by itself, and copies from it that go on while the caller does something else.

    Streams and events are the driver's handles, host and device addresses its numbers. Every call but `retain`,
    `release` and `pci_address` needs a device in use by its thread, see `use`. None that waits holds the GIL.

    Every call raises StagingError where the driver refuses.
    """

    def retain(self, device: int) -> None:
        """Keep the device's primary context, which torch uses as well, until `release`.

        Raises:
            NoDeviceError: there is no such device.
        """

    def release(self, device: int) -> None:
        """Give it back; what was made in it is to be gone already."""

    def pci_address(self, device: int) -> str:
        """Where the device sits, as /sys/bus/pci/devices names it."""

    def use(self, device: int) -> None:
        """Make that context the current one of this thread."""

    def can_register(self, device: int) -> bool:
        """Whether `register` takes memory that this process may only read."""

    def allocate(self, nbytes: int) -> int:
        """Pinned host memory, on page boundaries; gives its address."""

    def free(self, address: int) -> None:
        """Give pinned memory back, from which nothing is being copied."""

    def allocate_device(self, nbytes: int) -> int:
        """Memory of the device; gives its address."""

    def free_device(self, address: int) -> None:
        """Give it back, once nothing is being copied there."""

    def register(self, address: int, nbytes: int) -> None:
        """Pin memory of this process, whole pages, for reading; no page may be registered twice."""

    def unregister(self, address: int) -> None:
        """The reverse, once nothing is being copied from it."""

    def open_stream(self) -> int:
        """A queue of copies that does not wait for others."""

    def close_stream(self, stream: int) -> None:
        """Give it back, once it is empty."""

    def open_event(self) -> int:
        """A mark to put into streams; as good as reached before it is put into one."""

    def close_event(self, event: int) -> None:
        """Give it back."""

    def copy(self, address: int, host_address: int, nbytes: int, stream: int) -> None:
        """Begin a copy to the device, behind what the stream has; the host memory must stay as it is until then."""

    def record(self, event: int, stream: int) -> None:
        """Put a mark behind what the stream has."""

    def wait_event(self, event: int) -> None:
        """Wait until the mark is reached, where it was put last."""

    def wait_stream(self, stream: int) -> None:
        """Wait until the stream is empty."""
