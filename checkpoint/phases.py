"""How long each phase took."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

import msgspec

from checkpoint.processes import start_ticks


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """When something began and ended, in seconds from the beginning; `beside`: other things went on meanwhile."""

    name: str
    start_s: float
    end_s: float
    beside: bool = False


class Phases:
    """Seconds by name, in the order in which phases began. Phases follow one another: none is inside another.

    What goes on beside them, in other threads, is only in `spans`.

    Args:
        since: when what is timed began, by time.monotonic(); None for now.

    Attributes:
        seconds: see above.
        spans: all that took time, in the order in which it ended.
    """

    def __init__(self, since: float | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self.spans: list[Span] = []
        self._since = time.monotonic() if since is None else since

    @classmethod
    def of_this_process(cls) -> Phases:
        """From the start of this process on (to 10 ms, the clock tick of /proc): what it took so far is `start`.

        A program that became this one by exec counts as well.
        """
        booted = time.clock_gettime(time.CLOCK_BOOTTIME)
        started = (start_ticks(os.getpid()) or 0) / os.sysconf("SC_CLK_TCK")
        took = max(0.0, booted - started)
        phases = cls(time.monotonic() - took)
        phases.seconds["start"] = round(took, 6)
        phases.note("start", phases._since, phases._since + took)
        return phases

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what is inside; a phase that comes again adds up."""
        self.seconds.setdefault(name, 0.0)
        started = time.monotonic()
        try:
            yield
        finally:
            ended = time.monotonic()
            self.seconds[name] = round(self.seconds[name] + ended - started, 6)
            self.note(name, started, ended)

    @contextlib.contextmanager
    def beside(self, name: str) -> Iterator[None]:
        """Time what another thread does inside; any thread may call it."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.note(name, started, time.monotonic(), beside=True)

    def note(self, name: str, started: float, ended: float, *, beside: bool = False) -> None:
        """Add to `spans` what began and ended at these moments, by time.monotonic()."""
        start_s, end_s = (round(max(0.0, moment - self._since), 6) for moment in (started, ended))
        self.spans.append(Span(name=name, start_s=start_s, end_s=end_s, beside=beside))

    def whole(self) -> dict[str, float]:
        """The phases, and as `other` what no phase was: together they are the time from the beginning until now."""
        other = time.monotonic() - self._since - sum(self.seconds.values())
        return {**self.seconds, "other": round(max(0.0, other), 6)}
