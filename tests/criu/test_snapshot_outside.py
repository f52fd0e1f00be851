"""What a process has open outside of its tree, beside its stdio: a restore gives it an end of it, or create refuses."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoint.processes import start_ticks
from tests.helpers.served import Commands
from tests.helpers.targets import needs_criu, target

pytestmark = needs_criu

CLIENT = """
signal.signal(signal.SIGPIPE, signal.SIG_IGN)
connection = socket.socket(fileno=int(sys.argv[2]))
reading, writing = int(sys.argv[3]), int(sys.argv[4])
while True:
    try:
        connection.send(b"?")
        answer = connection.recv(100)
    except OSError as error:
        answer = b""
    tell((answer, os.read(reading, 100), os.write(writing, b"out")))
    wait()
"""
ISOLATED = (
    "unshare",
    "--mount",
    "--propagation=private",
    "sh",
    "-c",
    """
umount -i -a -l -t fuse.weightfs,fuse
exec "$@"
""",
    "sh",
)
"""Without the mounts of other tests: one that ends while CRIU looks would keep it from dumping the namespace."""
READER = """
while True:
    tell(os.pread(int(sys.argv[2]), 100, 0))
    wait()
"""
HOLDER = """
tell("ready")
wait()
"""


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    made = Commands(tmp_path)
    yield made
    made.close()


def test_pipes_and_connections_come_to_an_end(tmp_path: Path, commands: Commands) -> None:
    ours, theirs = socket.socketpair()
    reading, in_writing = os.pipe()
    out_reading, writing = os.pipe()
    os.write(in_writing, b"in")
    ours.send(b"hello")
    given = (theirs.fileno(), reading, writing)
    with target(CLIENT, tmp_path, *map(str, given), pass_fds=given) as one:
        assert one.said() == str((b"hello", b"in", 3))
        made = commands.told("create", "warm", "--pid", str(one.pid))
        assert sorted(each["code"] for each in made["findings"]) == ["pipe", "pipe", "unix-peer"]
        one.process.wait(10)
        for fd in (reading, in_writing, out_reading, writing):
            os.close(fd)
        ours.close()
        theirs.close()
        commands.told("restore", "warm")
        assert one.ask() == str((b"", b"", 3))


def test_a_file_of_a_mount_that_it_can_not_see_is_opened_anew(tmp_path: Path, commands: Commands) -> None:
    (tmp_path / "file").write_text("content")
    with (
        open(tmp_path / "file", "rb") as file,
        target(READER, tmp_path, str(file.fileno()), pass_fds=(file.fileno(),), prefix=ISOLATED) as one,
    ):
        assert one.said() == str(b"content")
        made = commands.told("create", "warm", "--pid", str(one.pid))
        assert [each["code"] for each in made["findings"]] == ["unseen-file"]
        one.process.wait(10)
        (tmp_path / "file").rename(tmp_path / "away")
        error = commands.refused("restore", "warm", code=1)
        assert error["path"] == str(tmp_path / "file")
        (tmp_path / "away").rename(tmp_path / "file")
        commands.told("restore", "warm")
        assert one.ask() == str(b"content")


@pytest.mark.parametrize("how", ["ab", "wb"])
def test_a_log_of_a_mount_that_it_can_not_see_is_refused(how: str, tmp_path: Path, commands: Commands) -> None:
    """As a container's that goes to a file of the host."""
    log = tmp_path / "log"
    with open(log, how) as file, target(HOLDER, tmp_path, stdout=file.fileno(), prefix=ISOLATED) as one:
        one.said()
        error = commands.refused("create", "warm", "--pid", str(one.pid), code=1)
        assert f"descriptor 1 writes {log}, on a mount that it can't see" in error["message"]
        assert "pipe" in error["mend"]
        assert start_ticks(one.pid) is not None


def test_a_terminal_is_refused(tmp_path: Path, commands: Commands) -> None:
    master, slave = os.openpty()
    with target(HOLDER, tmp_path, pass_fds=(slave,)) as one:
        one.said()
        error = commands.refused("create", "warm", "--pid", str(one.pid), code=1)
        assert f"descriptor {slave} is the terminal" in error["message"]
        assert error["mend"] == "close it"
        assert start_ticks(one.pid) is not None
    os.close(master)
    os.close(slave)
