"""What CRIU's log says went wrong, as an error that names the file, descriptor or mapping and what to do.

CRIU says it in English sentences that no one promised to keep: those below are of 4.1.1 and 4.2.1, and the tests hold
logs of both. What matches none of them is passed on as it stands.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Literal

from checkpoint.criu_command import Command
from checkpoint.errors import (
    CheckpointError,
    CorruptError,
    CriuError,
    MisfitError,
    PidTakenError,
    RetryError,
    TargetError,
)

Kind = Literal["target", "failed", "misfit", "corrupt", "retry", "pid"]

_ERROR: Final = re.compile(r"Error \([^)]*\): (?P<text>.*)")
_HARMLESS: Final = re.compile(r"rlimit: Can't setup RLIMIT_NOFILE|Will be killed|tun: Unable to create tun")
_SOCKET: Final = re.compile(r"inet: \s*Restore: .*\bport (?P<port>\d+) .*\bsrc_addr (?P<address>\S+)")
_FILE: Final = re.compile(r"Dumping path for -?\d+ fd via self \d+ \[(.+)\]")
_BUSY_FD: Final = re.compile(r"Unable to open fd=(?P<fd>\d+) id=")
_DUMPED_PID: Final = re.compile(r"Dump (?:files|mappings) \(pid: (?P<pid>\d+)\) failed|Collect mappings \(pid: (\d+)\)")
_RESTORED_PID: Final = re.compile(r"^\([\d.]+\)\s+(?P<pid>\d+): Error ")
_TAIL_LINES: Final = 60


@dataclass(frozen=True, slots=True)
class Rule:
    """What a sentence of the log means.

    Attributes:
        pattern: the sentence; its groups are there for the texts below, and `path` becomes the error's.
        kind: the error it becomes: `target` the process must change, `failed` CRIU or the machine, `misfit` this
            machine is not like that of the dump, `corrupt` the images or files are not what they were, `retry`, `pid`.
        message: what went wrong; `{fd}` and `{pid}` are known from the lines around it where the sentence has none.
        mend: what to do.
        is_first: it means that only as the first complaint; later ones follow from what went before.
    """

    pattern: re.Pattern[str]
    kind: Kind
    message: str
    mend: str | None = None
    is_first: bool = False


def _rule(pattern: str, kind: Kind, message: str, mend: str | None = None, *, is_first: bool = False) -> Rule:
    return Rule(re.compile(pattern), kind, message, mend, is_first)


_BACK: Final = "bring it back as it was, or take a new snapshot"
_CLOSE: Final = "have the program close it before the snapshot"

DUMP_RULES: Final = (
    _rule(
        r"send_fds failed \(-22\)",
        "target",
        "process {pid} has an io_uring open, which can't be dumped",
        "have the program not use io_uring, or close it before the snapshot (node: UV_USE_IO_URING=0)",
    ),
    _rule(
        r"Can't dump file (?P<fd>\d+) of that type \[\d+\] \((?:anon )?(?P<what>.+?)\)?$",
        "target",
        "process {pid} has {what} open as descriptor {fd}, which can't be dumped",
        _CLOSE,
    ),
    _rule(
        r"Can't dump ghost file (?P<path>.+) of (?P<size>\d+) size",
        "target",
        "process {pid} uses this file of {size} bytes, whose name is gone: too large to be copied into a snapshot",
        "start the program anew, so that it uses files that are there",
    ),
    _rule(
        r"Can't create link remap for (?P<path>.+?)\. Use link-remap",
        "target",
        "process {pid} uses a file whose name is gone, or hidden by a mount",
        "start the program anew, so that it uses files that are there",
    ),
    _rule(
        r"Can't (?:link|linkat|create) .*remap.*",
        "target",
        "process {pid} uses a file whose name is gone, and its folder can't be written to",
        "start the program anew, so that it uses files that are there",
    ),
    _rule(
        r"Unaccessible path opened \S+, need \S+",
        "target",
        "process {pid} uses {file}, and another file is found under that name, which replaced it or hides it",
        "umount what hides it, or start the program anew",
    ),
    _rule(
        r"Can't lookup mount=(?P<mount>-?\d+) for fd=(?P<fd>-?\d+) path=(?P<path>.+)",
        "target",
        "process {pid} has this open as descriptor {fd}, on a mount that it can't see (any more)",
        _CLOSE,
    ),
    _rule(
        r"unix: Can't dump half of stream unix connection",
        "target",
        "a Unix connection leads to a process outside of the tree",
        _CLOSE,
    ),
    _rule(
        r"unix: External socket is used",
        "target",
        "the other end of a Unix socket is outside of the tree",
        _CLOSE,
    ),
    _rule(
        r"inet: Connected TCP socket, consider using",
        "target",
        "process {pid} has a TCP connection",
        "have it closed before the snapshot, or let it be closed",
    ),
    _rule(
        r"inet: In-flight connection",
        "retry",
        "a client has connected to process {pid} and was not accepted yet",
        "take the snapshot before the first clients come",
    ),
    _rule(
        r"sockets: Can't get 1:(?:16|34) opt: Operation not supported",
        "misfit",
        "this CRIU can dump no TCP or UDP socket on Linux 6.16 or later; 4.2 can",
        "tools/install-criu",
    ),
    _rule(
        r"sockets: BUG! Unknown socket collected \(family (?P<family>\d+)\)",
        "target",
        "process {pid} has a socket of family {family} open, which can't be dumped",
        _CLOSE,
    ),
    _rule(
        r"pidfd: pidfd pid (?P<other>-?\d+) is not a part of process tree",
        "target",
        "process {pid} has a pidfd of process {other} open, which is not in the tree",
        _CLOSE,
    ),
    _rule(
        r"The root process (?P<pid>\d+) is not a session leader",
        "target",
        "process {pid} is in the session of another process",
        "start it with setsid",
    ),
    _rule(
        r"A session leader of (?P<pid>\d+)\(\d+\) is outside of its pid namespace",
        "target",
        "process {pid} is in a pid namespace, and its session's leader is outside of that",
        "start it with setsid in its namespace",
    ),
    _rule(r"Some file locks are hold by dumping tasks", "target", "a file lock is held", "have the program release it"),
    _rule(
        r"tty: Found slave peer index (?P<index>\d+) without correspond master peer",
        "target",
        "the terminal /dev/pts/{index} is in use, whose other end is outside of the tree",
        "start it with its output to a file or pipe, and without a terminal",
    ),
    _rule(
        r"with SysVIPC shmem map @(?P<address>[0-9a-f]+) doesn't live in IPC ns",
        "target",
        "process {pid} has System V shared memory mapped at 0x{address}, which others may share",
        "have the program use POSIX shared memory, or run it in an IPC namespace of its own (unshare --ipc)",
    ),
    _rule(
        r"Unknown shit \d+ \((?P<path>.+?)\)$",
        "target",
        "process {pid} has this mapped, which can't be dumped",
        "have the program unmap it before the snapshot",
    ),
    _rule(
        r"No space left on device",
        "failed",
        "no space is left for the images",
        "make room, or name another store with --store",
    ),
    _rule(
        r"The criu itself is within dumped tree",
        "target",
        "the process that asks for the snapshot is in the tree itself",
        "take the snapshot from outside of it",
    ),
    _rule(
        r"Unable to (?:interrupt task:|detach from) (?P<pid>\d+)",
        "target",
        "process {pid} is traced by a debugger, or has ended",
        "detach the debugger (strace, gdb)",
        is_first=True,
    ),
    _rule(
        r"ptrace_\w+ failed|Can't seize|Can't freeze|Timeout reached",
        "retry",
        "not all threads of the process could be stopped in time",
        "see whether one of them waits for a disk or server (ps -L -o pid,stat,wchan)",
    ),
    _rule(
        r"(?P<program>ip6?tables(?:-restore)?)(?:: not found|.* failed: No such file)",
        "misfit",
        "CRIU needs the program {program} to stop connections",
        "apt-get install iptables",
    ),
    _rule(
        r"mnt: (?P<text>.*(?:unsupported|unreachable|doesn't have a proper root mount|not supported).*)",
        "target",
        "a mount of its mount namespace can't be dumped: {text}",
        "mount it outside too, so that it is taken from there",
    ),
)

RESTORE_RULES: Final = (
    _rule(
        r"Can't fork for (?P<pid>\d+): File exists",
        "pid",
        "another process has the pid {pid}",
        "end that process, or restore with --new-pidns",
    ),
    _rule(
        r"File (?P<path>.+) has bad size (?P<now>\d+) \(expect (?P<then>\d+)\)",
        "corrupt",
        "has {now} bytes, and had {then} when the snapshot was taken; the process had it {use}",
        _BACK + "; a log that grows must be opened with O_APPEND (>> in a shell)",
    ),
    _rule(
        r"File (?P<path>.+) has bad mode (?P<now>\d+) \(expect (?P<then>\d+)\)",
        "misfit",
        "has mode {now}, and had {then} when the snapshot was taken",
        "chmod it back",
    ),
    _rule(
        r"File (?P<path>.+) has bad build-ID",
        "corrupt",
        "is another build than when the snapshot was taken",
        _BACK,
    ),
    _rule(
        r"Can't open (?:file|fake fifo \S+) \[?(?P<path>.+?)\]?(?: on restore)?: (?P<why>.+)",
        "misfit",
        "the process had it {use}, and it can't be opened now: {why}",
        _BACK,
    ),
    _rule(
        r"unix: Can't bind id \S+ ino \d+ addr.*: Address already in use",
        "retry",
        "another process listens on the Unix socket of this one",
        "end that process",
    ),
    _rule(
        r"unix: Can't connect (?P<inode>\d+) socket: (?P<why>.+)",
        "misfit",
        "a Unix socket can't be connected again: {why}",
        "start what it was connected to",
    ),
    _rule(
        r"inet: Can't bind inet socket \(id \d+\): (?P<why>Address already in use|Cannot assign .*)",
        "retry",
        "the address {address} can't be had: {why}",
        "end the process that has it (ss -tlnp), or restore in a network namespace of its own",
    ),
    _rule(
        r"tty: Don't have tty to inherit session from|tty: Can't set tty params",
        "misfit",
        "the process was on a terminal, and there is none for it here",
        "start it with its output to a file or pipe before the snapshot",
    ),
    _rule(
        r"Unexpected EOF on (?P<image>\S+)|Head magic doesn't match for (?P<image2>\S+)|Can't read pages data",
        "corrupt",
        "the images are damaged",
        "weightfs snapshot verify tells which, weightfs snapshot rm removes it",
    ),
    _rule(
        r"Can't open (?P<image>\S+\.img)|No (?P<image2>\S+) image found|Can't open dir .*",
        "corrupt",
        "an image is missing",
        "weightfs snapshot verify tells which, weightfs snapshot rm removes it",
    ),
    _rule(
        r"cpu: (?P<text>.*(?:CPU|FPU|feature|capab|xsave).*)",
        "misfit",
        "this processor lacks what that of the snapshot had: {text}",
        "restore on a machine of the same kind, or take a new snapshot",
    ),
    _rule(
        r"Cannot allocate memory|Can't allocate memory",
        "retry",
        "too little memory is free",
        "end something else, or raise the limit of its control group",
    ),
)


def explain(log: str, command: Command) -> CheckpointError:
    """The error that a log of a failed command stands for.

    Args:
        log: the whole of it, at verbosity 3 or more.
        command: what was run.
    """
    lines = log.splitlines()
    tail = "\n".join(lines[-_TAIL_LINES:])
    rules = DUMP_RULES if command == "dump" else RESTORE_RULES
    complaints = list(_complaints(lines))
    for number, line in complaints:
        for rule in rules:
            found = rule.pattern.search(line)
            if found and not (rule.is_first and number != complaints[0][0]):
                return _error(rule, found, _Context(lines, number), tail)
    said = next((_ERROR.search(line) for _, line in complaints), None)
    message = f"CRIU could not {command} the process" + (f": {said['text'].strip()}" if said else "")
    return CriuError(message, log=tail)


def _complaints(lines: list[str]) -> Iterator[tuple[int, str]]:
    """The lines that may say what went wrong: errors, and what programs that CRIU runs say without a mark."""
    for number, line in enumerate(lines):
        if ("Error (" in line or line.startswith("sh: ")) and not _HARMLESS.search(line):
            yield number, line


@dataclass(frozen=True, slots=True)
class _Context:
    """The lines around the one that a rule matches."""

    lines: list[str]
    number: int

    def pid(self) -> str:
        if found := _RESTORED_PID.search(self.lines[self.number]):
            return found["pid"]
        for line in self.lines[self.number :]:
            if found := _DUMPED_PID.search(line):
                return next(one for one in found.groups() if one)
        return self._before(re.compile(r"Dumping task \(pid: (\d+)\)|^pie: (\d+): ")) or "?"

    def use(self) -> str:
        """What the process had of the file that could not be opened."""
        for line in self.lines[self.number :]:
            if found := _BUSY_FD.search(line):
                return f"open as descriptor {found['fd']}"
            if "Can't open cwd" in line:
                return "as its working folder"
            if "Can't open vma" in line:
                return "mapped"
        return "open"

    def file(self) -> str:
        """The last file that was looked at."""
        return self._before(_FILE) or "a file"

    def address(self) -> str:
        """Of the socket that was being restored."""
        for line in reversed(self.lines[: self.number]):
            if found := _SOCKET.search(line):
                return f"{found['address']} port {found['port']}"
        return "it listened on"

    def _before(self, pattern: re.Pattern[str]) -> str | None:
        for line in reversed(self.lines[: self.number + 1]):
            if found := pattern.search(line):
                return next(one for one in found.groups() if one)
        return None


def _error(rule: Rule, found: re.Match[str], context: _Context, tail: str) -> CheckpointError:
    words = {name: value for name, value in found.groupdict().items() if value is not None}
    path = words.get("path")
    if path is not None and not path.startswith(("/", "@")):
        path = f"/{path}"  # a restore names files from the root
    known: dict[str, Callable[[], str]] = {
        "pid": context.pid,
        "use": context.use,
        "file": context.file,
        "address": context.address,
    }
    for name, value in known.items():
        if f"{{{name}}}" in rule.message and name not in words:
            words[name] = value()
    message = rule.message.format_map(words)
    if rule.kind == "pid":
        return PidTakenError(message, mend=rule.mend, pid=int(words["pid"]))
    if rule.kind == "failed":
        return CriuError(message, path=path, mend=rule.mend, log=tail)
    if rule.kind == "target":
        return TargetError(message, path=path, mend=rule.mend)
    if rule.kind == "misfit":
        return MisfitError(message, path=path, mend=rule.mend)
    if rule.kind == "corrupt":
        return CorruptError(message, path=path, mend=rule.mend)
    return RetryError(message, path=path, mend=rule.mend)
