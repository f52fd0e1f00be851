"""What the preflight says of real processes, held against what CRIU does with them."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from checkpoint.criu import Criu, dump, options_for, restore, restore_options_of
from checkpoint.errors import CriuError, RetryError, TargetError
from checkpoint.findings import Finding
from checkpoint.preflight import examine
from checkpoint.processes import tree_of
from tests.helpers.mounting import Mounter, wait_until
from tests.helpers.targets import Target, needs_criu, target, the_criu

pytestmark = needs_criu

DONE = """
tell("there")
wait()
"""
CALL = "import ctypes; libc = ctypes.CDLL(None, use_errno=True)\n"


def examined(one: Target, **options: object) -> list[Finding]:
    return examine(tree_of(one.pid), criu=the_criu(), **options)  # type: ignore[arg-type]


def the_dump(one: Target, images: str) -> None:
    dump(the_criu(), one.pid, images, options_for(tree_of(one.pid)), 60)


FATAL = [
    ("io-uring", CALL + "fd = libc.syscall(425, 8, (ctypes.c_char * 120)()); assert fd >= 0", "descriptor 3"),
    ("kernel-object", CALL + "fd = libc.syscall(323, 0); assert fd >= 0", "userfaultfd"),
    ("kernel-object", CALL + "fd = libc.syscall(444, bytes([1] + [0] * 7), 8, 0); assert fd >= 0", "landlock"),
    ("device", "fd = os.open('/dev/fuse', os.O_RDWR)", "descriptor 3 is /dev/fuse"),
    ("pidfd", "fd = os.pidfd_open(os.getppid())", f"pidfd of process {os.getpid()}"),
    ("socket", "held = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)", "AF_VSOCK"),
    (
        "sysv-shm",
        CALL + "shared = libc.shmget(0, 4096, 0o1600); libc.shmat.restype = ctypes.c_void_p\n"
        "libc.shmat(shared, None, 0); libc.shmctl(shared, 0, None)",
        "System V shared memory",
    ),
    (
        "secret-memory",
        CALL + "fd = libc.syscall(447, 0); assert fd >= 0; os.ftruncate(fd, 4096)\n"
        "mapped = mmap.mmap(fd, 4096); os.close(fd)",
        "secret memory",
    ),
]


@pytest.mark.parametrize(("code", "body", "told"), FATAL, ids=[f"{each[0]}-{n}" for n, each in enumerate(FATAL)])
def test_what_is_fatal_is_what_criu_refuses(tmp_path: Path, images: str, code: str, body: str, told: str) -> None:
    with target(body + DONE, tmp_path) as one:
        if not came_up(one):
            pytest.skip(f"this machine lacks what the program needs for {told}")
        fatal = [each for each in examined(one) if each.fatal]
        assert {each.code for each in fatal} == {code}
        assert told in fatal[0].what
        assert all((each.pid, bool(each.why), bool(each.mend)) == (one.pid, True, True) for each in fatal)
        with pytest.raises(TargetError):
            the_dump(one, images)
        assert one.lives(), "the target goes on"


def came_up(one: Target) -> bool:
    with contextlib.suppress(AssertionError):
        wait_until(lambda: os.path.exists(one.told) or one.process.poll() is not None, "it is there")
    return os.path.exists(one.told)


NOTED = [
    ("file-written", "held = open(told + '.log', 'w')", "descriptor 3 writes"),
    ("unlinked-large", "held = open(told + '.big', 'w+b'); held.truncate(80 << 20); os.unlink(held.name)", "80 MiB"),
]
FINE = [
    "held = open(told + '.log', 'a')",
    "held = os.eventfd(0), os.memfd_create('x'), os.pipe(), open('/dev/urandom', 'rb'), os.pidfd_open(os.getpid())",
    "held = socket.create_server(('127.0.0.1', 0))",
    "held = socket.socketpair()",
    "held = open(told + '.gone', 'w+b'); os.unlink(held.name)",
    "held = mmap.mmap(-1, 1 << 20)",
    "held = threading.Thread(target=time.sleep, args=(60,), daemon=True); held.start()",
    "import fcntl; held = open(told + '.lock', 'a'); fcntl.flock(held, fcntl.LOCK_EX)",
]


@pytest.mark.parametrize(("code", "body", "told"), NOTED, ids=[each[0] for each in NOTED])
def test_what_is_noted_does_not_stop_a_dump(tmp_path: Path, images: str, code: str, body: str, told: str) -> None:
    with target(body + DONE, tmp_path) as one:
        one.said()
        findings = examined(one)
        assert [each.code for each in findings] == [code]
        assert told in findings[0].what
        the_dump(one, images)
        one.process.wait(30)


@pytest.mark.parametrize("body", FINE)
def test_of_what_is_fine_nothing_is_said(tmp_path: Path, images: str, body: str) -> None:
    with target(body + DONE, tmp_path) as one:
        one.said()
        assert not examined(one)
        the_dump(one, images)
        one.process.wait(30)


def test_connections_out_of_the_tree(tmp_path: Path, images: str) -> None:
    server = "listener = socket.create_server(('127.0.0.1', 0))\ntell(listener.getsockname()[1])\n"
    accept = "wait()\nheld, _ = listener.accept()\ntell('accepted')\nwait()\n"
    with target(server + accept, tmp_path) as one:
        port = int(one.said())
        with socket.create_connection(("127.0.0.1", port)) as client:
            (pending,) = examined(one)
            assert (pending.code, pending.fatal) == ("tcp-pending", False)
            assert f"1 clients of 127.0.0.1:{port}" in pending.what
            assert one.ask() == "accepted"
            (peer,) = examined(one)
            assert (peer.code, peer.fatal) == ("tcp-peer", False)
            assert f"127.0.0.1:{port} to 127.0.0.1:{client.getsockname()[1]}" in peer.what
            options = options_for(tree_of(one.pid))
            assert (options.tcp_close, options.tcp_established) == (True, False)
            the_dump(one, images)
            one.process.wait(30)


def test_a_connection_within_the_tree_is_kept(tmp_path: Path, images: str) -> None:
    body = """
listener = socket.create_server(("127.0.0.1", 0))
here = socket.create_connection(listener.getsockname())
there, _ = listener.accept()
while True:
    here.send(b"kept")
    tell(there.recv(100).decode())
    wait()
"""
    with target(body, tmp_path) as one:
        assert one.said() == "kept"
        assert not examined(one)
        options = options_for(tree_of(one.pid))
        assert (options.tcp_close, options.tcp_established) == (False, True)
        dump(the_criu(), one.pid, images, options, 60)
        one.process.wait(30)
        restore(the_criu(), images, restore_options_of(options), 60)
        assert one.ask() == "kept"


def test_pipes_terminals_and_unix_sockets_to_the_outside(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    ours, theirs = socket.socketpair()
    master, slave = os.openpty()
    try:
        with target(DONE, tmp_path, stdout=writing, pass_fds=(theirs.fileno(), slave)) as one:
            one.said()
            found = {each.code: each for each in examined(one)}
            assert set(found) == {"pipe", "unix-peer", "terminal"}
            assert [code for code, each in found.items() if each.fatal] == ["terminal"]
            assert found["pipe"].what.startswith("descriptor 1 ")
            assert found["terminal"].what.startswith(f"descriptor {slave} is the terminal /dev/pts/")
    finally:
        for fd in (reading, writing, master, slave):
            os.close(fd)
        ours.close()
        theirs.close()


def test_weights_that_were_replaced(mounter: Mounter, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "weights").write_bytes(bytes(1 << 20))
    mount = mounter(str(source))
    body = "held = mmap.mmap(os.open(sys.argv[2], os.O_RDONLY), 0, prot=mmap.PROT_READ)\nassert held[0] == 0"
    with target(body + DONE, tmp_path, mount.path("weights")) as one:
        one.said()
        assert not examined(one, weights_roots=[mount.mountpoint])
        (source / "next").write_bytes(bytes(1 << 20))
        os.rename(source / "next", source / "weights")
        fatal = wait_until(
            lambda: [each for each in examined(one, weights_roots=[mount.mountpoint]) if each.fatal],
            "the mount shows the new file",
        )
        assert {each.code for each in fatal} <= {"weights-unlinked", "hidden"}
        assert mount.path("weights") in fatal[0].what


def test_a_file_hidden_by_a_mount(tmp_path: Path, images: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_text("below")
    with target("held = open(sys.argv[2])" + DONE, tmp_path, str(folder / "file")) as one:
        one.said()
        subprocess.run(["mount", "-t", "tmpfs", "cover", str(folder)], check=True)
        try:
            (folder / "file").write_text("above")
            (finding,) = [each for each in examined(one) if each.fatal]
            assert finding.code == "hidden"
            with pytest.raises(TargetError):
                the_dump(one, images)
        finally:
            subprocess.run(["umount", str(folder)], check=True)


TRACER = """
import ctypes, sys, time
assert ctypes.CDLL(None).ptrace(0x4206, int(sys.argv[1]), 0, 0) == 0
print("traced", flush=True)
time.sleep(60)
"""


def test_a_traced_process(tmp_path: Path, images: str) -> None:
    with target(DONE, tmp_path) as one, ExitStack() as stack:
        one.said()
        command = [sys.executable, "-c", TRACER, str(one.pid)]
        tracer = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        stack.callback(tracer.kill)
        assert tracer.stdout is not None
        assert tracer.stdout.readline() == "traced\n"
        (finding,) = examined(one)
        assert (finding.code, finding.fatal) == ("traced", True)
        assert str(tracer.pid) in finding.what
        with pytest.raises((TargetError, RetryError)):
            the_dump(one, images)


def test_itself() -> None:
    assert "self" in {each.code for each in examine(tree_of(os.getpid())) if each.fatal}


def test_one_that_has_ended() -> None:
    with subprocess.Popen(["true"]) as ended:
        wait_until(lambda: tree_of(ended.pid)[0].has_ended, "it ends")
        assert [each.code for each in examine(tree_of(ended.pid))] == ["ended"]


def test_a_criu_too_old_for_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightfs.linux.kernel_version", lambda: (6, 16))
    with target("held = socket.create_server(('127.0.0.1', 0))" + DONE, tmp_path) as one:
        one.said()
        old = Criu(path="criu", version=(4, 1, 1), libdir="/nowhere")
        (finding,) = examine(tree_of(one.pid), criu=old)
        assert (finding.code, finding.fatal) == ("criu-sockets", True)


def test_no_room_for_the_images(tmp_path: Path, images: str) -> None:
    with target("ballast = bytearray(os.urandom(1 << 20)) * 100" + DONE, tmp_path) as one, small(tmp_path) as folder:
        one.said()
        (finding,) = examined(one, store=folder)
        assert (finding.code, finding.fatal) == ("store-space", True)
        assert not examined(one, store=str(tmp_path))
        with pytest.raises(CriuError, match="no space is left"):
            the_dump(one, folder)
        assert one.lives()
        (memory,) = examined(one, gpu_bytes=1 << 50)
        assert (memory.code, memory.fatal) == ("memory", True)


@contextmanager
def small(tmp_path: Path) -> Iterator[str]:
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "small", str(folder)], check=True)
    try:
        yield str(folder)
    finally:
        subprocess.run(["umount", str(folder)], check=True)
