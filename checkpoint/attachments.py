"""What ties a tree to the world outside of it, and how a restore is given something else in its place.

CRIU takes a descriptor of whoever restores for a resource of the tree (`--inherit-fd`): a log that has grown, a pipe
whose reader is gone, a terminal, a file that lies on a mount the tree can't see. Tried with CRIU 4.1 and 4.2: a file or
a pipe may be given for a file or a pipe, a terminal for a terminal, a Unix socket for a Unix socket.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from checkpoint.errors import CheckpointError
from checkpoint.manifest import Outside
from checkpoint.processes import Descriptor, Process
from checkpoint.sockets import Socket, sockets_of

Kind = Literal["file", "pipe", "tty", "socket"]

_STDIO: Final = frozenset({0, 1, 2})


@dataclass(frozen=True, kw_only=True, slots=True)
class Attachment:
    """Something outside of the tree that it has open.

    Attributes:
        resource: CRIU's name of it, for `RestoreOptions.inherit`.
        external: what a dump must be told so that it does not fail on it, see `DumpOptions.external`; None without.
        kind: what may be given for it: a descriptor of a file or pipe, of a terminal, of a Unix stream socket.
        path: what it is, for people.
        descriptors: (pid, descriptor) of each that shares it.
        can_read, can_write: how it was opened.
        needed: without a descriptor for it the restore fails, or the first write to it ends the process.
    """

    resource: str
    external: str | None
    kind: Kind
    path: str
    descriptors: tuple[tuple[int, int], ...]
    can_read: bool
    can_write: bool
    needed: bool

    @property
    def is_stdio(self) -> bool:
        """Whether it is standard input, output or error of one of the processes."""
        return any(fd in _STDIO for _, fd in self.descriptors)


def attachments_of(processes: Sequence[Process], sockets: Mapping[int, Socket]) -> list[Attachment]:
    """What a tree has open that a restore is to be given, or may be given, in the order in which it was found.

    Args:
        processes: the whole tree.
        sockets: of the tree, see `sockets_of`.
    """
    found: dict[str, Attachment] = {}
    inside = _whole_pipes(processes) | _own_terminals(processes)
    for process in processes:
        for descriptor in process.descriptors:
            one = _attachment(process, descriptor, sockets)
            if one is None or one.resource in inside or one.path in inside:
                continue
            before = found.get(one.resource, one)
            found[one.resource] = replace(
                one,
                descriptors=(*(before.descriptors if before is not one else ()), *one.descriptors),
                can_read=one.can_read or before.can_read,
                can_write=one.can_write or before.can_write,
            )
    return list(found.values())


def _whole_pipes(processes: Sequence[Process]) -> set[str]:
    """The pipes of which the tree has both ends."""
    reading: set[str] = set()
    writing: set[str] = set()
    for one in _all(processes):
        if one.kind == "pipe":
            if one.flags & os.O_ACCMODE != os.O_WRONLY:
                reading.add(one.target)
            if one.can_write:
                writing.add(one.target)
    return reading & writing


def _own_terminals(processes: Sequence[Process]) -> set[str]:
    """The terminals whose other end is in the tree."""
    return {f"/dev/pts/{one.pty}" for one in _all(processes) if one.pty is not None}


def _all(processes: Sequence[Process]) -> Iterator[Descriptor]:
    return (one for process in processes for one in process.descriptors)


def _attachment(process: Process, one: Descriptor, sockets: Mapping[int, Socket]) -> Attachment | None:
    external: str | None = None
    kind: Kind = "file"
    needed = True
    if one.kind == "pipe":
        resource, kind = one.target, "pipe"
    elif one.pty is not None:
        return None
    elif one.kind == "tty":
        resource = external = f"tty[{one.rdev:x}:{one.device:x}]"
        kind = "tty"
    elif one.kind == "socket":
        end = sockets.get(one.inode)
        # A datagram socket is connected anew by its peer's name, which `--ext-unix-sk` allows.
        if end is None or end.type not in ("stream", "seqpacket") or not end.peer or end.peer in sockets:
            return None
        resource, external, kind = f"socket:[{one.inode}]", f"unix[{one.inode}]", "socket"
    elif is_unseen(process, one):
        resource = external = f"file[{one.mount_id:x}:{one.inode:x}]"
    elif one.kind == "file" and one.fd in _STDIO and one.can_write and not one.is_deleted:
        resource, needed = one.target.lstrip("/"), False
    else:
        return None
    return Attachment(
        resource=resource,
        external=external,
        kind=kind,
        path=one.target,
        descriptors=((process.pid, one.fd),),
        can_read=one.flags & os.O_ACCMODE != os.O_WRONLY,
        can_write=one.can_write,
        needed=needed,
    )


def outside(processes: Sequence[Process]) -> list[Outside]:
    """What a manifest keeps for `stand_ins`: all that is needed and is no stdio, which a restore is given anew.

    Args:
        processes: the whole tree.
    """
    running = [one for one in processes if not one.has_ended]
    return [
        Outside(resource=one.resource, kind=one.kind, path=one.path, can_read=one.can_read, can_write=one.can_write)
        for one in attachments_of(running, sockets_of(running))
        if one.needed and not one.is_stdio
    ]


def is_unseen(process: Process, one: Descriptor) -> bool:
    """Whether a file lies on a mount that is not in the process's mount namespace, or not any more."""
    if one.kind in ("pipe", "socket", "anon", "memfd") or not process.mounts or not one.mount_id:
        return False
    if one.is_deleted and one.target == "/secretmem":  # memfd_secret(2): nobody sees the kernel's mount of it
        return False
    return one.mount_id not in process.mounts


@contextlib.contextmanager
def stand_ins(attachments: Iterable[Attachment | Outside]) -> Iterator[tuple[tuple[int, str], ...]]:
    """Descriptors for what a restore needs and nobody has anything better for: what it was connected to has gone away.

    A pipe that was read from ends, one that was written to swallows; a Unix connection is closed at the other end; a
    file is opened anew by its name. A terminal gets none: preflight refuses one.

    Args:
        attachments: those that need one and have none yet.

    Yields:
        Pairs for `RestoreOptions.inherit`; the descriptors are closed afterwards.

    Raises:
        CheckpointError: a file is not there any more.
    """
    with contextlib.ExitStack() as held:
        pairs = []
        for one in attachments:
            if one.kind == "tty":
                continue
            fd = _closed_connection() if one.kind == "socket" else _nothing(one)
            held.callback(os.close, fd)
            pairs.append((fd, one.resource))
        yield tuple(pairs)


def _closed_connection() -> int:
    ours, theirs = socket.socketpair()
    theirs.close()
    return ours.detach()


def _nothing(one: Attachment | Outside) -> int:
    flags = os.O_RDWR if one.can_read and one.can_write else os.O_WRONLY if one.can_write else os.O_RDONLY
    if one.kind == "pipe":
        return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        return os.open(one.path, flags | os.O_CLOEXEC)
    except OSError as e:
        raise CheckpointError(
            f"the process had it open, and it can't be opened now: {os.strerror(e.errno or 0)}",
            path=one.path,
            mend="put it back, or make a snapshot of a process that has closed it",
        ) from e
