"""What is read from /proc: from folders that stand in for it, and of this process."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from checkpoint.errors import TargetError
from checkpoint.processes import family, mapping, namespaces_of, start_ticks, tree_of
from checkpoint.sockets import outside_peers, parse_inet, sockets_of

STAT = "{pid} ({comm}) {state} {ppid} {pid} {session} 34816 -1 4194304 0 0 0 0 0 0 0 0 20 0 {threads} 0 {start} 0 0"


class Tree:
    """A folder that looks like /proc."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(self, pid: int, *, ppid: int = 1, comm: str = "server", state: str = "S", children: str = "") -> Path:
        folder = self.root / str(pid)
        for name in ("fd", "fdinfo", "ns", f"task/{pid}"):
            (folder / name).mkdir(parents=True)
        stat = STAT.format(pid=pid, comm=comm, state=state, ppid=ppid, session=pid, threads=3, start=1234)
        (folder / "stat").write_text(stat)
        (folder / "status").write_text(f"Name:\t{comm}\nTgid:\t{pid}\n")
        (folder / f"task/{pid}/children").write_text(children)
        (folder / "cmdline").write_bytes(b"server\0--port\0" + b"80\0")
        (folder / "maps").write_text("")
        (folder / "mountinfo").write_text("30 1 8:1 / / rw - ext4 /dev/sda rw\n31 30 0:5 / /dev rw - devtmpfs d rw\n")
        for name, target in (("exe", "/usr/bin/server (deleted)"), ("cwd", "/srv"), ("root", "/")):
            (folder / name).symlink_to(target)
        (folder / "ns/mnt").symlink_to("mnt:[4026531841]")
        (folder / "ns/pid_for_children").symlink_to("pid:[4026531836]")
        return folder

    def open(self, folder: Path, fd: int, target: str, info: str = "") -> None:
        (folder / f"fd/{fd}").symlink_to(target)
        (folder / f"fdinfo/{fd}").write_text(info)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "proc")


def test_parents_come_before_children(tree: Tree) -> None:
    tree.add(10, children="12 11 ")
    tree.add(11, ppid=10)
    tree.add(12, ppid=10, children="13")
    tree.add(13, ppid=12, state="Z")
    found = tree_of(10, proc=str(tree.root))
    assert [one.pid for one in found] == [10, 11, 12, 13]
    assert [one.has_ended for one in found] == [False, False, False, True]
    root = found[0]
    assert (root.comm, root.session, root.threads, root.start_ticks) == ("server", 10, 3, 1234)
    assert (root.exe, root.cwd, root.root) == ("/usr/bin/server", "/srv", "/")
    assert root.cmdline == ("server", "--port", "80")
    assert root.namespaces == {"mnt": 4026531841}
    assert root.mounts == {30, 31}


def test_a_family_is_known_without_reading_its_memory(tree: Tree) -> None:
    for pid, children in ((10, "12 11 "), (11, ""), (12, "13 14")):
        os.unlink(tree.add(pid, children=children) / "cmdline")
    tree.add(13, state="Z")
    assert family(10, proc=str(tree.root)) == [(10, 1234), (11, 1234), (12, 1234), (13, 1234)]
    assert not family(99, proc=str(tree.root))


def test_a_name_may_hold_what_it_likes(tree: Tree) -> None:
    tree.add(10, comm="a) R 7 (b")
    assert tree_of(10, proc=str(tree.root))[0].comm == "a) R 7 (b"


def test_a_child_that_ends_meanwhile_is_left_out(tree: Tree) -> None:
    tree.add(10, children="11 12")
    tree.add(12, ppid=10)
    assert [one.pid for one in tree_of(10, proc=str(tree.root))] == [10, 12]


def test_no_such_process(tree: Tree) -> None:
    with pytest.raises(TargetError, match="no process 10"):
        tree_of(10, proc=str(tree.root))
    assert start_ticks(10, proc=str(tree.root)) is None


def test_a_thread_is_no_process() -> None:
    number: list[int] = []
    go_on, is_there = threading.Event(), threading.Event()

    def run() -> None:
        number.append(threading.get_native_id())
        is_there.set()
        go_on.wait(10)

    thread = threading.Thread(target=run)
    thread.start()
    is_there.wait(10)
    with pytest.raises(TargetError, match=f"is a thread of process {os.getpid()}"):
        tree_of(number[0])
    go_on.set()
    thread.join()


def test_descriptors(tree: Tree) -> None:
    folder = tree.add(10)
    info = "pos:\t7\nflags:\t0102001\nmnt_id:\t27\nino:\t99\nlock:\t1: FLOCK  ADVISORY  WRITE 10 fe:00:99 0 EOF\n"
    tree.open(folder, 1, "/var/log/server (deleted)", info)
    tree.open(folder, 3, "socket:[1234]", "pos:\t0\nflags:\t02\nmnt_id:\t9\n")
    tree.open(folder, 4, "anon_inode:[io_uring]")
    tree.open(folder, 5, "/memfd:shared (deleted)")
    tree.open(folder, 6, "pipe:[88]")
    tree.open(folder, 7, "/dev/pts/3", "flags:\t02\ntty-index:\t3\n")
    found = {one.fd: one for one in tree_of(10, proc=str(tree.root))[0].descriptors}
    assert [found[fd].kind for fd in sorted(found)] == ["file", "socket", "anon", "memfd", "pipe", "tty"]
    log = found[1]
    assert (log.target, log.is_deleted, log.mount_id, log.inode) == ("/var/log/server", True, 27, 99)
    assert log.can_write
    assert log.flags & os.O_APPEND
    assert len(log.locks) == 1
    assert found[3].inode == 1234
    assert not found[5].is_deleted
    assert found[7].pty == 3


def test_mappings() -> None:
    file = mapping("7f00-8000 r-xp 00001000 fe:01 77                         /opt/a b\\012c (deleted)")
    assert (file.start, file.end, file.offset, file.inode) == (0x7F00, 0x8000, 0x1000, 77)
    assert (file.path, file.is_deleted, file.is_file, file.device) == ("/opt/a b\nc", True, True, os.makedev(0xFE, 1))
    assert file.nbytes == 0x100
    plain = mapping("7f00-8000 rw-p 00000000 00:00 0 ")
    assert (plain.path, plain.is_file) == ("", False)
    shared = mapping("7f00-8000 rw-s 00000000 00:01 5                          /memfd:x (deleted)")
    assert (shared.is_memory, shared.is_file, shared.is_deleted) == (True, False, False)


def test_this_process() -> None:
    (me, *_) = tree_of(os.getpid())
    assert me.pid == os.getpid()
    assert me.namespaces == namespaces_of("self")
    assert me.start_ticks == start_ticks(os.getpid())
    assert any(one.is_file and one.path == me.exe for one in me.mappings)


TCP = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 50 1 0 100 0 0 10 0
   1: 0100007F:1F90 0100007F:C001 01 00000000:00000000 00:00000000 00000000     0        0 0 1 0 20 4 30 10 -1
   2: 0100007F:0050 0100007F:C002 01 00000000:00000000 00:00000000 00000000     0        0 0 1 0 20 4 30 10 -1
   3: 0100007F:C003 0100007F:1F90 08 00000000:00000000 00:00000000 00000000     0        0 51 1 0 20 4 30 10 -1
"""
TCP6 = """\
  sl  local_address                         remote_address                        st tx tr tm retr uid timeout inode
   0: 00000000000000000000000001000000:1F90 00000000000000000000000000000000:0000 0A 0:0 0:0 0 0 0 60 1 0 0 0 0
   1: 0000000000000000FFFF00000100007F:1F90 0000000000000000FFFF00000100007F:C003 01 0:0 0:0 0 0 0 61 1 0 0 0 0
"""


def test_tables_of_tcp() -> None:
    listening, closing = parse_inet(TCP, "tcp")
    assert (listening.inode, listening.state, listening.local, listening.pending) == (
        50,
        "listening",
        "0.0.0.0:8080",
        1,
    )
    assert (closing.state, closing.local, closing.remote) == ("established", "127.0.0.1:49155", "127.0.0.1:8080")
    listening, connected = parse_inet(TCP6, "tcp")
    assert listening.local == "[::1]:8080"
    assert connected.local == "127.0.0.1:8080", "both ends of a connection are written alike"


def test_sockets_of_this_process() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as unbound,
    ):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            processes = tree_of(os.getpid())[:1]
            found = sockets_of(processes)
            inodes = {each: os.fstat(each.fileno()).st_ino for each in (server, client, unbound, ours, theirs)}
            assert found[inodes[server]].pending == 1
            assert found[inodes[server]].protocol == "TCP"
            assert found[inodes[client]].remote == "{}:{}".format(*server.getsockname())
            assert (found[inodes[ours]].peer, found[inodes[ours]].type) == (inodes[theirs], "stream")
            assert found[inodes[unbound]].peer == 0
            outside = {one.inode for one in outside_peers(processes, found)}
            assert inodes[client] in outside, "it waits to be accepted, so nobody has the other end"
            assert inodes[ours] not in outside
