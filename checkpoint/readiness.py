"""Waiting until a process answers: an HTTP address, a file, or the point it says itself."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from checkpoint import points
from checkpoint.errors import CheckpointError, RetryError, TargetError
from checkpoint.processes import is_there, start_ticks

_LOOK_S: Final = 0.005
_ANSWER_S: Final = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Readiness:
    """How a process shows that it is ready; any of these does.

    Attributes:
        url: answers a GET with a status below 400.
        file: exists.
        point: the folder in which it says so itself (`checkpoint.points`).
    """

    url: str | None = None
    file: str | None = None
    point: str | None = None

    @property
    def is_asked_for(self) -> bool:
        """Whether there is anything to wait for."""
        return (self.url, self.file, self.point) != (None, None, None)

    def is_shown(self) -> bool:
        """Whether it is ready now."""
        if self.point is not None and points.reached(self.point) is not None:
            return True
        if self.file is not None and os.path.exists(self.file):
            return True
        return self.url is not None and _answers(self.url)


def wait(readiness: Readiness, timeout_s: float, is_there: Callable[[], bool], *, log: str = "") -> None:
    """Wait until a process is ready.

    Args:
        readiness: how it shows.
        timeout_s: after which it is given up.
        is_there: whether the process still is.
        log: where it writes, when that is known, for what is raised.

    Raises:
        RetryError: it was not in time.
        CheckpointError: it ended.
    """
    until = time.monotonic() + timeout_s
    while not readiness.is_shown():
        if not is_there():
            raise CheckpointError("the process ended before it was ready", mend=f"{log or 'its log'} tells why")
        if time.monotonic() > until:
            what = readiness.url or readiness.file or "its snapshot_point"
            mend = "give it more time" + (f", or see in {log} what it does" if log else "")
            raise RetryError(f"the process was not ready within {timeout_s:g} s ({what})", mend=mend)
        time.sleep(_LOOK_S)


def while_there(pid: int) -> Callable[[], bool]:
    """For `wait`: whether the process that has this pid now still has it.

    Raises:
        TargetError: there is none.
    """
    since = start_ticks(pid)
    if since is None:
        raise TargetError(f"there is no process {pid}", mend="ps -e shows those there are")
    return lambda: is_there(pid, since)


def _answers(url: str) -> bool:
    import http.client  # with TLS and all, 30 ms: only who asks waits for it
    import urllib.request

    try:
        with urllib.request.urlopen(url, timeout=_ANSWER_S) as reply:
            return int(reply.status) < 400
    except (OSError, http.client.HTTPException):
        return False
