"""Stopped processes: let go, ended, waited for. Every pid is checked to be the process that was meant."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from checkpoint.errors import CheckpointError
from checkpoint.processes import Process, family, is_there, start_ticks

_LOOK_S: Final = 0.005
_END_S: Final = 30.0

Tree = Sequence[tuple[int, int]]
"""(pid, start in clock ticks) of every process."""


def tree(processes: Iterable[Process]) -> list[tuple[int, int]]:
    """What names these processes also when their pids are taken by others."""
    return [(one.pid, one.start_ticks) for one in processes]


def with_descendants(who: Tree) -> list[tuple[int, int]]:
    """These processes, and the descendants they have by now."""
    found = dict(who)
    for pid, since in who:
        if is_there(pid, since):
            found |= dict(family(pid))
    return list(found.items())


def resume(who: Tree) -> None:
    """Let processes go on that are stopped."""
    _signal(who, signal.SIGCONT)


def kill(who: Tree) -> None:
    """Kill processes, and wait for nothing."""
    _signal(who, signal.SIGKILL)


def end(who: Tree) -> None:
    """Kill processes, and wait until they are gone.

    Raises:
        CheckpointError: one does not die (it waits in the kernel).
    """
    kill(who)
    until = time.monotonic() + _END_S
    for pid, since in who:
        while is_there(pid, since):
            if time.monotonic() > until:
                raise CheckpointError(f"process {pid} does not die", mend=f"see what it waits for: /proc/{pid}/stack")
            time.sleep(_LOOK_S)


def end_all(who: Tree) -> None:
    """Kill processes with the descendants they have by now, and wait until they are gone.

    Raises:
        CheckpointError: one does not die.
    """
    end(with_descendants(who))


def to_its_end(do: Callable[[], None]) -> None:
    """Do what puts processes right, all of it: a signal that ends the command has it done anew before it does.

    One signal: whoever has made signals exceptions (`SystemExit`, `foreground.Interrupted`) lets no second one through.

    Raises:
        CheckpointError: it could not be done, and `is_half_done`.
    """
    try:
        try:
            do()
        except Exception:
            raise
        except BaseException:
            do()
            raise
    except CheckpointError as e:
        e.is_half_done = True
        raise
    except Exception as e:
        error = CheckpointError(f"what was begun can't be put right: {e}", mend="weightfs snapshot recover")
        error.is_half_done = True
        raise error from e


def _signal(who: Tree, number: signal.Signals) -> None:
    for pid, since in who:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            if start_ticks(pid) == since:
                signal.pidfd_send_signal(pidfd, number)
        except ProcessLookupError:
            pass
        finally:
            os.close(pidfd)
