"""Real processes, dumped and restored through checkpoint.criu."""

from __future__ import annotations

import os
import signal
import socket
import stat
from pathlib import Path

import pytest

from checkpoint.criu import DumpOptions, dump, options_for, restore, restore_options_of
from checkpoint.errors import CorruptError, RetryError, TargetError
from checkpoint.processes import tree_of
from tests.helpers.targets import needs_criu, target, the_criu

pytestmark = needs_criu

COUNTER = """
ballast = bytearray(os.urandom(1 << 20)) * 20
count = 0
while True:
    count += 1
    tell(f"{count} {hash(bytes(ballast))}")
    wait()
"""


def test_goes_on_where_it_was(tmp_path: Path, images: str) -> None:
    with target(COUNTER, tmp_path) as counter:
        first = counter.said()
        tree = tree_of(counter.pid)
        options = options_for(tree)
        dump(the_criu(), counter.pid, images, options, 60)
        assert counter.process.wait(30) == -signal.SIGKILL
        assert restore(the_criu(), images, restore_options_of(options), 60) == counter.pid
        second = counter.ask()
        assert first.split()[0] == "1"
        assert second.split() == ["2", first.split()[1]]
        again = tree_of(counter.pid)[0]
        assert (again.cmdline, again.exe, again.cwd) == (tree[0].cmdline, tree[0].exe, tree[0].cwd)


def test_images_are_for_their_owner_only(tmp_path: Path, images: str) -> None:
    with target(COUNTER, tmp_path) as counter:
        counter.said()
        dump(the_criu(), counter.pid, images, DumpOptions(), 60)
    modes = {name: stat.S_IMODE(os.stat(f"{images}/{name}").st_mode) for name in os.listdir(images)}
    assert modes
    assert not any(mode & 0o077 for mode in modes.values()), modes
    assert not [name for name in modes if not name.endswith(".img")], "logs and figures are kept elsewhere"


def test_left_running(tmp_path: Path, images: str) -> None:
    with target(COUNTER, tmp_path) as counter:
        counter.said()
        dump(the_criu(), counter.pid, images, DumpOptions(leave_running=True), 60)
        assert counter.ask().split()[0] == "2"
        with pytest.raises(RetryError, match=r"pid"):
            restore(the_criu(), images, restore_options_of(DumpOptions()), 60)
        assert counter.ask().split()[0] == "3"


SERVER = """
listener = socket.create_server(("127.0.0.1", 0))
tell(listener.getsockname()[1])
while True:
    client, _ = listener.accept()
    with client:
        client.sendall(client.recv(100).upper())
"""


def asked(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        client.sendall(b"warm")
        return client.recv(100)


def test_a_listener_answers_again(tmp_path: Path, images: str) -> None:
    if not the_criu().can_dump_inet:
        pytest.skip("this machine lacks CRIU 4.2, which Linux 6.16 and later need for sockets")
    with target(SERVER, tmp_path) as server:
        port = int(server.said())
        assert asked(port) == b"WARM"
        options = options_for(tree_of(server.pid))
        dump(the_criu(), server.pid, images, options, 60)
        assert server.process.wait(30) == -signal.SIGKILL  # else its parent keeps the pid taken
        with pytest.raises(ConnectionRefusedError):
            asked(port)
        restore(the_criu(), images, restore_options_of(options), 60)
        assert asked(port) == b"WARM"


def test_no_such_process(images: str) -> None:
    with pytest.raises(TargetError, match="no process 4194304"):
        dump(the_criu(), 4_194_304, images, DumpOptions(), 60)


def test_images_that_are_none(tmp_path: Path, images: str) -> None:
    with pytest.raises(CorruptError, match="damaged"):
        restore(the_criu(), images, restore_options_of(DumpOptions()), 60)
