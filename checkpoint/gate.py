"""Many copies at once, or one change: what keeps a late copy from landing in memory that was given up meanwhile."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class Gate:
    """Copies pass together; a change waits until none is under way, and then keeps new ones waiting.

    Changes come from one thread only, and may come one right after the other: each copy that waited for one passes
    before the next, so that a process that faults all the time does not keep its memory from being filled in.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition(threading.Lock())
        self._inside = 0
        self._waiting = 0
        self._first = 0  # copies that pass before the next change
        self._closed = False

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        """Pass, once no change is under way or waited for."""
        with self._condition:
            if self._closed:
                self._waiting += 1
                self._condition.wait_for(lambda: not self._closed)
                self._waiting -= 1
                self._first -= 1
            self._inside += 1
        try:
            yield
        finally:
            with self._condition:
                self._inside -= 1
                if not self._inside:
                    self._condition.notify_all()

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Wait until every copy has passed, and keep the next ones out."""
        with self._condition:
            while self._first:
                self._condition.wait()
            self._closed = True
            while self._inside:
                self._condition.wait()
        try:
            yield
        finally:
            with self._condition:
                self._closed = False
                self._first = self._waiting
                self._condition.notify_all()
