"""The folder through which a process and the commands speak: see `checkpoint.client`, which runs inside the process.

    FOLDER/ready    written by the process: it is warm, and waits. JSON: {name, pid}
    FOLDER/go       written by a command: JSON: {token, state}, state being `continued` or `restored`

Files, because nothing else survives in a process that CRIU dumps and that is restored hours later, more than once.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from typing import Final

VARIABLE: Final = "WEIGHTFS_SNAPSHOT_POINT"
_FOLDER: Final = "points"
_READ_S: Final = 60.0
"""It looks every 2 ms, once it runs."""


def make() -> str:
    """A new, empty folder for a process that is about to be started.

    Raises:
        CheckpointError: it can't be made, or others could have written there.
    """
    from checkpoint import runtime  # here, since `client` is imported by programs that need nothing else of ours

    path = os.path.join(runtime.made(_FOLDER), os.urandom(8).hex())
    os.mkdir(path, 0o700)
    return path


def reached(folder: str) -> str | None:
    """The name of the point at which the process waits, None before."""
    try:
        with open(os.path.join(folder, "ready"), encoding="utf-8") as file:
            return str(json.load(file)["name"])
    except FileNotFoundError:
        return None


def dismiss(folder: str) -> None:
    """Nobody waits at the point any more: a process that has reached it goes on, one that will does not wait there."""
    if reached(folder) is not None:
        let_go(folder, "continued")
    else:
        shutil.rmtree(folder, ignore_errors=True)


def users(folder: str) -> list[int]:
    """The processes that were started to speak through a folder, and those they have started."""
    return [pid for pid, spoken in _speakers() if spoken == folder]


def is_user(pid: int, folder: str) -> bool:
    """Whether a process is one of these."""
    return _spoken(pid) == folder


def sweep() -> None:
    """Remove the folders of processes that were let go and have ended since.

    Raises:
        CheckpointError: the variable for where they lie names no absolute path.
    """
    from checkpoint import runtime

    parent = runtime.path_of(_FOLDER)
    try:
        folders = [os.path.join(parent, name) for name in os.listdir(parent)]
    except FileNotFoundError:
        return
    old = {folder for folder in folders if _is_read(folder)}
    if old:
        for folder in old - {spoken for _, spoken in _speakers()}:
            shutil.rmtree(folder, ignore_errors=True)


def _is_read(folder: str) -> bool:
    """Whether a process was let go so long ago that it knows, even one whose environment does not show any more."""
    try:
        return time.time() - os.stat(os.path.join(folder, "go")).st_mtime > _READ_S
    except OSError:
        return False


def _speakers() -> Iterator[tuple[int, str]]:
    for name in os.listdir("/proc"):
        if name.isdigit() and (spoken := _spoken(int(name))) is not None:
            yield int(name), spoken


def _spoken(pid: int) -> str | None:
    """What the variable says in a process's environment, None where it is not there."""
    before = os.fsencode(f"{VARIABLE}=")
    with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
        for entry in file.read().split(b"\0"):
            if entry.startswith(before):
                return os.fsdecode(entry.removeprefix(before))
    return None


def let_go(folder: str, state: str) -> None:
    """Tell the process that it may go on, and whether it is the one it was (`continued`) or a restored one."""
    os.makedirs(folder, mode=0o700, exist_ok=True)
    path = os.path.join(folder, "go")
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        json.dump({"token": os.urandom(8).hex(), "state": state}, file)
    os.rename(f"{path}.new", path)
