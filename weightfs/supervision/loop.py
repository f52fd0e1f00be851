"""poll(2) and timers, on one thread, without a library: this must never fail, and start in no time."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from typing import Final

_LONGEST_S: Final = 60.0


class Loop:
    """What to call when a descriptor is readable or a time has come. Nothing is called after `stop`."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._on: dict[int, Callable[[], None]] = {}
        self._timers: dict[str, tuple[float, Callable[[], None]]] = {}
        self._stopped = False

    def watch(self, fd: int, call: Callable[[], None]) -> None:
        """Call whenever `fd` is readable or its other end has gone."""
        self._on[fd] = call
        self._poll.register(fd, select.POLLIN)

    def unwatch(self, fd: int) -> None:
        """Stop that, before the descriptor is closed; of one that is not watched nothing happens."""
        if self._on.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def after(self, name: str, seconds: float, call: Callable[[], None]) -> None:
        """Call once, later; in place of a timer of that name, if there is one."""
        self._timers[name] = time.monotonic() + seconds, call

    def cancel(self, name: str) -> None:
        """Take a timer back, if it is there."""
        self._timers.pop(name, None)

    def is_due(self, name: str) -> bool:
        """Whether a timer of that name is set."""
        return name in self._timers

    def turn(self) -> None:
        """Wait for the next thing to happen, and call what belongs to it."""
        due = min((at for at, _ in self._timers.values()), default=time.monotonic() + _LONGEST_S)
        for fd, _ in self._poll.poll(max(0.0, due - time.monotonic()) * 1000):
            if (call := self._on.get(fd)) is not None and not self._stopped:
                call()
        now = time.monotonic()
        for name in [name for name, (at, _) in self._timers.items() if at <= now]:
            _, call = self._timers.pop(name)
            if not self._stopped:
                call()

    def stop(self) -> None:
        """Call nothing any more."""
        self._stopped = True

    def on_signals(self, numbers: set[signal.Signals], call: Callable[[], None]) -> None:
        """Call when one of these signals has come."""
        outlet, inlet = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(inlet, warn_on_full_buffer=False)
        for number in numbers:
            signal.signal(number, lambda *_: None)

        def come() -> None:
            if numbers.intersection(os.read(outlet, 64)):
                call()

        self.watch(outlet, come)
