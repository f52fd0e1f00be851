"""For the process that is to be snapshotted: it says when it is warm, and what to do before and after.

    from checkpoint import snapshot_point, on_restore

    on_restore(reseed)
    model = load()
    snapshot_point("warm")      # returns in the original, and in every restore

Uses the standard library alone. Outside of a snapshot command all of this does nothing.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Final, Literal

Outcome = Literal["unwatched", "continued", "restored"]

_VARIABLE: Final = "WEIGHTFS_SNAPSHOT_POINT"
_LOOK_S: Final = 0.002
_before: list[Callable[[], object]] = []
_after: list[Callable[[], object]] = []


def on_snapshot(callback: Callable[[], object]) -> Callable[[], object]:
    """Have `callback` called before the snapshot, the last registered first; usable as a decorator.

    For what must not be in it: connections, temporary files, weights that can be loaded again.
    """
    _before.append(callback)
    return callback


def on_restore(callback: Callable[[], object]) -> Callable[[], object]:
    """Have `callback` called in every restored process, in the order of registration; usable as a decorator.

    For what must not be the same twice: random generators, TLS sessions, tokens, names; and for what was given up.
    """
    _after.append(callback)
    return callback


def snapshot_point(name: str = "warm") -> Outcome:
    """This process is warm: wait here while it is snapshotted.

    Call it from the main thread, when no request is being served.

    Args:
        name: of the point, for logs.

    Returns:
        `unwatched` at once where nobody makes a snapshot; `continued` in the process that was snapshotted and goes
        on; `restored` in a process that a restore made, after the callbacks of `on_restore`.

    Raises:
        Exception: what a callback raises.
    """
    folder = os.environ.get(_VARIABLE)
    if not folder or not os.path.isdir(folder):
        return "unwatched"
    for callback in reversed(_before):
        callback()
    known = _go(folder)
    ready = os.path.join(folder, "ready")
    with open(f"{ready}.new", "w", encoding="utf-8") as file:
        json.dump({"name": name, "pid": os.getpid()}, file)
    os.rename(f"{ready}.new", ready)
    while (go := _go(folder)) == known:
        if not os.path.isdir(folder):  # whoever watched gave up just now
            return "unwatched"
        time.sleep(_LOOK_S)
    if go[1] != "restored":
        return "continued"
    for callback in _after:
        callback()
    return "restored"


def _go(folder: str) -> tuple[str, str]:
    try:
        with open(os.path.join(folder, "go"), encoding="utf-8") as file:
            document = json.load(file)
    except FileNotFoundError:
        return "", ""
    return str(document["token"]), str(document["state"])
