"""What ties a process to the outside does not stop a dump, and a restore is given something else for it."""

from __future__ import annotations

import os
import pty
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from checkpoint.attachments import Attachment, attachments_of, stand_ins
from checkpoint.criu import RestoreOptions, dump, options_for, restore, restore_options_of
from checkpoint.errors import CorruptError
from checkpoint.processes import Process, tree_of
from checkpoint.sockets import sockets_of
from tests.helpers.mounting import wait_until
from tests.helpers.targets import Target, needs_criu, target, the_criu

pytestmark = needs_criu

WRITER = """
count = 0
while True:
    count += 1
    os.write(1, b"line %d\\n" % count)
    tell(count)
    wait()
"""


@contextmanager
def opened(path: Path, flags: int = os.O_APPEND) -> Iterator[int]:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | flags)
    try:
        yield fd
    finally:
        os.close(fd)


def found(tree: tuple[Process, ...]) -> list[Attachment]:
    return attachments_of(tree, sockets_of(tree))


def taken(one: Target, images: str) -> tuple[Attachment, Callable[[int], int]]:
    """Dump a process with one attachment; gives that, and what restores it with a descriptor for it."""
    assert one.said() == "1"
    tree = tree_of(one.pid)
    (attachment,) = found(tree)
    options = options_for(tree)
    dump(the_criu(), one.pid, images, options, 60)
    assert one.process.wait(30) == -signal.SIGKILL

    def back(fd: int) -> int:
        with_it = replace(restore_options_of(options), inherit=((fd, attachment.resource),))
        return restore(the_criu(), images, with_it, 60)

    return attachment, back


def test_a_log_that_has_grown(tmp_path: Path, images: str) -> None:
    log, next_log = tmp_path / "log", tmp_path / "next"
    with opened(log, 0) as fd, target(WRITER, tmp_path, stdout=fd) as writer:
        attachment, back = taken(writer, images)
        assert (attachment.kind, attachment.path, attachment.needed) == ("file", str(log), False)
        assert attachment.is_stdio
        os.write(fd, b"of another process\n")
        with pytest.raises(CorruptError, match="has 26 bytes, and had 7") as caught:
            restore(the_criu(), images, RestoreOptions(), 60)
        assert caught.value.path == str(log)
        with opened(next_log) as given:
            assert back(given) == writer.pid
        assert writer.ask() == "2"
        assert next_log.read_text() == "line 2\n"
        assert log.read_text() == "line 1\nof another process\n"


def test_a_log_that_is_appended_to_may_grow(tmp_path: Path, images: str) -> None:
    log = tmp_path / "log"
    with opened(log) as fd, target(WRITER, tmp_path, stdout=fd) as writer:
        taken(writer, images)
        os.write(fd, b"of another process\n")
        restore(the_criu(), images, RestoreOptions(), 60)
        assert writer.ask() == "2"
        assert log.read_text() == "line 1\nof another process\nline 2\n"


def test_one_log_for_output_and_errors_that_had_one_each(tmp_path: Path, images: str) -> None:
    log, body = tmp_path / "log", WRITER.replace("tell(", 'os.write(2, b"error\\n"); tell(')
    with (
        opened(tmp_path / "out") as out,
        opened(tmp_path / "err") as err,
        target(body, tmp_path, stdout=out, stderr=err) as writer,
    ):
        assert writer.said() == "1"
        tree = tree_of(writer.pid)
        options = options_for(tree)
        dump(the_criu(), writer.pid, images, options, 60)
        assert writer.process.wait(30) == -signal.SIGKILL
        with opened(log) as given:
            inherit = tuple((given, one.resource) for one in found(tree))
            assert len(inherit) == 2
            restore(the_criu(), images, replace(restore_options_of(options), inherit=inherit), 60)
        assert writer.ask() == "2"
        assert log.read_text() == "line 2\nerror\n"


def test_a_pipe_whose_reader_is_gone(tmp_path: Path, images: str) -> None:
    log = tmp_path / "log"
    reading, writing = os.pipe()
    with target(WRITER, tmp_path, stdout=writing) as writer:
        attachment, back = taken(writer, images)
        os.close(reading)
        os.close(writing)
        assert (attachment.kind, attachment.external, attachment.needed) == ("pipe", None, True)
        with opened(log) as given:
            back(given)
        assert writer.ask() == "2"
        assert log.read_text() == "line 2\n"


def test_a_pipe_for_a_pipe(tmp_path: Path, images: str) -> None:
    reading, writing = os.pipe()
    with target(WRITER, tmp_path, stdout=writing) as writer:
        os.close(writing)
        _, back = taken(writer, images)
        os.close(reading)
        reading, writing = os.pipe()
        back(writing)
        os.close(writing)
        assert writer.ask() == "2"
        assert os.read(reading, 100) == b"line 2\n"
    os.close(reading)


def test_a_terminal_for_a_terminal(tmp_path: Path, images: str) -> None:
    ours, theirs = pty.openpty()
    with target(WRITER, tmp_path, stdout=theirs) as writer:
        attachment, back = taken(writer, images)
        assert (attachment.kind, attachment.needed) == ("tty", True)
        os.close(ours)
        os.close(theirs)
        ours, theirs = pty.openpty()
        back(theirs)
        assert writer.ask() == "2"
        assert os.read(ours, 100) == b"line 2\r\n"
    os.close(ours)
    os.close(theirs)


def test_a_unix_connection(tmp_path: Path, images: str) -> None:
    ours, theirs = socket.socketpair()
    with target(WRITER, tmp_path, stdout=theirs.fileno()) as writer:
        theirs.close()
        attachment, back = taken(writer, images)
        assert (attachment.kind, attachment.needed) == ("socket", True)
        ours.close()
        ours, theirs = socket.socketpair()
        back(theirs.fileno())
        theirs.close()
        assert writer.ask() == "2"
        assert ours.recv(100) == b"line 2\n"
    ours.close()


def test_without_a_reader_the_first_write_ends_it(tmp_path: Path, images: str) -> None:
    """Why a pipe to the outside is always given something else."""
    body = "signal.signal(signal.SIGPIPE, signal.SIG_DFL)\n" + WRITER
    reading, writing = os.pipe()
    with target(body, tmp_path, stdout=writing) as writer:
        os.close(writing)
        taken(writer, images)
        os.close(reading)
        restore(the_criu(), images, RestoreOptions(), 60)
        os.kill(writer.pid, signal.SIGUSR1)
        wait_until(lambda: not writer.lives(), "it ends of SIGPIPE")


SERVED = """
connection = socket.socket(fileno=int(sys.argv[2]))
reading = int(sys.argv[3])
while True:
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    try:
        os.write(1, b"x")
        connection.send(b"?")
        answer = connection.recv(100), os.read(reading, 100)
    except BrokenPipeError:
        answer = b"", os.read(reading, 100)
    tell(answer)
    wait()
"""


def test_stand_ins_for_all_that_is_gone(tmp_path: Path, images: str) -> None:
    ours, theirs = socket.socketpair()
    own_reading, writing = os.pipe()
    reading, own_writing = os.pipe()
    os.write(own_writing, b"in")
    ours.send(b"hello")
    arguments = (str(theirs.fileno()), str(reading))
    with target(SERVED, tmp_path, *arguments, stdout=writing, pass_fds=(theirs.fileno(), reading)) as one:
        assert one.said() == str((b"hello", b"in"))
        tree = tree_of(one.pid)
        needed = [each for each in found(tree) if each.needed]
        assert sorted(each.kind for each in needed) == ["pipe", "pipe", "socket"]
        options = options_for(tree)
        dump(the_criu(), one.pid, images, options, 60)
        one.process.wait(30)
        for fd in (own_reading, writing, reading, own_writing):
            os.close(fd)
        ours.close()
        theirs.close()
        with stand_ins(needed) as pairs:
            restore(the_criu(), images, replace(restore_options_of(options), inherit=pairs), 60)
        assert one.ask() == str((b"", b""))


TALKER = """
child_end, own_end = socket.socketpair()
reading, writing = os.pipe()
master, slave = os.openpty()
if os.fork() == 0:
    own_end.close()
    os.close(writing)
    while child_end.recv(1):
        child_end.send(os.read(reading, 1) + os.read(slave, 1))
    os._exit(0)
child_end.close()
os.close(reading)
os.set_blocking(master, True)
import tty
tty.setraw(slave)
while True:
    os.write(writing, b"p")
    os.write(master, b"t")
    own_end.send(b"?")
    tell(own_end.recv(2).decode())
    wait()
"""


def test_what_a_tree_has_between_its_processes_is_no_attachment(tmp_path: Path, images: str) -> None:
    with target(TALKER, tmp_path) as talker:
        assert talker.said() == "pt"
        tree = tree_of(talker.pid)
        assert len(tree) == 2
        assert not found(tree)
        options = options_for(tree)
        dump(the_criu(), talker.pid, images, options, 60)
        talker.process.wait(30)
        restore(the_criu(), images, restore_options_of(options), 60)
        assert talker.ask() == "pt"
        child = tree_of(talker.pid)[1].pid
    wait_until(lambda: not os.path.exists(f"/proc/{child}/exe"), "the child ends with its parent")


@pytest.mark.alone
def test_a_mount_namespace_of_its_own(tmp_path: Path, images: str) -> None:
    """Its mounts are those of the outside, taken from there; its standard input was opened outside."""
    reader = """
mapped = mmap.mmap(os.open(sys.argv[2], os.O_RDONLY), 0, prot=mmap.PROT_READ)
while True:
    tell(mapped[:].decode() + " " + os.readlink("/proc/self/ns/mnt"))
    wait()
"""
    shared = tmp_path / "shared"
    shared.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "weights", str(shared)], check=True)
    try:
        (shared / "weights").write_text("bytes")
        with target(reader, tmp_path, str(shared / "weights"), prefix=("unshare", "--mount")) as inside:
            before = inside.said()
            tree = tree_of(inside.pid)
            attachments = found(tree)
            assert {one.path for one in attachments} == {"/dev/null"}
            options = options_for(tree)
            dump(the_criu(), inside.pid, images, options, 60)
            inside.process.wait(30)
            null = os.open("/dev/null", os.O_RDWR)
            inherit = tuple((null, one.resource) for one in attachments)
            restore(the_criu(), images, replace(restore_options_of(options), inherit=inherit), 60)
            os.close(null)
            after = inside.ask()
            assert before.split()[0] == after.split()[0] == "bytes"
            assert after.split()[1] != os.readlink("/proc/self/ns/mnt")
    finally:
        subprocess.run(["umount", "--lazy", str(shared)], check=True)
