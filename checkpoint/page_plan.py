"""Which addresses of a process are to have which bytes, while the process changes its memory. Pure; not thread-safe."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from typing import NamedTuple


class Run(NamedTuple):
    """Addresses `[start, end)` that are to have the bytes from `offset` on."""

    start: int
    end: int
    offset: int

    def part(self, start: int, end: int) -> Run:
        """What of it lies in `[start, end)`, which must be something."""
        low = max(start, self.start)
        return Run(low, min(end, self.end), self.offset + low - self.start)


class Plan:
    """Runs of one process.

    Args:
        runs: in ascending order, none overlapping.
    """

    def __init__(self, runs: Iterable[Run] = ()) -> None:
        self._runs = list(runs)
        self._starts = [run.start for run in self._runs]

    @property
    def runs(self) -> tuple[Run, ...]:
        """In ascending order."""
        return tuple(self._runs)

    def copy(self) -> Plan:
        """Another plan with the same runs: that of a child."""
        return Plan(self._runs)

    def first(self, start: int, end: int) -> Run | None:
        """What comes first of `[start, end)`; None if nothing of it is in the plan."""
        at = bisect.bisect_right(self._starts, start) - 1
        for index in (at, at + 1):
            if 0 <= index < len(self._runs) and self._runs[index].end > start and self._runs[index].start < end:
                return self._runs[index].part(start, end)
        return None

    def remove(self, start: int, end: int) -> list[Run]:
        """Take `[start, end)` out; gives what was there, in ascending order."""
        low = bisect.bisect_right(self._starts, start) - 1
        if low < 0 or self._runs[low].end <= start:
            low += 1
        high = bisect.bisect_left(self._starts, end)
        taken = [run.part(start, end) for run in self._runs[low:high]]
        kept = []
        if taken:
            if self._runs[low].start < start:
                kept.append(self._runs[low].part(0, start))
            if self._runs[high - 1].end > end:
                kept.append(self._runs[high - 1].part(end, self._runs[high - 1].end))
        self._replace(low, max(low, high), kept)
        return taken

    def move(self, start: int, end: int, to: int) -> list[Run]:
        """What is at `[start, end)` is at `to` now, instead of what was there; gives it, where it is now."""
        moved = [Run(run.start - start + to, run.end - start + to, run.offset) for run in self.remove(start, end)]
        self.remove(to, to + end - start)
        low = bisect.bisect_left(self._starts, to)
        self._replace(low, low, moved)
        return moved

    def _replace(self, low: int, high: int, runs: list[Run]) -> None:
        self._runs[low:high] = runs
        self._starts[low:high] = [run.start for run in runs]
