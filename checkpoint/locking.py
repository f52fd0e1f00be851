"""Locks on folders, which the kernel drops with the process that holds them (flock(2))."""

from __future__ import annotations

import fcntl
import os
import time
from typing import Final

_LOOK_S: Final = 0.02


def flock(fd: int, how: int, until: float) -> bool:
    """Lock what a descriptor is open on; gives whether that succeeded in time.

    Args:
        fd: of a folder or file.
        how: LOCK_SH or LOCK_EX.
        until: by the monotonic clock, in seconds. flock(2) has no timeout of its own, so it is tried anew every 20 ms.
    """
    while True:
        try:
            fcntl.flock(fd, how | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(_LOOK_S)
        else:
            return True


def leads_to(path: str, fd: int) -> bool:
    """Whether a path still leads to what a descriptor is open on: it may be replaced while a lock is waited for."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(fd))
    except FileNotFoundError:
        return False
