"""When the next read of prefetch may begin, so that others who read from the same disk hardly notice.

Under passthrough nobody tells the daemon of a demand read. The disk's own counters do: every 50 ms nothing of ours is
under way for a moment, and what the disk has read since beyond what we read is others'. What the files being filled
have gained thereby was read by their loader, whom prefetch runs ahead of and need not yield to. Beside anybody else
one read is under way at a time, with a gap behind it in which the disk is theirs alone: long beside small reads, whose
slowest hundredth suffers, shorter beside large ones, whose bandwidth does.

The I/O priority is the idle one as well, but no help once a read was handed to the device. Measured beside somebody
who reads 64 KiB at a time, one after another, at random places (median of 6 rounds in turn; alone: p99 0.24 ms), on a
disk that gives us 4 GB/s when nobody else reads; what we get, and their p99:

    2 MiB, 16, 4, 1 at a time           1120  610  490 MB/s     54   6.4  5.0 times that of none
    512 KiB, 256 KiB, 1 at a time        550  300 MB/s          2.5  1.7 (and five times our processor's time)
    2 MiB, 1 at a time, then a gap
      of 6, 12, 25 ms                    170  100   70 MB/s     2.6  1.8  1.0

No depth without gaps keeps it within 1.5, and a read takes this disk 0.5 to 1 ms: hence 25 times as long. A second
loader that reads a file in large reads keeps 0.3 of its speed beside 16 reads, 0.84 beside gaps of 4 times, and all of
it beside 25 times.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

log = logging.getLogger(__name__)

_LOOK_S: Final = 0.05
_DRAINS: Final = 10
"""Until the next look takes at least as many times what it took until nothing was under way: a tenth is lost at most,
and not even that, since the disk works meanwhile."""
_QUIET_S: Final = 0.05
_STUCK_S: Final = 1.0
"""Who has waited so long for reads to end waits for them no longer."""
_SOME_BYTES: Final = 64 << 10
_SOME_BYTES_S: Final = 8 << 20
"""Others read when it is more than both together. A machine is never quite still, and who reads a few MB a second would
hold up a model for the sake of hardly any reads."""
_LARGE_BYTES: Final = 512 << 10
_GAP_BESIDE_SMALL: Final = 25
_GAP_BESIDE_LARGE: Final = 6
"""How many times longer than a read the gap behind it is."""
_GAP_S: Final = 0.002, 0.25
_READ_BYTES: Final = 4 << 20
_READ_S: Final = 0.001
"""How long the disk has to do with one of ours, until it was seen."""
_SECTOR: Final = 512
_EVERYTHING: Final = 1 << 62


@dataclass(frozen=True, slots=True)
class Counters:
    """What disks have done since they began, whoever asked.

    Attributes:
        nbytes: read.
        reads: requests that it took.
    """

    nbytes: int
    reads: int


class Disks:
    """The disks that files lie on, by the kernel's statistics: see its Documentation/block/stat.rst."""

    def __init__(self) -> None:
        self._stats: dict[int, int] = {}

    def follow(self, devices: Iterable[int]) -> None:
        """From now on count these, by `st_dev`; one without statistics (NFS, btrfs) does not count."""
        wanted = set(devices)
        for device in self._stats.keys() - wanted:
            os.close(self._stats.pop(device))
        for device in wanted - self._stats.keys():
            folder = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"
            whole = ".." if os.path.exists(f"{folder}/partition") else "."
            try:
                self._stats[device] = os.open(f"{folder}/{whole}/stat", os.O_RDONLY | os.O_CLOEXEC)
            except OSError as e:
                log.debug("device %d:%d says nothing of its reads: %s", os.major(device), os.minor(device), e.strerror)

    def counters(self) -> Counters | None:
        """Of all of them together; None where none has any."""
        nbytes = reads = 0
        try:
            for stat in self._stats.values():
                fields = os.pread(stat, 512, 0).split()
                reads += int(fields[0])
                nbytes += int(fields[2]) * _SECTOR
        except OSError:  # a disk that is no more
            return None
        return Counters(nbytes, reads) if self._stats else None


class Pace:
    """Whether to read, or to wait. For one thread at a time.

    Args:
        counters: of the disks that are read from, None where that is not known: then nobody is yielded to.
        resident: bytes in memory of all files that are being filled; None where that can't be told: the same.
        clock: seconds.
    """

    def __init__(
        self,
        counters: Callable[[], Counters | None],
        resident: Callable[[], int | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._counters = counters
        self._resident = resident
        self._clock = clock
        self._ours = 0
        self._mark: tuple[float, Counters, int] | None = None  # when, what the disks had read, and what we had
        self._gap: Counters | None = None  # what they had read when the last gap began
        self._held: tuple[int | None, int] = 0, 0  # what was in memory when that last mattered, and what we had read
        self._next_s = 0.0
        self._seen_s = -_QUIET_S
        self._draining_s: float | None = None
        self._stuck = 0
        self._read_s = _READ_S
        self._gaps = _GAP_BESIDE_SMALL
        self.yields = False

    def restart(self) -> None:
        """Other files, or other disks, are read from now on."""
        self._mark = None

    def ended(self, nbytes: int) -> None:
        """A read of ours has ended that had the disk read `nbytes`."""
        self._ours += nbytes
        if self.yields and nbytes:
            self._next_s = self._clock() + self._gap_s
            self._gap = self._counters()

    def wait_s(self, under_way: int) -> float:
        """Seconds to wait, or until a read of ours ends if that is sooner, before one may begin; 0: now."""
        now = self._clock()
        if now < self._next_s:
            return self._next_s - now if self.yields else 0.0
        self._stuck = min(self._stuck, under_way)
        if under_way > self._stuck:
            if self._draining_s is None:
                self._draining_s = now
            if (left := self._draining_s + _STUCK_S - now) > 0:
                return left
            self._stuck = under_way
        drained_s = now - self._draining_s if self._draining_s is not None else 0.0
        self._draining_s = None
        self._look(now)
        self._next_s = now if self.yields else now + max(_LOOK_S, _DRAINS * drained_s)
        return 0.0

    @property
    def _gap_s(self) -> float:
        return min(max(_GAP_S[0], self._gaps * self._read_s), _GAP_S[1])

    def _look(self, now: float) -> None:
        """See whether others have read since the mark."""
        counted, mark = self._counters(), self._mark
        if counted is None:
            self.yields = False
            return
        self._mark = now, counted, self._ours
        if mark is None:
            self._explain()
            return
        at_s, before, ours = mark
        others = counted.nbytes - before.nbytes - (self._ours - ours)
        few = _SOME_BYTES + _SOME_BYTES_S * (now - at_s)
        if others > few:
            others -= self._explain()
        if others > few:
            gap = self._gap if self.yields else None
            if gap is None:
                self._gaps = _GAP_BESIDE_SMALL
            elif (reads := counted.reads - gap.reads) > 0:
                is_large = (counted.nbytes - gap.nbytes) / reads >= _LARGE_BYTES
                self._gaps = _GAP_BESIDE_LARGE if is_large else _GAP_BESIDE_SMALL
            self._seen_s, self.yields, self._gap = now, True, None
        elif now - self._seen_s > _QUIET_S:
            if not self.yields and (read := self._ours - ours) > 4 * _READ_BYTES:
                self._read_s = (now - at_s) * _READ_BYTES / read
            self.yields = False

    def _explain(self) -> int:
        """Bytes of what is being filled that came into memory since the last call, and not by us."""
        last, held = self._held, self._resident()
        self._held = held, self._ours
        if held is None or last[0] is None:
            return _EVERYTHING
        return max(0, held - last[0] - (self._ours - last[1]))
