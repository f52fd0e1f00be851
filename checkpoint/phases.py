"""How long each phase took."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

from checkpoint.processes import start_ticks


class Phases:
    """Seconds by name, in the order in which phases began. Phases follow one another: none is inside another.

    Args:
        since: when what is timed began, by time.monotonic(); None for now.

    Attributes:
        seconds: see above.
    """

    def __init__(self, since: float | None = None) -> None:
        self.seconds: dict[str, float] = {}
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
        return phases

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what is inside; a phase that comes again adds up."""
        self.seconds.setdefault(name, 0.0)
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds[name] + time.monotonic() - started, 6)

    def whole(self) -> dict[str, float]:
        """The phases, and as `other` what no phase was: together they are the time from the beginning until now."""
        other = time.monotonic() - self._since - sum(self.seconds.values())
        return {**self.seconds, "other": round(max(0.0, other), 6)}
