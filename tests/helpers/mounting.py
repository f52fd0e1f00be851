"""Real mounts for tests, made through the command line as a user makes them, and taken away whatever happens."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, TypeVar

import pytest

from weightfs import linux
from weightfs.config import MountConfig
from weightfs.control import ask

T = TypeVar("T")

WEIGHTFS = os.path.join(os.path.dirname(sys.executable), "weightfs")
NO_PASSTHROUGH = "this machine lacks FUSE passthrough (kernel < 6.9)"
SETTLED_S = 2.1
"""Files younger than 2 s are not recorded in the index."""


def has_passthrough() -> bool:
    found = re.match(r"(\d+)\.(\d+)", platform.release())
    return found is not None and (int(found[1]), int(found[2])) >= (6, 9)


ENGINES = (
    pytest.param("passthrough", marks=pytest.mark.skipif(not has_passthrough(), reason=NO_PASSTHROUGH)),
    "portable",
)
both_engines = pytest.mark.parametrize("engine", ENGINES)
needs_passthrough = pytest.mark.skipif(not has_passthrough(), reason=NO_PASSTHROUGH)


def weightfs(*arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    """Run the command as a user would."""
    return subprocess.run(
        [WEIGHTFS, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, check=False
    )


def wait_until(condition: Callable[[], T], what: str, *, timeout_s: float = 20) -> T:
    """Poll until `condition` gives something true; gives that. The limit is for machines that others use, too."""
    ends = time.monotonic() + timeout_s
    while not (found := condition()):
        if time.monotonic() > ends:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.02)
    return found


def wait_until_settled(*paths: str) -> None:
    """Wait until the youngest of these files is old enough to be remembered."""
    youngest = max(max(s.st_mtime, s.st_ctime) for s in (os.lstat(path) for path in paths))
    wait_until(lambda: time.time() - youngest > SETTLED_S, "files settle", timeout_s=SETTLED_S + 20)


def within(timeout_s: float, function: Callable[[], T]) -> T:
    """Call in a thread that is left behind when it does not come back: a hang is a failure, not a hung run."""
    outcome: list[T | BaseException] = []

    def run() -> None:
        try:
            outcome.append(function())
        except BaseException as e:  # noqa: BLE001 - handed to the caller
            outcome.append(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    assert outcome, f"no answer within {timeout_s:g} s"
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def errno_from(function: Callable[[], object], *, timeout_s: float = 20) -> int:
    """The errno a call fails with; 0 when it succeeds."""
    try:
        within(timeout_s, function)
    except OSError as e:
        return e.errno or -1
    return 0


@contextlib.contextmanager
def refused(*numbers: int) -> Iterator[None]:
    """The block must fail with one of these errnos."""
    try:
        yield
    except OSError as e:
        if e.errno not in numbers:
            raise
        return
    raise AssertionError(f"was not refused with {', '.join(errno.errorcode[number] for number in numbers)}")


@contextlib.contextmanager
def tolerating(*numbers: int) -> Iterator[None]:
    """The block may fail with one of these errnos, and with no other."""
    try:
        yield
    except OSError as e:
        if e.errno not in numbers:
            raise


def mounts_below(folder: str) -> list[str]:
    """Mountpoints of weightfs at or below a folder, topmost last; asks no mount."""
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            before, _, after = line.partition(" - ")
            place = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), before.split(" ")[4])
            if after.startswith("fuse.weightfs ") and (place + "/").startswith(folder.rstrip("/") + "/"):
                found.append(place)
    return found


def detach(mountpoint: str) -> None:
    """Take every mount at a place away, used or not."""
    for _ in mounts_below(mountpoint):
        subprocess.run(["umount", "-l", "--", mountpoint], capture_output=True, check=False)


class Daemon:
    """A daemon or supervisor by pidfd, so that no other process can be meant."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._fd = os.pidfd_open(pid)

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._fd, number)

    def has_ended(self, timeout_s: float = 0) -> bool:
        return linux.is_readable(self._fd, timeout_s)

    def end(self) -> str | None:
        """End it by force if needed; gives what had to be done, None when it ended by itself."""
        try:
            if self.has_ended(20):
                return None
            self.signal(signal.SIGTERM)
            if self.has_ended(20):
                return "SIGTERM"
            self.signal(signal.SIGKILL)
            self.has_ended(20)
            return "SIGKILL"
        finally:
            os.close(self._fd)

    def close(self) -> None:
        os.close(self._fd)

    def rss_bytes(self, field: str = "VmRSS") -> int:
        with open(f"/proc/{self.pid}/status") as status:
            return int(next(line.split()[1] for line in status if line.startswith(field + ":"))) * 1024


class Mount:
    """A mount from `with` to the end of the block.

    Attributes:
        document: what `weightfs mount --json` printed.
        supervisor: the process that owns it; ends with it.
        log_must_be_clean: no error may have been logged, which is checked at the end.
    """

    def __init__(self, source: str, mountpoint: str, state_dir: str, engine: str = "auto", *options: str) -> None:
        self.source = source
        self.mountpoint = mountpoint
        self.state_dir = state_dir
        self.log_must_be_clean = True
        self._ended = False
        os.makedirs(mountpoint, exist_ok=True)
        done = weightfs("mount", source, mountpoint, "--state-dir", state_dir, "--engine", engine, "--json", *options)
        if done.returncode:
            detach(mountpoint)
            raise AssertionError(f"mount ended with {done.returncode}: {done.stderr}\n{self.log_text()}")
        self.document: dict[str, Any] = json.loads(done.stdout)
        self.engine: str = self.document["engine"]
        self.supervisor = Daemon(self.document["supervisor_pid"])
        if engine != "auto":
            assert self.engine == engine

    def path(self, *names: str) -> str:
        return os.path.join(self.mountpoint, *names)

    def live(self) -> dict[str, Any]:
        """The state, read through the mount: one open, one read, one at the end."""
        with open(self.path(".weightfs", "status.json"), "rb") as file:
            return dict(json.loads(file.read()))

    def status(self) -> dict[str, Any]:
        """The state, as `weightfs status` prints it."""
        done = weightfs("status", self.mountpoint, "--json")
        assert done.returncode == 0, done.stderr
        (document,) = json.loads(done.stdout)["mounts"]
        return dict(document)

    def control(self, command: str) -> dict[str, Any]:
        """Ask the daemon over its control socket."""
        settings = MountConfig(source=self.source, mountpoint=self.mountpoint, state_dir=self.state_dir)
        return ask(settings.control_socket, {"command": command}, 10)

    def daemon_pid(self) -> int:
        """The process that serves now."""
        return int(self.live()["daemon_pid"])

    def kill_daemon(self) -> int:
        """SIGKILL whoever serves, and wait until it is dead; gives its pid."""
        daemon = Daemon(self.daemon_pid())
        daemon.signal(signal.SIGKILL)
        assert daemon.has_ended(20)
        daemon.close()
        return daemon.pid

    def kill_all(self) -> None:
        """Leave a dead mount behind: nobody is left to revive it or take it away."""
        daemon = Daemon(self.daemon_pid())
        self.supervisor.signal(signal.SIGSTOP)
        daemon.signal(signal.SIGKILL)
        assert daemon.has_ended(20)
        daemon.close()
        self.supervisor.signal(signal.SIGKILL)
        assert self.supervisor.has_ended(20)

    def umount(self, *options: str) -> subprocess.CompletedProcess[str]:
        return weightfs("umount", self.mountpoint, "--json", *options)

    def log_text(self) -> str:
        try:
            with open(os.path.join(self.state_dir, "weightfs.log"), encoding="utf-8", errors="replace") as log:
                return log.read()
        except OSError:
            return ""

    def __enter__(self) -> Mount:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ended:
            return
        self._ended = True
        subprocess.run(["umount", "--", self.mountpoint], capture_output=True, timeout=60, check=False)
        detach(self.mountpoint)
        forced = self.supervisor.end()
        if kind is None:
            assert forced is None, f"the supervisor outlived its mount and ended on {forced} only\n{self.log_text()}"
            if self.log_must_be_clean:
                assert not re.search(r" (ERROR|CRITICAL) |Traceback", self.log_text()), self.log_text()


class Mounter:
    """Makes mounts below one folder; all end with it."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._count = 0
        self._stack = contextlib.ExitStack()

    def __call__(self, source: str, engine: str = "auto", *options: str, state_dir: str = "", at: str = "") -> Mount:
        self._count += 1
        mountpoint = at or os.path.join(self.folder, f"mount-{self._count}")
        state = state_dir or os.path.join(self.folder, f"state-{self._count}")
        return self._stack.enter_context(Mount(source, mountpoint, state, engine, *options))

    def __enter__(self) -> Mounter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)


@contextlib.contextmanager
def child(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that uses the mount and may be killed; ended with the block."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def run_python(code: str, *arguments: str, timeout_s: float = 120) -> str:
    """What a Python process prints; heavy imports stay out of this one."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "2"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
