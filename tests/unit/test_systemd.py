"""What is said to a service manager, received by a stand-in for its socket."""

from __future__ import annotations

import array
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from weightfs import systemd


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    name = str(tmp_path / "notify") if request.param == "path" else f"\0weightfs-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inlet:
        inlet.bind(name)
        inlet.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", name.replace("\0", "@"))
        yield inlet


def received(manager: socket.socket) -> tuple[str, list[int]]:
    data, ancillary, _, _ = manager.recvmsg(4096, socket.CMSG_SPACE(64))
    fds = array.array("i")
    for _, _, payload in ancillary:
        fds.frombytes(payload)
    return data.decode(), list(fds)


def test_a_state_is_told(manager: socket.socket) -> None:
    systemd.notify("READY=1")
    assert received(manager) == ("READY=1", [])


def test_a_descriptor_is_kept_and_given_up(manager: socket.socket, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    systemd.keep("name", fd)
    os.close(fd)
    said, fds = received(manager)
    assert said.splitlines() == ["FDSTORE=1", "FDNAME=name", "FDPOLL=0"]
    assert os.pread(fds[0], 10, 0) == b"content"
    os.close(fds[0])
    systemd.discard("name")
    assert received(manager) == ("FDSTOREREMOVE=1\nFDNAME=name", [])


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    systemd.notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    systemd.notify("READY=1")


def test_descriptors_meant_for_another_process_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    assert systemd.kept({}, os.getpid()) == {}
    assert systemd.kept({"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "a"}, os.getpid()) == {}


STARTED = """
import os
from weightfs import systemd
os.environ["LISTEN_PID"] = str(os.getpid())
found = systemd.kept(os.environ, os.getpid())
print({name: (os.pread(fd, 10, 0), os.get_inheritable(fd)) for name, fd in found.items()})
"""


def test_kept_descriptors_are_found_by_name(tmp_path: Path) -> None:
    """As the manager starts a service: descriptors from 3 on, their names in the environment."""
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    shell = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(STARTED)} 3<{tmp_path}/one 4<{tmp_path}/two"
    environment = {**os.environ, "LISTEN_FDS": "2", "LISTEN_FDNAMES": "first"}
    done = subprocess.run(["bash", "-c", shell], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "{'first': (b'one', False), 'unnamed-1': (b'two', False)}", done.stderr
