"""When the next read of prefetch may begin, so that others who read from the same disk hardly notice.

Under passthrough nobody tells the daemon of a demand read. The disk's own counters do. Each 10 ms what it has read is
compared with what has come to us: as long as the difference may be what we have under way, nobody else reads, and
nothing waits. When it is more than that, and more than the files being filled have gained, which was read by us or by
their loader, whom prefetch runs ahead of and need not yield to, nothing of ours is begun for a moment: what the disk
has read beyond those files then is others'. (Such a moment lasts until what is under way has come, 10 to 30 ms beside a
loader: at 20 a second, whoever read, they took a third of the disk's time from a prefetch.) Beside anybody else one
read is under way at a time, with a gap behind it in which the disk is theirs alone: long beside small reads, whose
slowest hundredth suffers, shorter beside large ones, whose bandwidth does.

The I/O priority is the idle one then as well, but no help once a read was handed to the device. (It is no good beside
a model's own loader: behind its reads prefetch would be as slow as they are.) Measured beside somebody
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

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

log = logging.getLogger(__name__)

_GLANCE_S: Final = 0.01
_LOOK_S: Final = 0.05
_TOLERATED_S: Final = 0.4
"""What others may have read in so long is overlooked, however long it took them."""
_AGAIN_S: Final = 0.02
"""Others are looked for again so soon before anything is yielded: a program that begins to run reads a little too."""
_DRAINS: Final = 2
"""The next look is at least as many times as far away as the last one took until nothing was under way; meanwhile the
disk works all the same."""
_AHEAD_S: Final = 0.03
_FEW_UNDER_WAY: Final = 1
"""What was read ahead of us is waited for as well, but not longer than that: it may be others'."""
_POLL_S: Final = 0.001
_QUIET_S: Final = 0.05, 0.8
"""Others have ended when nothing was seen of them for so long; twice as long each time they were there again soon."""
_SOON_S: Final = 1.0
_SUSPECT_DEPTH: Final = 2
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


@dataclass(frozen=True, slots=True)
class Counters:
    """What disks have done since they began, whoever asked.

    Attributes:
        nbytes: read.
        reads: requests that it took.
        under_way: requests that have not ended.
    """

    nbytes: int
    reads: int
    under_way: int = 0


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

    def read_ahead_bytes(self) -> int:
        """The most that the kernel reads ahead of a reader of any of them, 0 where that is not known."""
        found = [0]
        for device in self._stats:
            path = f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb"
            with contextlib.suppress(OSError), open(path) as setting:
                found.append(int(setting.read()) << 10)
        return max(found)

    def counters(self) -> Counters | None:
        """Of all of them together; None where none has any."""
        nbytes = reads = under_way = 0
        try:
            for stat in self._stats.values():
                fields = os.pread(stat, 512, 0).split()
                reads += int(fields[0])
                nbytes += int(fields[2]) * _SECTOR
                under_way += int(fields[8])
        except OSError:  # a disk that is no more
            return None
        return Counters(nbytes, reads, under_way) if self._stats else None


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
        self._mark: tuple[float, int] | None = None  # when others were last looked for, and what we had read
        self._known = 0  # what the disks had read that we had not, when that was last explained
        self._known_s = 0.0
        self._looked_s = 0.0  # when it was asked last what there is of the files, and with nothing under way
        self._settled_s = 0.0
        self._most = 0  # what the disks had read that is not in the files being filled; pages on their way count there
        self._gap: Counters | None = None  # what they had read when the last gap began
        self._next_s = 0.0
        self._seen_s = -_QUIET_S[1]
        self._quiet_s = _QUIET_S[0]
        self._resumed_s = -_SOON_S
        self._draining_s: float | None = None
        self._stuck = 0
        self._read_s = _READ_S
        self._gaps = _GAP_BESIDE_SMALL
        self._suspects = False
        self.yields = False

    @property
    def holds(self) -> bool:
        """Whether others read, or may: who is reading is to stop soon. From any thread."""
        return self.yields or self._suspects or self._draining_s is not None

    def restart(self) -> None:
        """Other files, or other disks, are read from now on."""
        self._mark = None

    def came(self, nbytes: int) -> None:
        """So much of a read of ours has come from the disk."""
        self._ours += nbytes

    def ended(self, nbytes: int) -> None:
        """A read of ours has ended that had the disk read `nbytes`; they have come."""
        if self.yields and nbytes:
            self._next_s = self._clock() + self._gap_s
            self._gap = self._counters()

    def wait_s(self, under_way: int, unseen_bytes: int = 0) -> float:
        """Seconds to wait, or until a read of ours ends if that is sooner, before one may begin; 0: now.

        Args:
            under_way: reads of ours.
            unseen_bytes: what the disk may have read for them that did not come yet.
        """
        now = self._clock()
        if now < self._next_s:
            waits = self.yields or (self._suspects and under_way >= _SUSPECT_DEPTH)
            return self._next_s - now if waits else 0.0
        if self.yields and now - self._looked_s < _LOOK_S and not under_way:
            return 0.0
        counted = self._counters()
        if self._draining_s is None and self._is_explained(now, counted, unseen_bytes):
            self._next_s = now + _GLANCE_S
            return 0.0
        self._stuck = min(self._stuck, under_way)
        if under_way > self._stuck:
            if self._draining_s is None:
                self._draining_s = now
            if (left := self._draining_s + _STUCK_S - now) > 0:
                return left
            self._stuck = under_way
        if not self.yields and counted is not None and counted.under_way > _FEW_UNDER_WAY:
            if self._draining_s is None:
                self._draining_s = now
            if now < self._draining_s + _AHEAD_S:
                return _POLL_S
        drained_s = now - self._draining_s if self._draining_s is not None else 0.0
        self._draining_s = None
        self._look(now, counted)
        again_s = _AGAIN_S if self._suspects else max(_GLANCE_S, _DRAINS * drained_s)
        self._next_s = now if self.yields else now + again_s
        return 0.0

    def _is_explained(self, now: float, counted: Counters | None, unseen_bytes: int) -> bool:
        """Whether what the disks have read may all be ours, or was looked into just now: then nobody is looked for."""
        mark = self._mark
        if mark is None or counted is None or self.yields or self._suspects:
            return False
        beyond = counted.nbytes - self._ours
        self._known = min(self._known + int(_SOME_BYTES_S * (now - self._known_s)), beyond)
        self._known_s = now
        if beyond > self._known + _SOME_BYTES + unseen_bytes:
            return now < self._looked_s + _LOOK_S or self._is_gained(now, counted, beyond)
        if now >= mark[0] + _LOOK_S:
            self._learn(now, mark)
            self._mark = now, self._ours
        return True

    def _is_gained(self, now: float, counted: Counters, beyond: int) -> bool:
        """Whether the files being filled have gained what came from the disk, though we did not read it."""
        self._looked_s = now
        tolerated = _SOME_BYTES + _SOME_BYTES_S * min(now - self._settled_s, _TOLERATED_S)
        held = self._resident()
        if held is not None and counted.nbytes - held - self._most > tolerated:
            return False
        self._known = beyond
        return True

    def _learn(self, now: float, mark: tuple[float, int]) -> None:
        """How long the disk has to do with a read of ours, when nobody else reads."""
        at_s, ours = mark
        if (read := self._ours - ours) > 4 * _READ_BYTES:
            self._read_s = (now - at_s) * _READ_BYTES / read

    @property
    def _gap_s(self) -> float:
        return min(max(_GAP_S[0], self._gaps * self._read_s), _GAP_S[1])

    def _look(self, now: float, counted: Counters | None) -> None:
        """See whether others have read since the mark."""
        held, mark = self._resident(), self._mark
        if counted is None or held is None:
            self.yields = False
            return
        self._mark, self._looked_s, self._settled_s = (now, self._ours), now, now
        self._known, self._known_s = counted.nbytes - self._ours, now
        if mark is None:
            self._most = counted.nbytes - held
            return
        at_s, _ = mark
        others = counted.nbytes - held - self._most
        self._most += max(0, others)
        others_read = others > _SOME_BYTES + _SOME_BYTES_S * (now - at_s)
        if others_read and not (self.yields or self._suspects):
            self._suspects = True
            return
        self._suspects = False
        if others_read:
            gap = self._gap if self.yields else None
            if gap is None:
                self._gaps = _GAP_BESIDE_SMALL
            elif (reads := counted.reads - gap.reads) > 0:
                is_large = (counted.nbytes - gap.nbytes) / reads >= _LARGE_BYTES
                self._gaps = _GAP_BESIDE_LARGE if is_large else _GAP_BESIDE_SMALL
            if not self.yields:
                is_again = now - self._resumed_s < _SOON_S
                self._quiet_s = min(2 * self._quiet_s, _QUIET_S[1]) if is_again else _QUIET_S[0]
            self._seen_s, self.yields, self._gap = now, True, None
        elif now - self._seen_s > self._quiet_s:
            if self.yields:
                self._resumed_s = now
            else:
                self._learn(now, mark)
            self.yields = False
