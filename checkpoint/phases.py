"""How long each phase took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Phases:
    """Seconds by name, in the order in which phases began.

    Attributes:
        seconds: see above.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what is inside; a phase that comes again adds up."""
        self.seconds.setdefault(name, 0.0)
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds[name] + time.monotonic() - started, 6)
