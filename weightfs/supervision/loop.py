"""poll(2) and timers, on one thread, without a library: this must never fail, and start in no time."""

from __future__ import annotations

import logging
import os
import select
import signal
import time
from collections.abc import Callable, Set
from typing import Final

from weightfs import linux

log = logging.getLogger(__name__)

_LONGEST_S: Final = 60.0
_PAUSE_S: Final = 0.1  # what failed may be called again at once


class Loop:
    """What to call when a descriptor is readable or a time has come. Nothing is called after `stop`."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._on: dict[int, Callable[[], None]] = {}
        self._timers: dict[str, tuple[float, Callable[[], None]]] = {}
        self._stopped = False
        self._signals = -1

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
        """Wait for the next thing to happen, and call what belongs to it. What fails keeps nothing else up."""
        due = min((at for at, _ in self._timers.values()), default=time.monotonic() + _LONGEST_S)
        for fd, _ in self._poll.poll(max(0.0, due - time.monotonic()) * 1000):
            if (call := self._on.get(fd)) is not None:
                self._call(call)
        now = time.monotonic()
        for name in [name for name, (at, _) in self._timers.items() if at <= now]:
            timer = self._timers.pop(name, None)
            if timer is not None:
                self._call(timer[1])

    def _call(self, call: Callable[[], None]) -> None:
        if self._stopped:
            return
        try:
            call()
        except Exception:
            log.exception("goes on after")
            time.sleep(_PAUSE_S)

    def stop(self) -> None:
        """Call nothing any more."""
        self._stopped = True

    def is_signalled(self) -> bool:
        """Whether a signal has come that was not worked on yet."""
        return linux.is_readable(self._signals, 0)

    def on_signals(self, numbers: Set[signal.Signals], call: Callable[[], None]) -> None:
        """Call when one of these signals has come."""
        outlet, inlet = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._signals = outlet
        signal.set_wakeup_fd(inlet, warn_on_full_buffer=False)
        for number in numbers:
            signal.signal(number, lambda *_: None)

        def come() -> None:
            if any(number in numbers for number in os.read(outlet, 64)):
                call()

        self.watch(outlet, come)
