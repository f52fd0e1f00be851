"""Our own stdio, for a process in the foreground: given to it as it is where a restore can give it too, else passed on.

A terminal or a socket, such as systemd's journal, can't stand for a log file or a pipe in a restored process, nor can
these stand for it. So the process has a pipe, and what it writes is passed on; its input is empty.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import threading
from typing import Final

from checkpoint.stdio import Given

_ABOVE: Final = 10
"""Descriptors are duplicated to this number or higher: CRIU has 0, 1 and 2 of its own."""

_CHUNK_BYTES: Final = 1 << 16
_REST_S: Final = 1.0
"""How long what is left is read after the process has ended, when others hold its output open."""


class Relay:
    """A context manager; `given` is open within it, and `finish` is called once the process has ended.

    Attributes:
        given: what the process gets.
    """

    given: Given

    def __init__(self) -> None:
        self._held: list[int] = []
        self._passed_on: list[tuple[int, int]] = []  # the end of a pipe to read, and where it leads
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Relay:
        own = (self._duplicate(0), self._duplicate(1), self._duplicate(2))
        stdin = own[0] if _is_plain(own[0]) else self._keep(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        output = own[1] if _is_plain(own[1]) else self._pipe_to(1)
        if _is_plain(own[2]):
            errors = own[2]
        elif os.path.sameopenfile(own[1], own[2]):
            errors = output  # so that lines stay in their order
        else:
            errors = self._pipe_to(2)
        self.given = Given(own=own, plain=(stdin, output, errors))
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        if not self._threads:
            for reader, _to in self._passed_on:
                os.close(reader)

    def begin(self) -> None:
        """The process has what is given, which is no longer open here; what it writes is passed on."""
        self._close()
        for reader, to in self._passed_on:
            thread = threading.Thread(target=_pass_on, args=(reader, to), daemon=True)
            thread.start()
            self._threads.append(thread)

    def finish(self) -> None:
        """The process has ended: pass on what is left."""
        for thread in self._threads:
            thread.join(_REST_S)

    def _duplicate(self, fd: int) -> int:
        return self._keep(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _ABOVE))

    def _keep(self, fd: int) -> int:
        self._held.append(fd)
        return fd

    def _pipe_to(self, fd: int) -> int:
        reader, writer = os.pipe2(os.O_CLOEXEC)
        self._passed_on.append((reader, fd))
        return self._keep(writer)

    def _close(self) -> None:
        while self._held:
            os.close(self._held.pop())


def _is_plain(fd: int) -> bool:
    """Whether it can be snapshotted, and stand for another one in a restore.

    Of a file on a mount that is not ours, as a container's output is when its runtime writes it to a file, CRIU wants
    the size it had in the dump, whatever it is given for it.
    """
    mode = os.fstat(fd).st_mode
    if stat.S_ISFIFO(mode):
        return True
    return not stat.S_ISSOCK(mode) and not os.isatty(fd) and _mount_id(fd) in _mount_ids()


def _mount_id(fd: int) -> str:
    with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as file:
        return next(line.split()[1] for line in file if line.startswith("mnt_id:"))


def _mount_ids() -> set[str]:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return {line.split(" ", 1)[0] for line in file}


def _pass_on(reader: int, to: int) -> None:
    """Copy until the last writer is gone; what nobody takes any more is dropped: the process must not wait for it."""
    is_wanted = True
    with contextlib.suppress(OSError):
        while chunk := os.read(reader, _CHUNK_BYTES):
            rest = memoryview(chunk)
            while rest and is_wanted:
                try:
                    rest = rest[os.write(to, rest) :]
                except OSError:
                    is_wanted = False
    os.close(reader)
