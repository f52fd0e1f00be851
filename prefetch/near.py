"""Which processors sit where a GPU does: on machines of several sockets a bus is fast from its own one only."""

from __future__ import annotations

import contextlib
import os


def processors_near(pci_address: str, root: str = "/") -> frozenset[int] | None:
    """The processors of a device's NUMA node that this thread may use, None where there is no choice to make.

    Args:
        pci_address: of the device, as /sys/bus/pci/devices names it.
        root: holds `sys`.
    """
    try:
        with open(os.path.join(root, "sys/bus/pci/devices", pci_address, "numa_node")) as file:
            node = int(file.read())
        if node < 0:
            return None
        with open(os.path.join(root, f"sys/devices/system/node/node{node}/cpulist")) as file:
            near = _parse(file.read())
    except (OSError, ValueError):
        return None
    allowed = os.sched_getaffinity(0)
    found = near & allowed
    return frozenset(found) if found and found != allowed else None


def stay_near(processors: frozenset[int] | None) -> None:
    """Have this thread run, and so take its memory, on these processors; nothing where there are none to choose."""
    if processors is not None:
        with contextlib.suppress(OSError):  # a container that forbids it, or processors that have gone
            os.sched_setaffinity(0, processors)


def _parse(text: str) -> set[int]:
    """Numbers of a list as `0-3,8`."""
    found: set[int] = set()
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            found.update(range(int(first), int(last or first) + 1))
    return found
