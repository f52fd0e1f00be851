"""Descriptors 0, 1 and 2 of a process, which lead to whoever started it: what CRIU calls them, and what replaces them.

A log file has grown by the time of the restore, a pipe has lost its reader, a terminal is another one. So none of them
is restored: the process is given descriptors of ours in their place (`criu restore --inherit-fd`).
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from checkpoint.attachments import attachments_of
from checkpoint.errors import CheckpointError
from checkpoint.processes import Process
from checkpoint.sockets import sockets_of

LOGS: Final = "/var/log/weightfs"

Resource = tuple[int, str, str]
"""Which of 0, 1 and 2; what CRIU calls it; the path where it is a log file, else empty."""


class Given(msgspec.Struct, frozen=True, kw_only=True):
    """A caller's stdio, for a process that is to have it.

    Attributes:
        own: the caller's descriptors 0, 1 and 2, duplicated above 2.
        plain: the same, with a pipe to the caller (for input: nothing) where that is a terminal or a socket: only files
            and pipes can stand for files and pipes.
    """

    own: tuple[int, int, int]
    plain: tuple[int, int, int]


def resources(processes: Sequence[Process]) -> list[Resource]:
    """What of the tree's stdio is given anew; what it shares among itself and /dev/null are not.

    Args:
        processes: the whole tree, root first.
    """
    running = [one for one in processes if not one.has_ended]
    return [
        (min(fd for _, fd in one.descriptors), one.resource, one.path if one.kind == "file" else "")
        for one in attachments_of(running, sockets_of(running))
        if one.is_stdio
    ]


@contextlib.contextmanager
def opened(wanted: Sequence[Resource], output: str | None, default: str) -> Iterator[tuple[tuple[int, str], ...]]:
    """Open what a restored process is given.

    Args:
        wanted: see `resources`.
        output: a file that takes all output; None for the log file it had, or `default` where it had none.
        default: see there.

    Yields:
        Pairs of a descriptor, open inside the context, and what it stands for.

    Raises:
        CheckpointError: a log can't be opened, or it was none.
    """
    held: dict[str, int] = {}
    pairs: dict[str, int] = {}
    try:
        for fd, resource, path in wanted:
            if resource.startswith(("tty[", "socket:[")):
                raise CheckpointError(
                    "its standard input, output or error was a terminal or a socket, which only one of that kind can "
                    "replace",
                    mend="make the snapshot of a process whose output goes to a file or a pipe",
                )
            where = os.devnull if fd == 0 else output or path or default
            if where not in held:
                held[where] = _open(where, follow=output is not None or not path)
            pairs.setdefault(resource, held[where])
        yield tuple((fd, resource) for resource, fd in pairs.items())
    finally:
        for fd in held.values():
            os.close(fd)


@contextlib.contextmanager
def log(path: str) -> Iterator[int]:
    """A log file, open for appending.

    Raises:
        CheckpointError: it can't be opened.
    """
    fd = _open(path, follow=True)
    try:
        yield fd
    finally:
        os.close(fd)


def callers(wanted: Sequence[Resource], given: Given) -> tuple[tuple[int, str], ...]:
    """What a caller gives in their place.

    Raises:
        CheckpointError: it was a terminal or a socket, and the caller has none there.
    """
    pairs: dict[str, int] = {}
    for fd, resource, _ in wanted:
        if resource.startswith(("tty[", "socket:[")):
            is_alike = os.isatty if resource.startswith("tty[") else _is_socket
            if not is_alike(given.own[fd]):
                raise CheckpointError(
                    f"its descriptor {fd} was a {'terminal' if is_alike is os.isatty else 'socket'}, which only one of "
                    "that kind can replace",
                    mend="make the snapshot of a process whose output goes to a file or a pipe",
                )
            pairs.setdefault(resource, given.own[fd])
        else:
            pairs.setdefault(resource, given.plain[fd])
    return tuple((fd, resource) for resource, fd in pairs.items())


def _is_socket(fd: int) -> bool:
    return stat.S_ISSOCK(os.fstat(fd).st_mode)


def _open(path: str, *, follow: bool) -> int:
    """Open a log. One that a snapshot names was no symlink then: it must not become root's way to another file."""
    try:
        if path == os.devnull:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        if path.startswith(LOGS + "/"):
            os.makedirs(LOGS, mode=0o755, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
        return os.open(path, flags, 0o640)
    except OSError as e:
        raise CheckpointError(
            f"the restored process can't write its log: {os.strerror(e.errno or 0)}", path=path, mend="name another"
        ) from e
