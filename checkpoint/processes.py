"""What /proc says of a process tree: descriptors, mappings, namespaces. Nothing is asked of the processes themselves.

Everything is read below a given root, so that a folder of files stands in for /proc in tests. Formats: proc(5).
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from typing import Final, Literal

import msgspec

from checkpoint.errors import TargetError

Kind = Literal["file", "folder", "device", "tty", "pipe", "fifo", "socket", "memfd", "anon"]

PROC: Final = "/proc"

_DELETED: Final = " (deleted)"
_MEMORY: Final = ("/memfd:", "/SYSV", "/dev/zero", "/secretmem", "/anon_hugepage")
_NAMED_INODE: Final = re.compile(r"(?:pipe|socket):\[(\d+)\]$")
_PTMX: Final = frozenset({(5, 2)})
_TTY_MAJORS: Final = frozenset({4, 5, *range(136, 144), 204, 229})
"""Virtual consoles, /dev/tty and /dev/console, the slaves of pseudo terminals, serial lines, hypervisor consoles."""


class Descriptor(msgspec.Struct, frozen=True, kw_only=True):
    """An open descriptor of a process.

    Attributes:
        fd: its number.
        target: where /proc/PID/fd/N leads, ` (deleted)` taken off: a path, `pipe:[7]`, `anon_inode:[eventpoll]`.
        flags: those of open(2), O_CLOEXEC included.
        mount_id: as in /proc/PID/mountinfo; 0 where the kernel does not say.
        device: `st_dev` of what is open, 0 where it can't be asked.
        inode: its inode number (of a pipe or socket the number in its name).
        rdev: `st_rdev` of a device, else 0.
        size: of a regular file in bytes, else 0.
        kind: what it is.
        is_deleted: its name is gone (a memfd's never was).
        locks: the locks held through it, a line of /proc/locks each.
        pty: the number N of the terminal /dev/pts/N of which it is the other end, None of everything else.
    """

    fd: int
    target: str
    flags: int = 0
    mount_id: int = 0
    device: int = 0
    inode: int = 0
    rdev: int = 0
    size: int = 0
    kind: Kind
    is_deleted: bool = False
    locks: tuple[str, ...] = ()
    pty: int | None = None

    @property
    def can_write(self) -> bool:
        """Whether it was opened for writing."""
        return self.flags & os.O_ACCMODE != os.O_RDONLY


class Mapping(msgspec.Struct, frozen=True, kw_only=True):
    """A mapping: the line of /proc/PID/maps.

    Attributes:
        start, end: addresses, half-open.
        perms: `r-xp`; `s` in the last place is shared.
        offset: of `start` in the file.
        device, inode: of the file, 0 where there is none.
        path: of the file, ` (deleted)` taken off; `[heap]`, `[anon:NAME]` and the like; empty for plain memory.
        is_deleted: the file's name is gone (memory has none).
    """

    start: int
    end: int
    perms: str
    offset: int
    device: int
    inode: int
    path: str
    is_deleted: bool

    @property
    def nbytes(self) -> int:
        """How many bytes of address space it takes."""
        return self.end - self.start

    @property
    def is_memory(self) -> bool:
        """Whether it is shared memory that only looks like a file, whose name was never anywhere."""
        return self.path.startswith(_MEMORY)

    @property
    def is_file(self) -> bool:
        """Whether a file with a name, now or once, is behind it."""
        return self.inode != 0 and self.path.startswith("/") and not self.is_memory


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """A process as it was when it was looked at.

    Attributes:
        pid, ppid, group, session: as this /proc numbers them; 0 where it is outside of its pid namespace.
        comm: its name, 15 bytes at most.
        state: the letter of /proc/PID/stat: `S` sleeps, `T` stopped, `Z` ended and not waited for.
        start_ticks: when it began, in clock ticks since boot: with `pid`, what tells it from a later one.
        exe, cwd, root: paths; empty of one that has ended.
        cmdline: its arguments.
        descriptors: in ascending order.
        mappings: in ascending order.
        namespaces: the inode of each, by its name in /proc/PID/ns: `mnt`, `pid`, `net`, `user`.
        mounts: the numbers of the mounts in its mount namespace, as `Descriptor.mount_id` has them.
        threads: how many.
    """

    pid: int
    ppid: int
    group: int = 0
    session: int = 0
    comm: str = ""
    state: str = "S"
    start_ticks: int = 0
    exe: str = ""
    cwd: str = ""
    root: str = "/"
    cmdline: tuple[str, ...] = ()
    descriptors: tuple[Descriptor, ...] = ()
    mappings: tuple[Mapping, ...] = ()
    namespaces: dict[str, int]
    mounts: frozenset[int] = frozenset()
    threads: int = 1

    @property
    def has_ended(self) -> bool:
        """Whether nothing is left of it but its exit status."""
        return self.state in "ZX"


def tree_of(pid: int, *, proc: str = PROC) -> tuple[Process, ...]:
    """A process and all its descendants, parents before children.

    A descendant that ends meanwhile is left out. Processes that are not stopped may fork while they are looked at.

    Raises:
        TargetError: there is no such process, or it may not be looked at.
    """
    found: list[Process] = []
    waiting = [pid]
    while waiting:
        current = waiting.pop(0)
        try:
            if (leader := _leader(f"{proc}/{current}")) != current:
                raise TargetError(f"{current} is a thread of process {leader}", mend=f"snapshot process {leader}")
            found.append(_looked_at(current, proc))
            waiting += children_of(current, proc=proc)
        except (FileNotFoundError, ProcessLookupError):
            if current == pid:
                raise TargetError(f"there is no process {pid}", mend="ps -e shows those there are") from None
        except PermissionError as e:
            raise TargetError(f"process {current} may not be looked at: {e}", mend="run it as root") from e
    return tuple(found)


def family(pid: int, *, proc: str = PROC) -> list[tuple[int, int]]:
    """A process and all its descendants, parents before children, as (pid, start in clock ticks).

    Unlike `tree_of` it reads none of their memory, which may be waiting for a page server. One that is gone is left
    out.
    """
    found = []
    waiting = [pid]
    while waiting:
        current = waiting.pop(0)
        if (since := start_ticks(current, proc=proc)) is not None:
            found.append((current, since))
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                waiting += children_of(current, proc=proc)
    return found


def _looked_at(pid: int, proc: str) -> Process:
    try:
        return process(pid, proc=proc)
    except (FileNotFoundError, ProcessLookupError):
        return process(pid, proc=proc)  # one that ends while it is looked at is seen as ended the second time


def children_of(pid: int, *, proc: str = PROC) -> list[int]:
    """The children of all its threads, in ascending order.

    Raises:
        OSError: it has ended.
    """
    found: set[int] = set()
    tasks = f"{proc}/{pid}/task"
    for task in os.listdir(tasks):
        try:
            with open(f"{tasks}/{task}/children") as file:
                found.update(map(int, file.read().split()))
        except (FileNotFoundError, ProcessLookupError):  # the thread ended
            continue
    return sorted(found)


def process(pid: int, *, proc: str = PROC) -> Process:
    """One process.

    Raises:
        OSError: it has ended, or may not be looked at.
    """
    folder = f"{proc}/{pid}"
    comm, fields = _stat(folder)
    known = {
        "pid": pid,
        "ppid": int(fields[1]),
        "group": int(fields[2]),
        "session": int(fields[3]),
        "comm": comm,
        "state": fields[0],
        "threads": int(fields[17]),
        "start_ticks": int(fields[19]),
    }
    if fields[0] in "ZX":
        return Process(**known, namespaces={})  # type: ignore[arg-type]  # each value is of its field's type
    with open(f"{folder}/cmdline", "rb") as file:
        arguments = file.read().split(b"\0")[:-1]
    return Process(
        **known,  # type: ignore[arg-type]
        exe=_taken_off(os.readlink(f"{folder}/exe"))[0],
        cwd=os.readlink(f"{folder}/cwd"),
        root=os.readlink(f"{folder}/root"),
        cmdline=tuple(os.fsdecode(one) for one in arguments),
        descriptors=tuple(descriptors_of(pid, proc=proc)),
        mappings=tuple(mappings_of(pid, proc=proc)),
        namespaces=namespaces_of(pid, proc=proc),
        mounts=_mounts(folder),
    )


def _leader(folder: str) -> int:
    with open(f"{folder}/status", encoding="utf-8", errors="surrogateescape") as file:
        return int(next(line for line in file if line.startswith("Tgid:")).split()[1])


def _mounts(folder: str) -> frozenset[int]:
    with open(f"{folder}/mountinfo", "rb") as file:
        return frozenset(int(line.split(None, 1)[0]) for line in file)


def start_ticks(pid: int, *, proc: str = PROC) -> int | None:
    """When a process began, None where there is no such process: whether it is still the one that was meant."""
    try:
        return int(_stat(f"{proc}/{pid}")[1][19])
    except (FileNotFoundError, ProcessLookupError):
        return None


def is_there(pid: int, since: int, *, proc: str = PROC) -> bool:
    """Whether the process that began at `since`, in clock ticks, is still there and has not ended.

    Costs one small read: its mappings and descriptors, of which a process with a GPU has thousands, are not looked at.
    """
    try:
        fields = _stat(f"{proc}/{pid}")[1]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return int(fields[19]) == since and fields[0] not in "ZX"


def is_stopped(pid: int, *, proc: str = PROC) -> bool:
    """Whether there is such a process, and it is stopped (SIGSTOP), as CRIU leaves one."""
    try:
        return _stat(f"{proc}/{pid}")[1][0] == "T"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _stat(folder: str) -> tuple[str, list[str]]:
    """The name, and the fields from `state` on: the name may hold spaces and parentheses."""
    with open(f"{folder}/stat", encoding="utf-8", errors="surrogateescape") as file:
        text = file.read()
    return text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 2 :].split()


def namespaces_of(pid: int | str, *, proc: str = PROC) -> dict[str, int]:
    """The namespaces a process is in (`self` is this one), each named by its inode."""
    folder = f"{proc}/{pid}/ns"
    found = {}
    for name in os.listdir(folder):
        if not name.endswith("_for_children"):
            target = os.readlink(f"{folder}/{name}")
            found[name] = int(target[target.index("[") + 1 : -1])
    return found


def descriptors_of(pid: int, *, proc: str = PROC) -> Iterator[Descriptor]:
    """The open descriptors of a process in ascending order; one that is closed meanwhile is left out."""
    for fd in sorted(map(int, os.listdir(f"{proc}/{pid}/fd"))):
        try:
            target = os.readlink(f"{proc}/{pid}/fd/{fd}")
            with open(f"{proc}/{pid}/fdinfo/{fd}") as file:
                info = file.read()
        except FileNotFoundError:
            continue
        yield _descriptor(fd, target, info, _status(f"{proc}/{pid}/fd/{fd}", target))


def _status(link: str, target: str) -> os.stat_result | None:
    """What is open, asked through the link itself, which leads to it also when its name is gone."""
    if target.startswith(("socket:", "pipe:", "anon_inode:")):
        return None
    try:
        return os.stat(link)
    except OSError:  # a filesystem that does not answer any more; or a link of a test's that leads nowhere
        return None


def _descriptor(fd: int, target: str, info: str, status: os.stat_result | None) -> Descriptor:
    values = dict(line.split(":\t", 1) for line in info.splitlines() if ":\t" in line)
    inode = int(values.get("ino", 0))
    if named := _NAMED_INODE.match(target):
        inode = int(named[1])
    path, is_deleted = _taken_off(target)
    kind = _kind(path, status)
    return Descriptor(
        fd=fd,
        target=path,
        flags=int(values.get("flags", "0"), 8),
        mount_id=int(values.get("mnt_id", 0)),
        device=status.st_dev if status else 0,
        inode=inode or (status.st_ino if status else 0),
        rdev=status.st_rdev if status else 0,
        size=status.st_size if status and stat.S_ISREG(status.st_mode) else 0,
        kind=kind,
        is_deleted=kind != "memfd" and is_deleted,
        locks=tuple(line.split("\t", 1)[1] for line in info.splitlines() if line.startswith("lock:")),
        pty=int(values["tty-index"]) if "tty-index" in values else None,
    )


def _kind(path: str, status: os.stat_result | None) -> Kind:
    if path.startswith("socket:"):
        return "socket"
    if path.startswith("pipe:"):
        return "pipe"
    if path.startswith("anon_inode:"):
        return "anon"
    if path.startswith("/memfd:"):
        return "memfd"
    if status is None:
        return _kind_by_name(path)
    mode = status.st_mode
    if stat.S_ISCHR(mode):
        number = os.major(status.st_rdev), os.minor(status.st_rdev)
        return "tty" if number[0] in _TTY_MAJORS or number in _PTMX else "device"
    if stat.S_ISDIR(mode):
        return "folder"
    if stat.S_ISFIFO(mode):
        return "fifo"
    if stat.S_ISSOCK(mode):
        return "socket"
    return "device" if stat.S_ISBLK(mode) else "file"


def _kind_by_name(path: str) -> Kind:
    if path.startswith(("/dev/pts/", "/dev/tty")) or path in ("/dev/ptmx", "/dev/console"):
        return "tty"
    return "device" if path.startswith("/dev/") and not path.startswith("/dev/shm/") else "file"


def mappings_of(pid: int, *, proc: str = PROC) -> Iterator[Mapping]:
    """The mappings of a process in ascending order."""
    with open(f"{proc}/{pid}/maps", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            yield mapping(line.rstrip("\n"))


def mapping(line: str) -> Mapping:
    r"""A line of /proc/PID/maps, in which a newline of a path is written `\012`."""
    addresses, perms, offset, device, inode, *rest = line.split(None, 5)
    start, end = addresses.split("-")
    major, minor = device.split(":")
    path, is_deleted = _taken_off(rest[0].replace("\\012", "\n") if rest else "")
    return Mapping(
        start=int(start, 16),
        end=int(end, 16),
        perms=perms,
        offset=int(offset, 16),
        device=os.makedev(int(major, 16), int(minor, 16)),
        inode=int(inode),
        path=path,
        is_deleted=is_deleted and not path.startswith(_MEMORY),
    )


def _taken_off(path: str) -> tuple[str, bool]:
    return (path.removesuffix(_DELETED), True) if path.endswith(_DELETED) else (path, False)
