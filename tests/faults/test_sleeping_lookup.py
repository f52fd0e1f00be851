"""Changes in a folder while a LOOKUP in it sleeps: its lock in the kernel is held until we answer that.

The daemon is the real one, over a source whose name `sleeper` takes forever, as on a disk that does not answer.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.models import write
from tests.helpers.mounting import Daemon, both_engines, child, detach, errno_from, mounts_below, wait_until, within

DEADLINE_S = 3.0
SLEEPY = """
import sys, threading
from weightfs import notifier
from weightfs.channel import Channel
from weightfs.config import MountConfig
from weightfs.service import serve
from weightfs.source.base import WouldBlockError
from weightfs.source.local import LocalSource

source, mountpoint, state, engine, deadline, passes_over = sys.argv[1:]
child = LocalSource.child

def sleepy(self, folder_fd, name, *, cached_only=False):
    if name == b"sleeper":
        if cached_only:
            raise WouldBlockError
        threading.Event().wait()
    return child(self, folder_fd, name, cached_only=cached_only)

LocalSource.child = sleepy
if passes_over == "no":
    Channel.held_s = lambda self, nodeid: 0.0
config = MountConfig(source=source, mountpoint=mountpoint, state_dir=state, engine=engine, deadline_s=float(deadline))
serve(config, lambda document: print("mounted", flush=True))
"""


class Sleepy:
    def __init__(self, source: str, mountpoint: str, daemon: Daemon) -> None:
        self.source = source
        self.mountpoint = mountpoint
        self.daemon = daemon
        self.failed: list[tuple[int, float]] = []
        self._thread: threading.Thread | None = None

    def fall_asleep(self) -> None:
        def ask() -> None:
            started = time.monotonic()
            number = errno_from(lambda: os.stat(f"{self.mountpoint}/folder/sleeper"))
            self.failed.append((number, time.monotonic() - started))

        self._thread = threading.Thread(target=ask, daemon=True)
        self._thread.start()
        time.sleep(0.3)  # nothing tells that the kernel has asked and the source sleeps

    def wake(self) -> tuple[int, float]:
        assert self._thread is not None
        self._thread.join(DEADLINE_S + 10)
        return self.failed[-1]


@contextmanager
def sleepy(tmp_path: Path, engine: str, *, passes_over: bool) -> Iterator[Sleepy]:
    source, mountpoint = f"{tmp_path}/source", f"{tmp_path}/mount"
    for folder in ("folder", "second"):
        for name in ("file", "other", "unseen"):
            write(f"{source}/{folder}/{name}", b"1")
    write(f"{source}/folder/sleeper", b"z")
    os.mkdir(mountpoint)
    arguments = source, mountpoint, f"{tmp_path}/state", engine, str(DEADLINE_S), "yes" if passes_over else "no"
    with child(SLEEPY, *arguments) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "mounted\n"
        daemon = Daemon(process.pid)
        try:
            for _ in range(2):  # the second time, after what is new was committed, all is believed for long
                for folder in ("folder", "second"):
                    for name in ("file", "other"):
                        os.stat(f"{mountpoint}/{folder}/{name}")
                time.sleep(1.2)
            yield Sleepy(source, mountpoint, daemon)
        finally:
            detach(mountpoint)
            forced = daemon.end()
        assert forced is None, f"the daemon ended on {forced} only"
        assert process.wait(5) == 0


@both_engines
@pytest.mark.parametrize("passes_over", [True, False], ids=["passed over", "waited for"])
def test_others_go_on(tmp_path: Path, engine: str, passes_over: bool) -> None:
    """The sleeper's asker hears EIO at the deadline; others are served, told of changes, and all is well after."""
    with sleepy(tmp_path, engine, passes_over=passes_over) as mount:
        at, source = mount.mountpoint, mount.source
        mount.fall_asleep()
        os.unlink(f"{source}/folder/file")
        write(f"{source}/folder/other", b"longer")
        os.unlink(f"{source}/second/file")
        write(f"{source}/second/other", b"longer")
        wait_until(lambda: not os.path.exists(f"{at}/second/file"), "a name elsewhere", timeout_s=1)
        wait_until(lambda: os.stat(f"{at}/second/other").st_size == 6, "attributes elsewhere", timeout_s=1)
        assert within(1, lambda: sorted(os.listdir(f"{at}/second"))) == ["other", "unseen"]
        if passes_over:
            assert within(1, lambda: os.stat(f"{at}/folder/unseen")).st_size == 1
            wait_until(lambda: os.stat(f"{at}/folder/other").st_size == 6, "attributes in that folder", timeout_s=1)
        number, seconds = mount.wake()
        assert number == errno.EIO
        assert DEADLINE_S - 0.5 < seconds < DEADLINE_S + 2
        wait_until(lambda: not os.path.exists(f"{at}/folder/file"), "the name", timeout_s=1)
        assert within(1, lambda: os.stat(f"{at}/folder/other")).st_size == 6
        assert within(1, lambda: os.stat(f"{at}/folder/unseen")).st_size == 1
    assert mounts_below(str(tmp_path)) == []


@both_engines
@pytest.mark.parametrize("passes_over", [True, False], ids=["passed over", "waited for"])
def test_the_daemon_ends(tmp_path: Path, engine: str, passes_over: bool) -> None:
    """SIGTERM while a thread of it waits in the kernel: it ends within 5 s, and nothing is left that hangs."""
    with sleepy(tmp_path, engine, passes_over=passes_over) as mount:
        mount.fall_asleep()
        os.unlink(f"{mount.source}/folder/file")
        time.sleep(0.2)  # nothing tells that a thread waits in the kernel
        mount.daemon.signal(signal.SIGTERM)
        assert mount.daemon.has_ended(5)
        assert mount.wake()[0] in (errno.EIO, errno.ENOTCONN, errno.ECONNABORTED)
        assert mounts_below(str(tmp_path)) == []
