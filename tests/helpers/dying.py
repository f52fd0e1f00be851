"""Commits or removes a snapshot, or changes the key, again and again, killed one system call later each time.

Run as `python -m tests.helpers.dying FOLDER ACTION`. The stores `FOLDER/0`, `FOLDER/1` and so on exist; the process
that works on the store of a number is killed instead of making the call of that number. Says the number of the first
that lived to its end. Calls are those that change what is on the disk: each step is tried, before it and after it.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from checkpoint.chunks.keys import MasterKey
from checkpoint.rotation import rotate
from checkpoint.store import Store
from tests.helpers.snapshots import add, add_chunked
from weightfs import linux

CALLS = ("mkdir", "open", "chmod", "fsync", "link", "rename", "unlink", "rmdir", "write", "pwrite", "pwritev")
MASTER, NEW_MASTER = MasterKey(secret=bytes(range(32))), MasterKey(secret=bytes(range(1, 33)))
NEW = {"core-1.img": b"new", "pages-1.img": b"pages" * 10_000, "dump.log": b""}


def die_at(number: int) -> list[int]:
    """Count the calls; end this process by SIGKILL instead of making the one of that number."""
    count = [0]

    def counted(call: Any) -> Any:
        def made(*arguments: Any, **named: Any) -> Any:
            if count[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            count[0] += 1
            return call(*arguments, **named)

        return made

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    linux.exchange = counted(linux.exchange)
    shutil._use_fd_functions = True  # type: ignore[attr-defined]  # it compares os.open and others with what it knew
    return count


def act(path: str, action: str, number: int) -> None:
    """What dies, or does not; raises nothing."""
    count = die_at(number)
    if action == "remove":
        Store(path).remove("warm")
    elif action == "collect":
        Store(path).collect(None)
    elif action == "rotate":
        rotate(Store(path), MASTER, NEW_MASTER)
    else:
        how = add_chunked if action.startswith("chunked") else add
        how(Store(path), "warm", images=NEW, replace=action.endswith("replace"), generation=1)
    assert count[0] == number


def each_dies(act: Callable[[str, str, int], None]) -> None:
    """Have a process of its own act on each folder, until one lives to its end; then say its number.

    Args:
        act: gets the folder, the action and the number of the call it dies instead of.
    """
    folder, action = sys.argv[1:]
    for number in range(len(os.listdir(folder))):
        pid = os.fork()  # no thread runs here
        if pid == 0:
            try:
                act(os.path.join(folder, str(number)), action, number)
            except BaseException:  # noqa: BLE001  # a fork that goes on would be another test
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if code != -signal.SIGKILL:
            print(number)
            sys.exit(code)


if __name__ == "__main__":
    each_dies(act)
