"""Daemons as their supervisor sees them: processes that prepare, get the word to go, serve, and end."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from weightfs.link import MOST_DESCRIPTORS, Link
from weightfs.supervision.estate import Estate

_PASSED_ON: Final = frozenset({"PATH", "HOME", "USER", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV"})
_PREFIXES: Final = ("PYTHON", "LC_", "XDG_", "WEIGHTFS_", "COVERAGE_", "PYENV_")
_LAST_MS: Final = 50
_PIDFD_THREAD: Final = os.O_EXCL


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """How to start a version of weightfs, and what with.

    Attributes:
        interpreter: path of Python, with which `-m weightfs.cli...` is run.
        environment: of its processes.
        settings: the fields of its `MountConfig`, which another version need not understand.
    """

    interpreter: str
    environment: Mapping[str, str]
    settings: Mapping[str, Any]

    @classmethod
    def own(cls, settings: Mapping[str, Any]) -> Version:
        """The one that runs now."""
        return cls(interpreter=sys.executable, environment=for_children(os.environ), settings=settings)

    def command(self, module: str, *arguments: str) -> list[str]:
        """How to run one of its programs."""
        return [self.interpreter, "-P", "-m", f"weightfs.cli.{module}", *arguments]


def for_children(environment: Mapping[str, str]) -> dict[str, str]:
    """What a daemon needs of an environment: it is written down and sent, and secrets have no business in it."""
    return {name: value for name, value in environment.items() if name in _PASSED_ON or name.startswith(_PREFIXES)}


@dataclass(slots=True, eq=False)
class Daemon:
    """One of them.

    Attributes:
        pid: of the process, a child of this one.
        pidfd: readable once all of it has ended.
        canary: a thread of it that does nothing, and the descriptor that is readable once that has ended; None before
            it is known, or where the kernel can't tell (before Linux 6.9). A process that was killed ends with its last
            thread, and one of them may wait in the kernel for an answer that only a successor can give.
        is_reaped: whether all of it has ended, and was waited for.
        link: to it.
        version: that it is of.
        is_asked_for: by the client that waits for a replacement.
        is_dead: whether its end was heard of.
        died_of_memory: whether it ended as a process does that touches what is not there: a damaged map, for one.
        checks_index: whether it was told to walk the index first.
        prepared: whether it may be given the word to go.
        went_at: when it was, on the monotonic clock.
        served_at: when it said that it serves.
        error: what it said was wrong.
        since: when it was started.
    """

    pid: int
    pidfd: int
    link: Link
    version: Version
    canary: tuple[int, int] | None = None
    is_reaped: bool = False
    is_asked_for: bool = False
    is_dead: bool = False
    died_of_memory: bool = False
    checks_index: bool = False
    prepared: bool = False
    went_at: float | None = None
    served_at: float | None = None
    error: dict[str, Any] | None = None
    since: float = field(default_factory=time.monotonic)
    _process: subprocess.Popen[bytes] | None = None

    @classmethod
    def start(cls, version: Version, estate: Estate, log_file: str | None) -> Daemon:
        """Start a process; it prepares, and says so.

        Raises:
            OSError: it can't be started.
        """
        link, theirs = Link.pair()
        control_fd = estate.control.fileno() if estate.control is not None else None
        with theirs:
            inherited = (theirs.fileno(), estate.kernel_fd, estate.ledger_fd, estate.source_fd, control_fd)
            process = subprocess.Popen(
                version.command("daemon", str(theirs.fileno())),
                stdin=subprocess.DEVNULL,
                pass_fds=[fd for fd in inherited if fd is not None],
                env=dict(version.environment),
                start_new_session=True,
                cwd="/",
            )
        start = {
            "settings": dict(version.settings),
            "kernel_fd": estate.kernel_fd,
            "ledger_fd": estate.ledger_fd,
            "source_fd": estate.source_fd,
            "control_fd": control_fd,
            "log_file": log_file,
        }
        link.say({"start": start})
        return cls(process.pid, os.pidfd_open(process.pid), link, version, _process=process)

    @classmethod
    def adopt(cls, told: Mapping[str, Any], version: Version) -> Daemon:
        """One that a predecessor, which became this process, had started and described by `handoff`."""
        end = socket.socket(fileno=told["link_fd"])
        end.set_inheritable(False)
        pid = told["pid"]
        self = cls(pid, os.pidfd_open(pid), Link(end), version, prepared=True)
        self.went_at = self.served_at = told["went_at"]
        self.set_canary(told["canary"])
        return self

    def handoff(self) -> dict[str, Any]:
        """Described for `adopt`."""
        canary = self.canary[0] if self.canary is not None else None
        return {"pid": self.pid, "link_fd": self.link.fileno(), "went_at": self.went_at, "canary": canary}

    def set_canary(self, thread: int | None) -> None:
        """It has told which of its threads does nothing."""
        if thread is not None:
            with contextlib.suppress(OSError):  # EINVAL before Linux 6.9; gone already
                self.canary = thread, os.pidfd_open(thread, _PIDFD_THREAD)

    def go(self, estate: Estate, *, check_index: bool) -> None:
        """Give it the word to serve, with a descriptor of every file that is open."""
        inodes = list(estate.held)
        for start in range(0, len(inodes), MOST_DESCRIPTORS):
            part = inodes[start : start + MOST_DESCRIPTORS]
            self.link.say({"held": part}, [estate.held[inode] for inode in part])
        orders: dict[str, Any] = {
            "check_index": check_index,
            "kept_by_manager": estate.is_kept,
            "mounted_at": estate.mounted_at,
        }
        orders["device"] = estate.device
        self.link.say({"go": orders})
        self.went_at = time.monotonic()
        self.checks_index = check_index

    def retire(self) -> None:
        """Ask it to answer what it has read, read no more, and end."""
        self.link.say({"retire": {}})

    def kill(self) -> None:
        """SIGKILL; in D state it ends later."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def reap(self) -> str:
        """How it ended, and why if it said so. Given a moment: what was just killed ends soon, if it does."""
        why = f": {self.error['message']}" if self.error else ""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        poll.poll(_LAST_MS)
        try:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:
            pid, status = self.pid, 0
        if not pid:
            return "a thread of it still in the kernel" + why
        self.is_reaped = True
        if self._process is not None:
            self._process.returncode = 0  # waited for here
        code = os.waitstatus_to_exitcode(status)
        self.died_of_memory = -code in (signal.SIGBUS, signal.SIGSEGV, signal.SIGABRT)
        return (f"signal {-code}" if code < 0 else f"status {code}") + why

    def close(self) -> None:
        """Give up what belongs to it here."""
        os.close(self.pidfd)
        if self.canary is not None:
            os.close(self.canary[1])
        self.link.close()
