"""Logs of real failures of CRIU 4.1.1 and 4.2.1, shortened to what stands around the complaint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import pytest

from checkpoint.criu_command import Command
from checkpoint.criu_log import explain
from checkpoint.errors import (
    CheckpointError,
    CorruptError,
    CriuError,
    MisfitError,
    PidTakenError,
    RetryError,
    TargetError,
)

LOGS = Path(__file__).parent / "criu_logs"

CASES: list[tuple[str, type[CheckpointError], str | None, str]] = [
    (
        "dump/bpf_map",
        TargetError,
        None,
        "process 24045 has anon_inode:bpf-map open as descriptor 3, which can't be dumped",
    ),
    (
        "dump/detached_mount",
        TargetError,
        "/f",
        "process 24328 has this open as descriptor 3, on a mount that it can't see (any more)",
    ),
    ("dump/enospc", CriuError, None, "no space is left for the images"),
    ("dump/fuse_dev", TargetError, None, "process 23991 has chr 10:229 open as descriptor 3, which can't be dumped"),
    (
        "dump/ghost_big",
        TargetError,
        "/srv/run/gb",
        "process 23587 uses this file of 3145728 bytes, whose name is gone: too large to be copied into a snapshot",
    ),
    (
        "dump/ghost_mapped",
        TargetError,
        "/srv/run/gm",
        "process 23605 uses this file of 3145728 bytes, whose name is gone: too large to be copied into a snapshot",
    ),
    (
        "dump/hidden",
        TargetError,
        None,
        "process 18539 uses /srv/run/hidden/m/sub/f, and another file is found under that name, which replaced it or "
        "hides it",
    ),
    ("dump/io_uring", TargetError, None, "process 28043 has an io_uring open, which can't be dumped"),
    (
        "dump/link_remap",
        TargetError,
        "/srv/run/lr",
        "process 23624 uses a file whose name is gone, or hidden by a mount",
    ),
    ("dump/locks", TargetError, None, "a file lock is held"),
    ("dump/memfd_secret", TargetError, "/secretmem (deleted)", "process 24096 has this mapped, which can't be dumped"),
    (
        "dump/ns_mount",
        TargetError,
        "/dev/null",
        "process 24372 has this open as descriptor 0, on a mount that it can't see (any more)",
    ),
    ("dump/ns_net", MisfitError, None, "CRIU needs the program iptables-restore to stop connections"),
    (
        "dump/ns_pid",
        TargetError,
        None,
        "process 24409 is in a pid namespace, and its session's leader is outside of that",
    ),
    (
        "dump/overmounted",
        TargetError,
        "/srv/run/overmounted/m/sub/f",
        "process 24352 uses a file whose name is gone, or hidden by a mount",
    ),
    (
        "dump/perf_event",
        TargetError,
        None,
        "process 23848 has anon_inode:[perf_event] open as descriptor 3, which can't be dumped",
    ),
    ("dump/pidfd", TargetError, None, "process 28071 has a pidfd of process 28026 open, which is not in the tree"),
    ("dump/ptraced", TargetError, None, "process 24209 is traced by a debugger, or has ended"),
    ("dump/self", TargetError, None, "the process that asks for the snapshot is in the tree itself"),
    ("dump/shell_job", TargetError, None, "process 23732 is in the session of another process"),
    (
        "dump/sysv_shm",
        TargetError,
        None,
        "process 24118 has System V shared memory mapped at 0x7fa820e76000, which others may share",
    ),
    ("dump/tcp_established", TargetError, None, "process 27874 has a TCP connection"),
    ("dump/tcp_established_allowed", MisfitError, None, "CRIU needs the program iptables to stop connections"),
    (
        "dump/tcp_listen_by_4.1",
        MisfitError,
        None,
        "this CRIU can dump no TCP or UDP socket on Linux 6.16 or later; 4.2 can",
    ),
    ("dump/tcp_listen_pending", RetryError, None, "a client has connected to process 27938 and was not accepted yet"),
    ("dump/thread_id", CriuError, None, "CRIU could not dump the process: BUG at criu/pstree.c:480"),
    (
        "dump/tty_external",
        TargetError,
        None,
        "the terminal /dev/pts/0 is in use, whose other end is outside of the tree",
    ),
    ("dump/unix_stream_external", TargetError, None, "the other end of a Unix socket is outside of the tree"),
    (
        "dump/unix_stream_external_allowed",
        TargetError,
        None,
        "a Unix connection leads to a process outside of the tree",
    ),
    (
        "dump/userfaultfd",
        TargetError,
        None,
        "process 23830 has anon_inode:[userfaultfd] open as descriptor 3, which can't be dumped",
    ),
    ("dump/vsock", TargetError, None, "process 27980 has a socket of family 40 open, which can't be dumped"),
    (
        "restore/cwd",
        MisfitError,
        "/srv/run/r_cwd/d",
        "the process had it as its working folder, and it can't be opened now: No such file or directory",
    ),
    (
        "restore/exe_other",
        CorruptError,
        "/srv/run/r_exe_other/sl",
        "has 44016 bytes, and had 43888 when the snapshot was taken; the process had it mapped",
    ),
    (
        "restore/fifo",
        MisfitError,
        "/srv/run/r_fifo/fifo",
        "the process had it open as descriptor 3, and it can't be opened now: No such file or directory",
    ),
    (
        "restore/image_files_missing",
        CriuError,
        None,
        "CRIU could not restore the process: 29637 killed by signal 11: Segmentation fault",
    ),
    ("restore/image_garbage", CorruptError, None, "the images are damaged"),
    ("restore/image_missing", CorruptError, None, "the images are damaged"),
    (
        "restore/log_grown",
        CorruptError,
        "/srv/run/r_log_grown/log",
        "has 15 bytes, and had 8 when the snapshot was taken; the process had it open as descriptor 1",
    ),
    (
        "restore/map_size",
        CorruptError,
        "/srv/run/r_map_size/data",
        "has 10000 bytes, and had 9999 when the snapshot was taken; the process had it open as descriptor 4",
    ),
    (
        "restore/missing",
        MisfitError,
        "/srv/run/r_missing/data",
        "the process had it open as descriptor 3, and it can't be opened now: No such file or directory",
    ),
    (
        "restore/mode",
        MisfitError,
        "/srv/run/r_mode/data",
        "has mode 0100400, and had 0100644 when the snapshot was taken",
    ),
    ("restore/pages_missing", CorruptError, None, "the images are damaged"),
    ("restore/port", RetryError, None, "the address 127.0.0.1 port 43639 can't be had: Address already in use"),
    ("restore/tty", MisfitError, None, "the process was on a terminal, and there is none for it here"),
    ("restore/tty_to_file", MisfitError, None, "the process was on a terminal, and there is none for it here"),
    ("restore/unix_abstract", RetryError, None, "another process listens on the Unix socket of this one"),
    ("restore/unix_gone", MisfitError, None, "a Unix socket can't be connected again: No such file or directory"),
]


@pytest.mark.parametrize(("log", "kind", "path", "message"), CASES, ids=[case[0] for case in CASES])
def test_what_a_log_stands_for(log: str, kind: type[CheckpointError], path: str | None, message: str) -> None:
    command = cast(Command, log.split("/")[0])
    error = explain((LOGS / f"{log}.log").read_text(), command)
    assert type(error) is kind
    assert (error.path, error.message) == (path, message)
    if "could not" not in message:
        assert error.mend, "whoever reads it is told what to do"


def test_every_log_is_expected() -> None:
    there = {
        f"{command}/{name.removesuffix('.log')}" for command in os.listdir(LOGS) for name in os.listdir(LOGS / command)
    }
    assert there == {case[0] for case in CASES}


def test_a_taken_pid_is_named() -> None:
    error = explain("(00.039171) Error (criu/cr-restore.c:1230): Can't fork for 5575: File exists\n", "restore")
    assert isinstance(error, PidTakenError)
    assert (error.pid, error.exit_code) == (5575, 75)


@pytest.mark.parametrize(
    "log", ["", "nothing of note\n", "(00.1) Error (criu/util.c:1533): rlimit: Can't setup RLIMIT_NOFILE\n"]
)
def test_a_log_without_a_complaint(log: str) -> None:
    error = explain(log, "restore")
    assert type(error) is CriuError
    assert error.message == "CRIU could not restore the process"


def test_an_unknown_complaint_is_passed_on() -> None:
    error = explain("(00.1) Error (criu/new.c:1): new: What nobody has seen before\n", "dump")
    assert error.message.endswith(": new: What nobody has seen before")
    assert isinstance(error, CriuError)
    assert "What nobody has seen" in error.log


def test_what_is_no_failure_is_not_named_as_one() -> None:
    """In a container without /dev/net/tun and CAP_SYS_TIME."""
    log = (
        "(00.012698) Error (criu/tun.c:85): tun: Unable to create tun: No such file or directory\n"
        "(00.057514)   1196: Error (criu/timens.c:101): Unable to set a monotonic clock offset: EPERM\n"
        "(00.058192) Error (criu/cr-restore.c:2331): Restoring FAILED.\n"
    )
    assert "monotonic clock offset" in explain(log, "restore").message
