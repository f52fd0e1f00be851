"""Descriptors 0, 1 and 2 of a process, which lead to whoever started it: what CRIU calls them, and what replaces them.

A log file has grown by the time of the restore, a pipe has lost its reader, a terminal is another one. So none of them
is restored: the process is given descriptors of ours in their place (`criu restore --inherit-fd`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Final

from checkpoint.errors import CheckpointError
from checkpoint.processes import Descriptor, Process

LOGS: Final = "/var/log/weightfs"

Resource = tuple[int, str, str]
"""Which of 0, 1 and 2; what CRIU calls it; the path where it is a log file, else empty."""


def resources(processes: Sequence[Process]) -> list[Resource]:
    """What of the root's stdio must be replaced; what the tree shares among itself and /dev/null are not.

    Args:
        processes: the whole tree, root first.
    """
    found = []
    for fd in (0, 1, 2):
        one = next((each for each in processes[0].descriptors if each.fd == fd), None)
        if one is None or _is_internal(one, processes):
            continue
        if resource := _resource(one, processes[0].pid):
            found.append((fd, resource, one.target if one.kind == "file" else ""))
    return found


def _is_internal(one: Descriptor, processes: Sequence[Process]) -> bool:
    """Whether it is a pipe of which the tree has the other end as well."""
    if one.kind != "pipe":
        return False
    ends = {each.can_write for process in processes for each in process.descriptors if each.inode == one.inode}
    return len(ends) == 2


def _resource(one: Descriptor, pid: int) -> str | None:
    """criu(8), `--inherit-fd`."""
    if one.kind in ("pipe", "socket"):
        return one.target
    if one.kind == "tty":
        found = os.stat(f"/proc/{pid}/fd/{one.fd}")
        return f"tty[{found.st_rdev:x}:{found.st_dev:x}]"
    if one.kind == "file" and one.can_write:
        return one.target.lstrip("/")
    return None


@contextlib.contextmanager
def opened(wanted: Sequence[Resource], log: str | None, default: str) -> Iterator[tuple[tuple[int, str], ...]]:
    """Open what a restored process is given.

    Args:
        wanted: see `resources`.
        log: a file that takes all output; None for the log file it had, or `default` where it had none.
        default: see there.

    Yields:
        Pairs of a descriptor, open inside the context, and what it stands for.

    Raises:
        CheckpointError: a log can't be opened.
    """
    held: dict[str, int] = {}
    pairs: dict[str, int] = {}
    try:
        for fd, resource, path in wanted:
            where = os.devnull if fd == 0 else log or path or default
            if where not in held:
                held[where] = _open(where)
            pairs.setdefault(resource, held[where])
        yield tuple((fd, resource) for resource, fd in pairs.items())
    finally:
        for fd in held.values():
            os.close(fd)


def callers(wanted: Sequence[Resource]) -> tuple[tuple[int, str], ...]:
    """The caller's own stdio in their place."""
    pairs: dict[str, int] = {}
    for fd, resource, _ in wanted:
        pairs.setdefault(resource, fd)
    return tuple((fd, resource) for resource, fd in pairs.items())


def _open(path: str) -> int:
    try:
        if path == os.devnull:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        if path.startswith(LOGS + "/"):
            os.makedirs(LOGS, mode=0o755, exist_ok=True)
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as e:
        raise CheckpointError(
            f"the restored process can't write its log: {os.strerror(e.errno or 0)}", path=path, mend="name another"
        ) from e
