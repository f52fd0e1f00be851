"""Whether memory is short, asked every 250 ms while prefetch runs: it halts within a second of that.

Four signs: little memory available; a control group that has met its limit (`memory.events`,
or `memory.failcnt` of version 1); tasks that have waited for memory (PSI), of the machine and of the group. Where the
kernel allows it PSI is a trigger that the kernel fires (windows this short take CAP_SYS_RESOURCE), else the time waited
is sampled.
Sources: Documentation/accounting/psi.rst, Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Literal

from weightfs.memory import MemoryGroup, meminfo_bytes, memory_group

STALL_US: Final = 100_000
WINDOW_US: Final = 1_000_000
"""Some task waited for memory for a tenth of a second."""
FLOOR_BYTES: Final = 256 << 20
FLOOR_SHARE: Final = 20
"""A twentieth of the machine's memory, or `FLOOR_BYTES` where that is more."""
HOLD_S: Final = 2.0
"""A sign that is a moment's counts for so long, so that prefetch does not start again between two of them."""
_READ_BYTES: Final = 4096
_EVENTS: Final = re.compile(rb"^(?:high|max|oom) (\d+)$", re.MULTILINE)
_FAILURES: Final = re.compile(rb"^(\d+)$", re.MULTILINE)
_WAITED: Final = re.compile(rb"^some .*total=(\d+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Reason:
    """Why prefetch must halt.

    Attributes:
        kind: `available` little is left, `limit` a control group met its limit, `stall` tasks wait for memory.
        detail: in words, with the figures and the file that told.
        short_bytes: how much is missing where that can be told, else 0.
    """

    kind: Literal["available", "limit", "stall"]
    detail: str
    short_bytes: int = 0


class Pressure:
    """Watches for pressure on memory; holds a few descriptors until closed. For one thread at a time.

    Args:
        root: holds `proc` and the mounts of `sys`.
        group: the control group to watch with those above it; by default this process's own.
        triggers: let the kernel fire PSI triggers where it allows them.
        clock: seconds.
    """

    def __init__(
        self,
        root: str = "/",
        *,
        group: MemoryGroup | None = None,
        triggers: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._last: Reason | None = None
        self._last_s = 0.0
        self._checked_s = clock()
        self._poll = select.poll()
        self._meminfo = _File(os.path.join(root, "proc/meminfo"))
        self._floor_bytes = max(FLOOR_BYTES, (self._meminfo.row("MemTotal") or 0) // FLOOR_SHARE)
        self._limits: list[_Counter] = []
        self._stalls: list[_Stall] = []
        self._triggers: dict[int, str] = {}
        stalls = [os.path.join(root, "proc/pressure/memory")]
        group = memory_group(root) if group is None else group
        if group is not None:
            name, pattern = ("memory.events", _EVENTS) if group.version == 2 else ("memory.failcnt", _FAILURES)
            self._limits = [_Counter(os.path.join(place, name), pattern) for place in group.upwards()]
            if group.version == 2:
                stalls.append(os.path.join(group.path, "memory.pressure"))
        for path in stalls:
            fd = _trigger(path) if triggers else None
            if fd is None:
                self._stalls.append(_Stall(path, self._clock()))
            else:
                self._triggers[fd] = path
                self._poll.register(fd, select.POLLPRI)

    @property
    def sources(self) -> dict[str, str]:
        """Each file that is watched for stalls, and how: `trigger`, `sampled` or `absent`."""
        found = dict.fromkeys(self._triggers.values(), "trigger")
        return found | {stall.path: "sampled" if stall.is_there else "absent" for stall in self._stalls}

    @property
    def told_s(self) -> float:
        """When a sign was last seen, by this one's clock: what `check` tells of may be up to `HOLD_S` older."""
        return self._last_s

    def check(self) -> Reason | None:
        """Why prefetch must halt now, or None. Takes some 50 us, waits for nothing and never raises.

        A call more than a second after the last one does not tell of limits met and stalls in between: nobody knows
        when they were.
        """
        now = self._clock()
        # All are read every time: what one counted while another told must be no news at the next check.
        available, limit, stall = self._available(), self._met_limit(), self._stalled(now)
        found = available or ((limit or stall) if now - self._checked_s <= WINDOW_US / 1e6 else None)
        self._checked_s = now
        if found is not None:
            self._last, self._last_s = found, now
        elif self._last is not None and now - self._last_s >= HOLD_S:
            self._last = None
        return self._last

    def close(self) -> None:
        """Give the descriptors back; `check` must not be called afterwards."""
        for fd in self._triggers:
            os.close(fd)
        self._triggers.clear()
        for file in (self._meminfo, *self._limits, *self._stalls):
            file.close()

    def __enter__(self) -> Pressure:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _available(self) -> Reason | None:
        available = self._meminfo.row("MemAvailable")
        if available is None or available >= self._floor_bytes:
            return None
        return Reason(
            "available",
            f"{available >> 20} MiB of memory available, prefetch leaves {self._floor_bytes >> 20} MiB",
            self._floor_bytes - available,
        )

    def _met_limit(self) -> Reason | None:
        risen = [counter.path for counter in self._limits if counter.has_risen()]
        return Reason("limit", f"{risen[0]}: the control group met its limit") if risen else None

    def _stalled(self, now: float) -> Reason | None:
        found = None
        for fd, events in self._poll.poll(0):
            path = self._triggers[fd]
            if events & select.POLLERR:  # the control group is gone
                self._poll.unregister(fd)
                del self._triggers[fd]
                os.close(fd)
            elif events & select.POLLPRI:
                found = _stall(path, STALL_US)
        for stall in self._stalls:
            waited_us = stall.waited_us(now)
            if waited_us >= STALL_US:
                found = _stall(stall.path, waited_us)
        return found


class _File:
    """A file of /proc or /sys that is read again and again, from its start."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = -1
        with contextlib.suppress(OSError):
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    @property
    def is_there(self) -> bool:
        return self._fd >= 0

    def read(self) -> bytes:
        """Its content; empty where it can't be read, or no longer."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                return os.pread(self._fd, _READ_BYTES, 0)
        return b""

    def row(self, name: str) -> int | None:
        return meminfo_bytes(self.read().decode("ascii", "replace"), name)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


class _Counter(_File):
    """Events of a control group, counted by the kernel."""

    def __init__(self, path: str, pattern: re.Pattern[bytes]) -> None:
        super().__init__(path)
        self._pattern = pattern
        self._before = self._count()

    def has_risen(self) -> bool:
        """Since the last call."""
        count = self._count()
        risen, self._before = count > self._before, count
        return risen

    def _count(self) -> int:
        return sum(int(number) for number in self._pattern.findall(self.read()))


class _Stall(_File):
    """The time that tasks waited for memory, sampled."""

    def __init__(self, path: str, now: float) -> None:
        super().__init__(path)
        self._samples = deque([(now, self._total())])

    def waited_us(self, now: float) -> int:
        """Within the last window, as far as it was sampled."""
        if now - self._samples[-1][0] > WINDOW_US / 1e6:
            self._samples.clear()  # nobody asked for a while
        self._samples.append((now, self._total()))
        # The oldest of the samples is the youngest of those at least a window old.
        while len(self._samples) > 2 and now - self._samples[1][0] >= WINDOW_US / 1e6:
            self._samples.popleft()
        return self._samples[-1][1] - self._samples[0][1]

    def _total(self) -> int:
        found = _WAITED.search(self.read())
        return int(found[1]) if found else 0


def _stall(path: str, waited_us: int) -> Reason:
    return Reason("stall", f"{path}: tasks waited for memory for {waited_us // 1000} ms within {WINDOW_US // 1000} ms")


def _trigger(path: str) -> int | None:
    """A descriptor that is ready (POLLPRI) once per window of stalls, or None where that is not allowed."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        os.write(fd, b"some %d %d\0" % (STALL_US, WINDOW_US))  # without the NUL the kernel cuts the last digit off
    except OSError:
        os.close(fd)
        return None
    return fd
