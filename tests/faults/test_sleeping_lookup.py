"""Changes in a folder while a LOOKUP in it sleeps: its lock in the kernel is held until we answer that.

The daemon is the real one, over a source whose name `sleeper` takes forever, as on a disk that does not answer.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.helpers.models import write
from tests.helpers.mounting import (
    Daemon,
    Mount,
    Mounter,
    errno_from,
    mounts_below,
    needs_passthrough,
    wait_until,
    within,
)
from tests.helpers.versions import make_version

DEADLINE_S = 5.0
SLEEPS = {
    "source/local.py": [
        ("        return self._openat(folder_fd, name, _PATH_ONLY, cached_only)\n",
         "        if name == b'sleeper':\n            if cached_only:\n                raise WouldBlockError\n"
         "            threading.Event().wait()\n"
         "        return self._openat(folder_fd, name, _PATH_ONLY, cached_only)\n"),
    ],
}  # fmt: skip
WAITS_IN_THE_KERNEL = {
    **SLEEPS,
    "outstanding.py": [
        ("        return time.monotonic() - min(asked, default=time.monotonic())", "        return 0.0")
    ],
}


class Sleepy:
    def __init__(self, mount: Mount) -> None:
        self.mount = mount
        self.source = mount.source
        self.mountpoint = mount.mountpoint
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


@pytest.fixture
def sleepy(request: pytest.FixtureRequest, mounter: Mounter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sleepy:
    engine, passes_over = request.param
    source = f"{tmp_path}/source"
    for folder in ("folder", "second"):
        for name in ("file", "other", "unseen"):
            write(f"{source}/{folder}/{name}", b"1")
    write(f"{source}/folder/sleeper", b"z")
    monkeypatch.setenv("PYTHONPATH", make_version(f"{tmp_path}/sleepy", SLEEPS if passes_over else WAITS_IN_THE_KERNEL))
    write(f"{tmp_path}/deadline.toml", f"deadline_s = {DEADLINE_S}\n".encode())
    mount = mounter(source, engine, "--config", f"{tmp_path}/deadline.toml")
    for _ in range(2):  # the second time, after what is new was committed, all is believed for long
        for folder in ("folder", "second"):
            for name in ("file", "other"):
                os.stat(mount.path(folder, name))
        time.sleep(1.2)
    return Sleepy(mount)


ways = pytest.mark.parametrize(
    "sleepy",
    [
        pytest.param((engine, passes_over), id=f"{engine}-{'passed over' if passes_over else 'waited'}", marks=marks)
        for engine, marks in (("passthrough", needs_passthrough), ("portable", ()))
        for passes_over in (True, False)
    ],
    indirect=True,
)


@ways
def test_others_go_on(sleepy: Sleepy, request: pytest.FixtureRequest) -> None:
    """The sleeper's asker hears EIO at the deadline; others are served, told of changes, and all is well after."""
    at, source = sleepy.mountpoint, sleepy.source
    sleepy.fall_asleep()
    os.unlink(f"{source}/folder/file")
    write(f"{source}/folder/other", b"longer")
    os.unlink(f"{source}/second/file")
    write(f"{source}/second/other", b"longer")
    wait_until(lambda: not os.path.exists(f"{at}/second/file"), "a name elsewhere")
    wait_until(lambda: os.stat(f"{at}/second/other").st_size == 6, "attributes elsewhere")
    assert within(20, lambda: sorted(os.listdir(f"{at}/second"))) == ["other", "unseen"]
    if "passed over" in request.node.name:
        assert within(20, lambda: os.stat(f"{at}/folder/unseen")).st_size == 1
        wait_until(lambda: os.stat(f"{at}/folder/other").st_size == 6, "attributes in that folder")
    assert not sleepy.failed, "all this while it slept"
    number, seconds = sleepy.wake()
    assert number == errno.EIO
    assert DEADLINE_S - 0.5 < seconds < DEADLINE_S + 10
    wait_until(lambda: not os.path.exists(f"{at}/folder/file"), "the name")
    assert within(20, lambda: os.stat(f"{at}/folder/other")).st_size == 6
    assert within(20, lambda: os.stat(f"{at}/folder/unseen")).st_size == 1


@ways
def test_it_ends(sleepy: Sleepy) -> None:
    """SIGTERM while a thread waits in the kernel: all ends within 5 s, and nothing is left that hangs."""
    sleepy.fall_asleep()
    os.unlink(f"{sleepy.source}/folder/file")
    time.sleep(0.2)  # nothing tells that a thread waits in the kernel
    sleepy.mount.supervisor.signal(signal.SIGTERM)
    assert sleepy.mount.supervisor.has_ended(20)
    assert sleepy.wake()[0] in (errno.EIO, errno.ENOTCONN, errno.ECONNABORTED)
    assert mounts_below(sleepy.mountpoint) == []


@ways
def test_a_killed_daemon_is_followed_at_once(sleepy: Sleepy) -> None:
    """One of its threads waits in the kernel for what only the successor answers, so the dead one is not yet gone."""
    sleepy.fall_asleep()
    os.unlink(f"{sleepy.source}/folder/file")
    time.sleep(0.5)  # nothing tells that a thread waits in the kernel, and that the standby is there
    daemon = Daemon(sleepy.mount.daemon_pid())
    daemon.signal(signal.SIGKILL)
    started = time.monotonic()
    assert within(20, lambda: os.listdir(f"{sleepy.mountpoint}/second")) == os.listdir(f"{sleepy.source}/second")
    assert sleepy.mount.daemon_pid() != daemon.pid
    assert time.monotonic() - started < DEADLINE_S
    assert sleepy.wake()[0] == errno.EIO
    wait_until(lambda: not os.path.exists(f"{sleepy.mountpoint}/folder/file"), "the name")
    assert daemon.has_ended(20)
    daemon.close()
