"""Being the parent of one process, as close as can be to not being there: signals, orphans, its exit status.

The process has a session of its own, so that a terminal's signals reach it once: through us. Whoever ends us with
SIGKILL ends it too, as when it had been started without us: a small guard waits for that. PR_SET_PDEATHSIG would not
do: CRIU keeps it, and the parent of a process that `snapshot restore` brings back is CRIU, which ends at once.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Final

from weightfs import linux

ENDING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
FORWARDED: Final = (*ENDING, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH)

_INIT: Final = 1
_ALL: Final = 1 << 30


class Interrupted(BaseException):
    """A signal came that ends the process, while `Foreground.hold` kept it back. As `KeyboardInterrupt`, no error.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Foreground:
    """A context manager: within it signals are forwarded, and descendants that lose their parent become our children.

    Of the main thread.
    """

    def __init__(self) -> None:
        self._pid = 0
        self._pidfd = -1
        self._guard = 0
        self._status: int | None = None
        self._held: list[int] | None = None
        self._early: list[int] = []  # came while there was no process, and nothing to be interrupted
        self._may_interrupt = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Foreground:
        for number in FORWARDED:
            self._before[number] = signal.signal(number, self._on_signal)
        if os.getpid() != _INIT:
            linux.adopt_orphans(adopt=True)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if os.getpid() != _INIT:
            linux.adopt_orphans(adopt=False)
        if self._guard:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._guard, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._guard, 0)
        if self._pidfd >= 0:
            os.close(self._pidfd)

    @property
    def pid(self) -> int:
        """Of the process; 0 before `adopt`."""
        return self._pid

    def adopt(self, pid: int) -> None:
        """From now on the child `pid` is the process: it gets the signals, held ones too, and its end is ours."""
        self._may_interrupt = False
        self._pidfd = os.pidfd_open(pid)
        self._pid = pid
        if os.getpid() != _INIT:  # the end of pid 1 is the end of all in its pid namespace
            self._guard = _guard(self._pidfd)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Signals wait until the context is left, so that a process is not frozen, or made, with one pending.

        Raises:
            Interrupted: the first one that ends a process came, and what is under way is to be undone.
        """
        self._held = []
        self._may_interrupt = True
        try:
            if ending := [number for number in self._early if number in ENDING]:
                raise Interrupted(ending[0])
            yield
        finally:
            self._may_interrupt = False
            held, self._held = self._held, None
            for number in held:
                self._send(number)

    def has_ended(self) -> bool:
        """Whether the process has; waits for every child that has ended so far, so for none of `subprocess`'s own."""
        while self._status is None and self._collect(os.WNOHANG):
            pass
        return self._status is not None

    def wait(self) -> int:
        """Wait for its end, and meanwhile for every other child.

        Returns:
            Its exit status, 128 and the signal's number where one has ended it.
        """
        while self._status is None:
            self._collect(0)
        return self._status

    def end_children(self) -> None:
        """Kill every child, and every child of these, which become ours when they lose their parent.

        One may have come to be of which an interrupted step did not tell any more.
        """
        while children := _children():
            for pid in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)

    def _collect(self, flags: int) -> bool:
        try:
            pid, status = os.waitpid(-1, flags)
        except ChildProcessError:  # somebody else waited for it
            self._status = 1
            return False
        if pid == self._pid:
            code = os.waitstatus_to_exitcode(status)
            self._status = 128 - code if code < 0 else code
        return pid != 0

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self._held is None:
            self._send(number)
            return
        self._held.append(number)
        if self._may_interrupt and number in ENDING:
            self._may_interrupt = False
            raise Interrupted(number)

    def _send(self, number: int) -> None:
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)
        else:
            self._early.append(number)


def _children() -> Sequence[int]:
    with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
        return [int(pid) for pid in file.read().split()]


def _guard(process: int) -> int:
    """Start a process that ends `process` (a pidfd) when we end before it; gives its pid."""
    us = os.pidfd_open(os.getpid())
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        os.close(us)
        return pid
    try:
        os.setsid()
        os.dup2(us, 0)
        os.dup2(process, 1)
        os.closerange(2, _ALL)  # one call; else a reader of our output would wait for the guard's end, too
        for number in FORWARDED:
            signal.signal(number, signal.SIG_IGN)
        poll = select.poll()
        poll.register(0, select.POLLIN)
        poll.register(1, select.POLLIN)
        if all(fd != 1 for fd, _ in poll.poll()):
            signal.pidfd_send_signal(1, signal.SIGKILL)
    finally:
        os._exit(0)
