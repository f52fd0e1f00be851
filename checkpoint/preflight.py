"""Whether a process tree can be dumped and restored, found out before anything is done to it.

Each finding says what to change. What is fatal was tried with CRIU 4.1.1 and 4.2.1: a dump of it fails, or every
restore does. The rest is what a snapshot changes: connections that will be closed, output that goes elsewhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

from checkpoint.attachments import Attachment, attachments_of, is_unseen
from checkpoint.criu_command import GHOST_LIMIT_BYTES, Criu
from checkpoint.findings import Finding
from checkpoint.preflight_gpu import gpu_findings, is_gpu_device
from checkpoint.preflight_memory import memory_findings
from checkpoint.processes import PROC, Descriptor, Process, namespaces_of
from checkpoint.processes import Mapping as Mapped
from checkpoint.sockets import Socket, outside_peers, sockets_of

_SECRET: Final = "/secretmem"
_NOBODY_ELSE: Final = "nobody but the process can read it"
_KNOWN_ANON: Final = frozenset({"eventfd", "eventpoll", "signalfd", "timerfd", "inotify", "fanotify", "pidfd"})
_ANON: Final = re.compile(r"anon_inode:\[?([^\]]*)\]?")
_MEMORY_DEVICES: Final = 1
_TUN: Final = (10, 200)
_KNOWN_PROTOCOLS: Final = ("TCP", "UDP", "RAW", "UNIX", "NETLINK", "PACKET", "PING")
_LARGE_GHOST_BYTES: Final = 64 << 20

LOG_WRITTEN: Final = "log-written"
"""Of the process's own output, which leads elsewhere after a restore by `snapshot run`."""

_START_ANEW: Final = "start the program anew, so that it uses the files that are there"


def examine(
    processes: Sequence[Process],
    *,
    criu: Criu | None = None,
    sockets: Mapping[int, Socket] | None = None,
    weights_roots: Iterable[str] = (),
    store: str | None = None,
    gpu_bytes: int = 0,
    in_memory: bool = False,
    proc: str = PROC,
) -> list[Finding]:
    """Everything that stands in the way of a snapshot of a tree, the fatal first.

    Args:
        processes: the whole tree, root first.
        criu: what is to dump it; without, nothing is said of what a version can't do.
        sockets: of the tree; without, they are looked at now.
        weights_roots: folders below which files are weights, such as mountpoints.
        store: the folder that the images go to; its free space is looked at.
        gpu_bytes: GPU memory that moves to host memory when the GPU state is checkpointed.
        in_memory: CRIU dumps into memory, not into the store.
        proc: where /proc is.
    """
    if sockets is None:
        sockets = sockets_of(processes, proc=proc)
    roots = tuple(os.path.join(root, "") for root in weights_roots)
    running = [one for one in processes if not one.has_ended]
    found = list(_of_the_tree(processes, proc))
    for process in running:
        found += _of_the_process(process, proc)
        for descriptor in process.descriptors:
            found += _of_a_descriptor(process, descriptor, processes, proc)
        found += _of_names(process, roots, proc)
        found += _of_mappings(process)
    found += _of_sockets(running, sockets, criu)
    needed = (one for one in attachments_of(running, sockets) if one.needed and one.path != os.devnull)
    found += [_of_an_attachment(one) for one in needed]
    found += gpu_findings(running, sockets)
    found += memory_findings(running, store=store, gpu_bytes=gpu_bytes, in_memory=in_memory, root=os.path.dirname(proc))
    return sorted(found, key=lambda one: not one.fatal)


def _of_the_tree(processes: Sequence[Process], proc: str) -> Iterator[Finding]:
    root = processes[0]
    if root.has_ended:
        yield _fatal("ended", root.pid, "it has ended", "there is nothing to snapshot", "name a process that runs")
        return
    if os.getpid() in {one.pid for one in processes}:
        what = f"this command, process {os.getpid()}, is one of its children"
        why = "it would be in its own snapshot"
        yield _fatal("self", root.pid, what, why, "take the snapshot from another shell or service")
    if root.namespaces.get("pid") != namespaces_of("self", proc=proc).get("pid") and _pid_inside(root.pid, proc) != 1:
        what = "it is in a pid namespace, and not the first process of that"
        why = "CRIU dumps a pid namespace as a whole"
        yield _fatal("pid-namespace", root.pid, what, why, "name the first process of the container")


def _pid_inside(pid: int, proc: str) -> int:
    """The pid that a process has in its own pid namespace."""
    return int(_status(pid, proc).get("NSpid", str(pid)).split()[-1])


def _status(pid: int, proc: str) -> dict[str, str]:
    try:
        with open(f"{proc}/{pid}/status", encoding="utf-8", errors="surrogateescape") as file:
            return {key: value.strip() for key, _, value in (line.partition(":") for line in file)}
    except (FileNotFoundError, ProcessLookupError):
        return {}


def _of_the_process(process: Process, proc: str) -> Iterator[Finding]:
    tracer = _status(process.pid, proc).get("TracerPid", "0")
    if tracer != "0":
        why = "CRIU needs to trace it, and only one can"
        yield _fatal("traced", process.pid, f"process {tracer} traces it", why, "detach the debugger (strace, gdb)")
    if process.state == "T":
        why = "it would run in a restore, and after this command whatever came of it"
        yield _fatal(
            "stopped", process.pid, "it is stopped", why, f"let it go on (kill -CONT {process.pid}), or end it"
        )
    if process.state == "D":
        yield _note(
            "waits",
            process.pid,
            "it waits for a disk or server and can't be interrupted",
            "the dump has to wait for it, and may time out",
            "see what it waits for (ps -L -o pid,stat,wchan)",
        )


def _of_a_descriptor(process: Process, one: Descriptor, processes: Sequence[Process], proc: str) -> Iterator[Finding]:
    where = f"descriptor {one.fd}"
    if one.kind == "anon":
        name = _ANON.match(one.target)
        what = name[1] if name else one.target
        if what == "io_uring":
            mend = "have the program not use io_uring, or close it before (node: UV_USE_IO_URING=0)"
            yield _fatal("io-uring", process.pid, f"{where} is an io_uring", "CRIU can't dump one", mend)
        elif what == "pidfd":
            yield from _of_a_pidfd(process, one, processes, proc)
        elif what not in _KNOWN_ANON:
            why = "CRIU can't dump what the kernel calls so"
            yield _fatal("kernel-object", process.pid, f"{where} is a {what}", why, "close it before the snapshot")
    elif one.kind == "device" and not _is_known_device(one):
        why = "CRIU can't dump the state of a device"
        yield _fatal("device", process.pid, f"{where} is {one.target}", why, "close it before the snapshot")
    elif one.is_deleted and one.target == _SECRET:
        yield _fatal(
            "secret-memory", process.pid, f"{where} is secret memory", _NOBODY_ELSE, "close it before the snapshot"
        )
    elif one.kind == "file" and one.can_write and not one.is_deleted and is_unseen(process, one):
        what = f"{where} writes {one.target}, on a mount that it can't see"
        why = "CRIU restores it only onto a file of the mode and size that it has at the dump, which no log keeps"
        mend = "have its output go through a pipe, as container runtimes do, or start it by `weightfs snapshot run`"
        yield _fatal("unseen-log", process.pid, what, why, mend)
    elif one.kind == "file" and one.can_write and not one.flags & os.O_APPEND and not one.is_deleted:
        code = "file-written"
        why = "it can be restored only while the file has the size it has at the dump"
        mend = "open it for appending (>> in a shell), or write it elsewhere after the snapshot"
        if one.fd in (1, 2):
            code = LOG_WRITTEN
            why = "a restore appends to it, and while this process goes on, each writes over the other's lines"
            mend = "open it for appending (>> in a shell), or restore with --log"
        yield _note(code, process.pid, f"{where} writes {one.target}", why, mend)


def _of_a_pidfd(process: Process, one: Descriptor, processes: Sequence[Process], proc: str) -> Iterator[Finding]:
    try:
        with open(f"{proc}/{process.pid}/fdinfo/{one.fd}") as file:
            info = dict(line.split(":\t", 1) for line in file.read().splitlines() if ":\t" in line)
    except (FileNotFoundError, ProcessLookupError):
        return
    other = int(info.get("Pid", "-1"))
    if other > 0 and other not in {each.pid for each in processes}:
        what = f"descriptor {one.fd} is a pidfd of process {other}"
        why = "that is not in the tree"
        yield _fatal("pidfd", process.pid, what, why, "close it before the snapshot")


def _is_known_device(one: Descriptor) -> bool:
    number = os.major(one.rdev), os.minor(one.rdev)
    return number[0] == _MEMORY_DEVICES or number == _TUN or is_gpu_device(one.target)


def _of_names(process: Process, roots: tuple[str, ...], proc: str) -> Iterator[Finding]:
    """Files that are not to be found by their names any more; a file is told once, however often it is mapped."""
    told: set[str] = set()
    for path, is_deleted, nbytes, link in _files(process, proc):
        if path in told:
            continue
        if is_deleted:
            told.add(path)
            yield from _of_an_unlinked(process, path, nbytes, roots)
        elif _is_hidden(link, f"{proc}/{process.pid}/root{path}"):
            told.add(path)
            why = "another file is found there now, which a restore would open"
            mend = "umount what hides it, or start the program anew"
            yield _fatal("hidden", process.pid, f"it uses {path}, which was replaced or hidden by a mount", why, mend)


def _files(process: Process, proc: str) -> Iterator[tuple[str, bool, int, str]]:
    """Path, whether its name is gone, size, and the link that leads to the file itself."""
    for one in process.descriptors:
        if one.kind in ("file", "folder"):
            yield one.target, one.is_deleted, one.size, f"{proc}/{process.pid}/fd/{one.fd}"
    for each in process.mappings:
        if each.is_file and not each.path.startswith("/dev/nvidia"):
            link = f"{proc}/{process.pid}/map_files/{each.start:x}-{each.end:x}"
            yield each.path, each.is_deleted, each.offset + each.nbytes, link


def _is_hidden(link: str, path: str) -> bool:
    try:
        used, named = os.stat(link), os.stat(path)
    except OSError:  # gone meanwhile, or not for us to look at: CRIU will say so
        return False
    return (used.st_dev, used.st_ino) != (named.st_dev, named.st_ino)


def _of_an_unlinked(process: Process, path: str, nbytes: int, roots: tuple[str, ...]) -> Iterator[Finding]:
    if path.startswith(roots):
        what = f"it uses the weights {path}, which were removed or replaced"
        yield _fatal("weights-unlinked", process.pid, what, "a restore would not find them", _START_ANEW)
    elif nbytes > GHOST_LIMIT_BYTES:
        what = f"it uses {path} of {nbytes >> 20} MiB, whose name is gone"
        why = f"up to {GHOST_LIMIT_BYTES >> 20} MiB of such a file are copied into a snapshot"
        yield _fatal("unlinked", process.pid, what, why, _START_ANEW)
    elif nbytes > _LARGE_GHOST_BYTES:
        what = f"it uses {path} of {nbytes >> 20} MiB, whose name is gone"
        yield _note("unlinked-large", process.pid, what, "it is copied into the snapshot", _START_ANEW)


def _of_mappings(process: Process) -> Iterator[Finding]:
    told: set[str] = set()
    own_ipc = process.namespaces.get("ipc") != namespaces_of("self").get("ipc")
    for one in process.mappings:
        finding = _of_a_mapping(process, one, own_ipc=own_ipc)
        if finding is not None and finding.what not in told:
            told.add(finding.what)
            yield finding


def _of_a_mapping(process: Process, one: Mapped, *, own_ipc: bool) -> Finding | None:
    at = f"at {one.start:#x}"
    if one.path.startswith("/SYSV") and not own_ipc:
        why = "processes outside may share it"
        mend = "have it use POSIX shared memory (shm_open), or run it in an IPC namespace of its own (unshare --ipc)"
        return _fatal("sysv-shm", process.pid, f"System V shared memory is mapped {at}", why, mend)
    if one.path == _SECRET:
        return _fatal("secret-memory", process.pid, f"secret memory is mapped {at}", _NOBODY_ELSE, "unmap it before")
    if one.path == "anon_inode:[io_uring]":
        mend = "have the program not use io_uring, or unmap it before"
        return _fatal("io-uring", process.pid, f"an io_uring is mapped {at}", "CRIU can't dump one", mend)
    if one.path.startswith("anon_inode:[perf_event]") or (
        one.path.startswith("/dev/")
        and not one.path.startswith(("/dev/shm/", "/dev/zero", "/dev/hugepages/"))
        and not is_gpu_device(one.path)
    ):
        why = "CRIU can't dump memory of a device"
        return _fatal("device", process.pid, f"{one.path} is mapped {at}", why, "unmap it before the snapshot")
    return None


def _of_sockets(processes: Sequence[Process], sockets: Mapping[int, Socket], criu: Criu | None) -> Iterator[Finding]:
    inet = [one for one in sockets.values() if one.family in ("tcp", "udp", "raw") or one.protocol == "PACKET"]
    if inet and criu is not None and not criu.can_dump_inet:
        what = f"it has {len(inet)} network sockets"
        why = f"CRIU {'.'.join(map(str, criu.version))} can dump none on Linux 6.16 and later"
        yield _fatal("criu-sockets", _owner(processes, inet[0]), what, why, "tools/install-criu brings CRIU 4.2")
    for one in sockets.values():
        if one.protocol and not one.protocol.startswith(_KNOWN_PROTOCOLS):
            why = "CRIU does not know such sockets"
            what = f"a socket of the kind {one.protocol} is open"
            yield _fatal("socket", _owner(processes, one), what, why, "close it before the snapshot")
        if one.pending:
            what = f"{one.pending} clients of {one.local} have connected and were not accepted yet"
            why = "they are left out of the snapshot and lose their connection in a restore"
            yield _note("tcp-pending", _owner(processes, one), what, why, "take it before the first clients come")
    for one in outside_peers(processes, sockets):
        if one.family == "tcp":
            what = f"a TCP connection from {one.local} to {one.remote} leads out of the tree"
            why = "it will be closed in the process that is restored"
            mend = "take the snapshot when nobody is connected, or have the program connect anew when it fails"
            yield _note("tcp-peer", _owner(processes, one), what, why, mend)
        elif one.type == "dgram":
            what = f"a Unix socket sends to {one.remote or 'a process'} outside of the tree"
            why = "the restore connects it again by that name, and fails if nobody has it"
            mend = "have what it was connected to run when it is restored"
            yield _note("unix-peer", _owner(processes, one), what, why, mend)


def _owner(processes: Sequence[Process], socket: Socket) -> int:
    return next((p.pid for p in processes for one in p.descriptors if one.inode == socket.inode), 0)


def _of_an_attachment(one: Attachment) -> Finding:
    pid, fd = one.descriptors[0]
    where = f"descriptor {fd}"
    if one.kind == "tty":
        what, code = f"{where} is the terminal {one.path}", "terminal"
        why = "it can be restored onto another terminal only"
        if not one.is_stdio:
            return _fatal(code, pid, what, f"{why}, and a restore has one for its stdio alone", "close it")
        mend = "start it with its output to a file or pipe (>log 2>&1 </dev/null)"
    elif one.kind == "pipe":
        what, code = f"{where} is a pipe whose other end is outside of the tree", "pipe"
        why = "in a restore nobody is there: it is given a log, an end of file, or what swallows all that is written"
        mend = "none is needed for a log; else have the program open it anew"
    elif one.kind == "socket":
        what, code = f"{where} is a Unix connection to a process outside of the tree", "unix-peer"
        if one.is_stdio:
            why = "it can be restored onto another socket only, as `snapshot run` has one"
            return _note(code, pid, what, why, "start it with its output to a file or pipe (>log 2>&1 </dev/null)")
        why = "it will be closed in the process that is restored"
        mend = "close it before the snapshot, or have the program connect anew when it fails"
    else:
        what, code = f"{where} is {one.path} on a mount that it can't see (any more)", "unseen-file"
        why = "a restore opens what has that name then"
        mend = "have the program close it, or open it anew"
    return _note(code, pid, what, why, mend)


def _maker(*, fatal: bool) -> Callable[[str, int, str, str, str], Finding]:
    def make(code: str, pid: int, what: str, why: str, mend: str) -> Finding:
        return Finding(code=code, pid=pid, what=what, why=why, mend=mend, fatal=fatal)

    return make


_fatal = _maker(fatal=True)
_note = _maker(fatal=False)
