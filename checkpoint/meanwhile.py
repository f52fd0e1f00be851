"""What is found out while something else goes on, which is given up as soon as the answer is no."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, Self

_GIVEN_UP_S: Final = 1.0


class Meanwhile:
    """Runs functions in threads of their own; a context manager, which tells them to stop when it is left.

    Attributes:
        stopping: set when it is left: what takes long looks at it.
        seconds: how long each function took, by name, once it has ended.
    """

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self.seconds: dict[str, float] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._failures: dict[str, Exception] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        until = time.monotonic() + _GIVEN_UP_S
        for thread in self._threads.values():  # one that waits for a driver that hangs is left behind
            thread.join(max(0.0, until - time.monotonic()))

    def start(self, name: str, what: Callable[[], object]) -> None:
        """Run a function; what it raises is raised by `check` and `finish`."""

        def run() -> None:
            started = time.monotonic()
            try:
                what()
            except Exception as e:  # noqa: BLE001 - raised where it is asked for
                self._failures[name] = e
            self.seconds[name] = time.monotonic() - started

        self._threads[name] = threading.Thread(target=run, name=name, daemon=True)
        self._threads[name].start()

    def check(self) -> None:
        """Raise what one has failed with so far; the first that began comes first."""
        for name in self._threads:
            if name in self._failures:
                raise self._failures[name]

    def finish(self, name: str) -> None:
        """Wait until one has ended, and raise what it failed with. One that was not started has."""
        if name in self._threads:
            self._threads[name].join()
        if name in self._failures:
            raise self._failures[name]
