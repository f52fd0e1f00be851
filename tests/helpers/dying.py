"""Commits or removes a snapshot, and is killed at the system call whose number it is told.

Run as `python -m tests.helpers.dying STORE ACTION NUMBER`; says how many calls there were when it lives to the end.
Calls are those that change what is on the disk, so that the whole of each step is tried: before it and after it.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from typing import Any

from checkpoint.store import Store
from tests.helpers.snapshots import add
from weightfs import linux

CALLS = ("mkdir", "open", "chmod", "fsync", "rename", "unlink", "rmdir", "write")
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


def main() -> None:
    path, action, number = sys.argv[1:]
    store = Store(path)
    count = die_at(int(number))
    if action == "remove":
        store.remove("warm")
    else:
        add(store, "warm", images=NEW, replace=action == "replace", generation=1)
    print(count[0])


if __name__ == "__main__":
    main()
