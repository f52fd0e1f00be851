"""What a service manager that keeps descriptors does: restarts that no request notices, stops that unmount.

A stand-in for systemd: a socket that hears sd_notify(3) and keeps what FDSTORE=1 brings, and starts with LISTEN_FDS.
"""

from __future__ import annotations

import array
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import pytest

from tests.helpers.footprint import live
from tests.helpers.models import write
from tests.helpers.mounting import WEIGHTFS, detach, mounts_below, wait_until, within

DATA = random.Random(10).randbytes(1_000_000)
UNIT = "weightfs.service"

SHIM = """
import fcntl, os, sys
fds = [int(number) for number in sys.argv[1].split(",") if number]
moved = [fcntl.fcntl(fd, fcntl.F_DUPFD, 500) for fd in fds]  # out of the way
for at, fd in enumerate(moved):
    os.dup2(fd, 3 + at, inheritable=True)
os.closerange(3 + len(moved), 1500)
os.environ["LISTEN_PID"], os.environ["LISTEN_FDS"] = str(os.getpid()), str(len(moved))
os.environ["LISTEN_FDNAMES"] = sys.argv[2]
os.execv(sys.argv[3], sys.argv[3:])
"""


class Manager:
    """Keeps descriptors and one service."""

    def __init__(self, folder: str, command: list[str]) -> None:
        self._address = os.path.join(folder, "notify")
        self._command = command
        self._log = os.path.join(folder, "service.log")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self._address)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._hear, daemon=True)
        self._thread.start()
        self.store: dict[str, int] = {}
        self.service: subprocess.Popen[bytes] | None = None

    def _hear(self) -> None:
        while True:
            data, ancillary, _, _ = self._socket.recvmsg(4096, socket.CMSG_SPACE(4 * 16))
            said = dict(line.split("=", 1) for line in data.decode().splitlines())
            fds = array.array("i")
            for _, _, payload in ancillary:
                fds.frombytes(payload)
            if "END" in said:
                return
            if "FDSTORE" in said:
                self.store.update(dict.fromkeys([said["FDNAME"]], fds[0]))
            if "FDSTOREREMOVE" in said and said["FDNAME"] in self.store:
                os.close(self.store.pop(said["FDNAME"]))
            if said.get("READY") == "1":
                self._ready.set()

    def start(self) -> None:
        """Returns once it is ready."""
        self._ready.clear()
        numbers, names = ",".join(map(str, self.store.values())), ":".join(self.store)
        with open(self._log, "ab") as log:
            self.service = subprocess.Popen(
                [sys.executable, "-c", SHIM, numbers, names, *self._command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=list(self.store.values()),
                env={**os.environ, "NOTIFY_SOCKET": self._address, "WEIGHTFS_FD_STORE": "1"},
            )
        assert self._ready.wait(20), self.log()

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        assert self.service is not None
        self.service.send_signal(number)
        self.service.wait(30)

    def log(self) -> str:
        with open(self._log) as log:
            return log.read()

    def __enter__(self) -> Manager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.service is not None and self.service.poll() is None:
            self.service.kill()
            self.service.wait(30)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as outlet:
            outlet.sendto(b"END=1", self._address)
        self._thread.join(20)
        self._socket.close()
        for fd in self.store.values():
            os.close(fd)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[str]:
    write(f"{tmp_path}/source/file", DATA)
    os.mkdir(f"{tmp_path}/mount")
    os.mkdir(f"{tmp_path}/bin")
    yield str(tmp_path)
    detach(f"{tmp_path}/mount")


@pytest.fixture
def manager(place: str) -> Iterator[Manager]:
    command = [WEIGHTFS, "mount", "--foreground", f"{place}/source", f"{place}/mount", "--state-dir", f"{place}/state"]
    with Manager(place, command) as one:
        one.start()
        yield one


def read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), 1 << 24, 0)


def umount_if_stopping(place: str, job: str) -> None:
    """As the unit's ExecStop does it, with a systemctl that names the job."""
    systemctl = write(f"{place}/bin/systemctl", f"#!/bin/sh\necho '12 {UNIT} {job} running'\n".encode())
    os.chmod(systemctl, 0o755)
    path = f"{place}/bin:{os.environ['PATH']}"
    done = subprocess.run(
        [WEIGHTFS, "umount", "--lazy", "--if-stopping", UNIT, f"{place}/mount"],
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["restarted", "killed and started again"])
def test_no_request_fails(place: str, manager: Manager, number: signal.Signals) -> None:
    """They wait; what is open stays open, also what has no name any more."""
    mountpoint = f"{place}/mount"
    assert {"weightfs-kernel", "weightfs-ledger"} <= manager.store.keys()
    write(f"{place}/source/other", b"other")
    with open(f"{mountpoint}/file", "rb", buffering=0) as held, ThreadPoolExecutor(2) as pool:
        os.unlink(f"{place}/source/file")
        umount_if_stopping(place, "restart")
        manager.end(number)
        assert mounts_below(mountpoint) == [mountpoint]
        waiting = pool.submit(read, f"{mountpoint}/other")
        manager.start()
        assert waiting.result(60) == b"other"
        os.posix_fadvise(held.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert within(20, lambda: os.pread(held.fileno(), len(DATA), 0)) == DATA
        assert manager.service is not None
        assert live(mountpoint)["supervisor_pid"] == manager.service.pid
    wait_until(lambda: live(mountpoint)["open_inodes"] == 1, "the handle is given back")
    wait_until(lambda: len(manager.store) == 3, "what was held for open files is not kept twice")


@pytest.mark.parametrize("busy", [False, True], ids=["at rest", "busy"])
def test_stop_unmounts(place: str, manager: Manager, busy: bool) -> None:
    mountpoint = f"{place}/mount"
    held = os.open(f"{mountpoint}/file", os.O_RDONLY) if busy else -1
    umount_if_stopping(place, "stop")
    assert mounts_below(mountpoint) == []
    manager.end()
    assert within(20, lambda: os.listdir(mountpoint)) == []
    wait_until(lambda: not manager.store, "nothing is kept")
    if busy:
        os.close(held)
    manager.start()
    assert read(f"{mountpoint}/file") == DATA
    assert live(mountpoint)["deaths"] == 0
