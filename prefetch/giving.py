"""How fast memory is given back under pressure: step by step, for as long as signs of it come. Pure but for a clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Final

NOTHING_S: Final = 5.0
"""When nothing could leave, it is tried again after so long: to look costs the processor some."""


class Giving:
    """One step at a time; the next one when a sign came after the last. A `with` block is a step.

    Attributes:
        freed_bytes: of the last step; set within the block.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun = False
        self._ended_s = float("-inf")
        self.freed_bytes = 0

    def is_due(self, told_s: float) -> bool:
        """Whether to begin a step, given when pressure was last seen. Says so once."""
        pause_s = 0.0 if self.freed_bytes or self._ended_s == float("-inf") else NOTHING_S
        if self._begun or told_s <= self._ended_s or self._clock() - self._ended_s < pause_s:
            return False
        self._begun = True
        return True

    def __enter__(self) -> Giving:
        self.freed_bytes = 0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._begun = False
        self._ended_s = self._clock()
