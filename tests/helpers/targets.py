"""Processes to be dumped and restored: Python programs of a few lines that show, through a file, that they live."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from checkpoint.criu import Criu, find_criu
from checkpoint.errors import MisfitError
from tests.helpers.mounting import wait_until

PRELUDE = """
import mmap, os, signal, socket, sys, threading, time
told = sys.argv[1]
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
def tell(text):
    with open(told + ".new", "w") as file:
        file.write(str(text))
    os.rename(told + ".new", told)
def wait():
    signal.sigwait({signal.SIGUSR1})
"""
"""`tell` shows something in the file, `wait` returns when it is asked again: see `Target.ask`."""


def _criu() -> Criu | None:
    try:
        return find_criu()
    except MisfitError:
        return None


CRIU = _criu()
needs_criu = pytest.mark.skipif(CRIU is None, reason="this machine lacks CRIU 4.1 or later that works")
needs_criu_for_sockets = pytest.mark.skipif(
    CRIU is None or not CRIU.can_dump_inet,
    reason="this machine lacks CRIU that works, and 4.2 on Linux 6.16 and later, which need it for sockets",
)


def the_criu() -> Criu:
    assert CRIU is not None
    return CRIU


class Target:
    """A running program, before a dump and after a restore."""

    def __init__(self, process: subprocess.Popen[bytes], told: str) -> None:
        self.process = process
        self.pid = process.pid
        self.told = told

    def said(self, *, timeout_s: float = 20) -> str:
        """What it told last; waits for it."""
        wait_until(lambda: os.path.exists(self.told), "the target tells something", timeout_s=timeout_s)
        return Path(self.told).read_text()

    def ask(self) -> str:
        """Have it go on from `wait`, and give what it tells next."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.told)
        os.kill(self.pid, signal.SIGUSR1)
        return self.said()

    def lives(self) -> bool:
        return is_running(self.pid)


@contextmanager
def target(
    body: str,
    tmp_path: Path,
    *arguments: str,
    stdout: int | None = subprocess.DEVNULL,
    stderr: int | None = subprocess.DEVNULL,
    pass_fds: tuple[int, ...] = (),
    prefix: tuple[str, ...] = (),
    session: bool = True,
) -> Iterator[Target]:
    """Run `PRELUDE` and `body`, whose arguments are the file it tells things in and `arguments`; it ends afterwards."""
    told = str(tmp_path / "told")
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", PRELUDE + body, told, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=session,
        pass_fds=pass_fds,
    )
    with process:
        found = Target(process, told)
        try:
            yield found
        finally:
            end(found.pid)


def is_running(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def end(pid: int) -> None:
    """Kill a process that need not be a child, and wait until it is gone or only waits to be waited for."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_running(pid), "the target has ended")
