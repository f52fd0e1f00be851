"""What CRIU is asked, for trees that stand in for real ones."""

from __future__ import annotations

import os

import pytest

from checkpoint.attachments import attachments_of
from checkpoint.criu_command import (
    GHOST_LIMIT_BYTES,
    OWN_MOUNTS,
    Criu,
    DumpOptions,
    RestoreOptions,
    dump_argv,
    options_for,
    restore_argv,
    restore_options_of,
)
from checkpoint.processes import Descriptor, Mapping, Process, namespaces_of
from checkpoint.sockets import Socket

CRIU = Criu(path="/opt/criu", version=(4, 2, 1), libdir="/empty")
HERE = namespaces_of("self")


def process(pid: int = 10, *, session: int = 10, **known: object) -> Process:
    return Process(pid=pid, ppid=1, session=session, namespaces=HERE, **known)  # type: ignore[arg-type]


def test_a_dump_names_everything_it_uses() -> None:
    argv = dump_argv(CRIU, 7, "/images", DumpOptions(), work="/work")
    assert argv[:2] == ["/opt/criu", "dump"]
    text = " ".join(argv)
    for part in (
        "--tree 7",
        "--images-dir /images",
        "--work-dir /work",
        "--libdir /empty",
        "--no-default-config",
        "--manage-cgroups=ignore",
        "--log-file dump.log",
    ):
        assert part in text
    for switch in ("--shell-job", "--link-remap", "--tcp", "--ext-unix-sk", "--file-locks", "--leave-running"):
        assert switch not in text


@pytest.mark.parametrize(
    ("name", "switch"),
    [
        ("shell_job", "--shell-job"),
        ("link_remap", "--link-remap"),
        ("file_locks", "--file-locks"),
        ("ext_unix_sk", "--ext-unix-sk"),
        ("tcp_established", "--tcp-established"),
        ("tcp_close", "--tcp-close"),
        ("skip_in_flight", "--skip-in-flight"),
        ("leave_running", "--leave-running"),
    ],
)
def test_each_option_is_a_switch_of_its_own(name: str, switch: str) -> None:
    plain = dump_argv(CRIU, 7, "/images", DumpOptions())
    more = dump_argv(CRIU, 7, "/images", DumpOptions(**{name: True}))  # type: ignore[arg-type]
    assert [one for one in more if one not in plain] == [switch]


def test_a_restore() -> None:
    options = RestoreOptions(
        inherit=((5, "pipe:[77]"), (6, "var/log/server")),
        sibling=True,
        lazy_pages=True,
        leave_stopped=True,
        external=(OWN_MOUNTS,),
        root="/",
    )
    text = " ".join(restore_argv(CRIU, "/images", options, work="/work"))
    for part in (
        "restore",
        "--restore-detached",
        "--restore-sibling",
        "--inherit-fd fd[5]:pipe:[77] --inherit-fd fd[6]:var/log/server",
        "--lazy-pages",
        "--leave-stopped",
        f"--external {OWN_MOUNTS}",
        "--root /",
        "--libdir /empty",
    ):
        assert part in text


def test_a_restore_is_told_what_the_dump_was() -> None:
    dumped = DumpOptions(shell_job=True, tcp_close=True, file_locks=True, external=("tty[8800:1a]", OWN_MOUNTS))
    options = restore_options_of(dumped)
    assert (options.shell_job, options.tcp_close, options.file_locks) == (True, True, True)
    assert (options.external, options.root) == ((OWN_MOUNTS,), "/")
    assert restore_options_of(DumpOptions()) == RestoreOptions()


def test_a_plain_tree_needs_nothing() -> None:
    assert options_for([process(), process(11)], {}) == DumpOptions()


def test_a_session_from_outside() -> None:
    assert options_for([process(session=3)], {}).shell_job
    assert not options_for([process(), Process(pid=11, ppid=10, session=3, state="Z", namespaces={})], {}).shell_job


def test_locks_and_files_without_a_name() -> None:
    gone = Descriptor(fd=3, target="/data", kind="file", is_deleted=True, size=5 << 20, locks=("1: FLOCK",))
    options = options_for([process(descriptors=(gone,))], {})
    assert (options.file_locks, options.link_remap, options.ghost_limit_bytes) == (True, True, 5 << 20)
    assert "--ghost-limit" in dump_argv(CRIU, 7, "/images", options)
    huge = Mapping(start=0, end=2 << 30, perms="r--p", offset=0, device=1, inode=2, path="/weights", is_deleted=True)
    assert options_for([process(mappings=(huge,))], {}).ghost_limit_bytes == GHOST_LIMIT_BYTES


@pytest.mark.parametrize(
    ("remote", "established", "close"),
    [("127.0.0.1:9", False, True), ("127.0.0.1:2", True, False)],
)
def test_connections(remote: str, established: bool, close: bool) -> None:
    sockets = {
        1: Socket(inode=1, family="tcp", state="established", local="127.0.0.1:1", remote=remote),
        2: Socket(inode=2, family="tcp", state="established", local="127.0.0.1:2", remote="127.0.0.1:1"),
        3: Socket(inode=3, family="tcp", state="listening", local="127.0.0.1:2"),
    }
    if close:
        del sockets[2]
    held = tuple(Descriptor(fd=n, target=f"socket:[{n}]", inode=n, kind="socket") for n in sockets)
    options = options_for([process(descriptors=held)], sockets)
    assert (options.tcp_established, options.tcp_close) == (established, close)
    assert options.skip_in_flight
    assert options.network_lock is established


def test_traffic_of_another_network_namespace_is_held_back() -> None:
    inside = Process(pid=10, ppid=1, session=10, namespaces=HERE | {"net": 1})
    options = options_for([inside], {})
    assert options.network_lock
    assert "--network-lock nftables" in " ".join(dump_argv(CRIU, 7, "/images", options))


def test_another_mount_namespace() -> None:
    inside = Process(pid=10, ppid=1, session=10, namespaces=HERE | {"mnt": 1})
    assert options_for([inside], {}).external == (OWN_MOUNTS,)


def stdio(fd: int, target: str, kind: str, flags: int = os.O_WRONLY, **known: object) -> Descriptor:
    return Descriptor(fd=fd, target=target, kind=kind, flags=flags, **known)  # type: ignore[arg-type]


def test_what_is_shared_is_one_attachment() -> None:
    pipe = [stdio(1, "pipe:[7]", "pipe", inode=7), stdio(2, "pipe:[7]", "pipe", inode=7)]
    child = process(11, descriptors=tuple(pipe))
    (one,) = attachments_of([process(descriptors=tuple(pipe)), child], {})
    assert one.descriptors == ((10, 1), (10, 2), (11, 1), (11, 2))
    assert (one.resource, one.external, one.can_read, one.can_write) == ("pipe:[7]", None, False, True)
    assert (one.is_stdio, one.needed) == (True, True)


def test_both_ends_of_a_pipe_in_the_tree() -> None:
    ends = (stdio(3, "pipe:[7]", "pipe", os.O_RDONLY), stdio(4, "pipe:[7]", "pipe", os.O_WRONLY))
    assert not attachments_of([process(descriptors=ends)], {})


def test_a_log_has_the_name_that_criu_gives_it() -> None:
    log = stdio(1, "/var/log/server", "file")
    other = stdio(5, "/var/log/other", "file")
    (one,) = attachments_of([process(descriptors=(log, other))], {})
    assert (one.resource, one.external, one.needed) == ("var/log/server", None, False)


def test_terminals() -> None:
    slave = stdio(1, "/dev/pts/4", "tty", device=0x1A, rdev=0x8804, inode=7)
    (one,) = attachments_of([process(descriptors=(slave,))], {})
    assert one.resource == one.external == "tty[8804:1a]"
    master = stdio(5, "/dev/pts/ptmx", "tty", pty=4)
    assert not attachments_of([process(descriptors=(slave, master))], {})


def test_a_file_on_a_mount_that_is_not_seen() -> None:
    null = stdio(0, "/dev/null", "device", mount_id=0x18, inode=3)
    (one,) = attachments_of([process(descriptors=(null,), mounts=frozenset({30, 31}))], {})
    assert one.resource == one.external == "file[18:3]"
    assert not attachments_of([process(descriptors=(null,), mounts=frozenset({0x18}))], {})


@pytest.mark.parametrize(
    ("kind", "peer", "count"), [("stream", 9, 1), ("stream", 2, 0), ("stream", 0, 0), ("dgram", 9, 0)]
)
def test_unix_sockets(kind: str, peer: int, count: int) -> None:
    sockets = {
        1: Socket(inode=1, family="unix", type=kind, peer=peer),
        2: Socket(inode=2, family="unix", type=kind, peer=1 if peer == 2 else 0),
    }
    held = tuple(Descriptor(fd=n, target=f"socket:[{n}]", inode=n, kind="socket") for n in sockets)
    found = attachments_of([process(descriptors=held)], sockets)
    assert [(one.resource, one.external) for one in found] == [("socket:[1]", "unix[1]")][:count]
