"""What must not die with a daemon: the kernel's descriptor, the ledger, a descriptor of every open file, the sockets.

It passes from process to process in three ways: to daemons by inheritance, to the next version's supervisor by exec,
and by way of a service manager that keeps descriptors to whoever it starts next.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import time
from dataclasses import dataclass, field
from typing import Any, Final

from weightfs import control, ledger, mounts, systemd, wire
from weightfs.config import MountConfig
from weightfs.errors import UsageError, WeightfsError

log = logging.getLogger(__name__)

_NAMES: Final = ("weightfs-kernel", "weightfs-ledger", "weightfs-source")
_HELD_NAME: Final = "weightfs-held-"
_REQUEST_BYTES: Final = 64 << 10
_MOST_WAITING: Final = 100_000


@dataclass(kw_only=True)
class Estate:
    """One mount's belongings.

    Attributes:
        kernel_fd: /dev/fuse, mounted, non-blocking.
        ledger_fd: see `weightfs.ledger`.
        source_fd: the source folder, which may have another name by now, or none.
        held: a descriptor of every file that is open, by inode.
        device: the mount's number, which tells it from another one at the same place.
        mounted_at: on the monotonic clock.
        is_kept: whether a service manager keeps it beyond this process.
        is_ours: whether the mountpoint is still to be taken away by us.
        is_left: whether it was left to the service manager.
        listener: the socket that replacement is asked on.
        control: the socket that daemons answer on.
        places: paths of the sockets, with the inodes they had.
    """

    kernel_fd: int
    ledger_fd: int
    source_fd: int
    device: str
    held: dict[int, int] = field(default_factory=dict)
    mounted_at: float = field(default_factory=time.monotonic)
    is_kept: bool = False
    is_ours: bool = True
    is_left: bool = False
    listener: socket.socket | None = None
    control: socket.socket | None = None
    places: dict[str, int] = field(default_factory=dict)

    @classmethod
    def mount(cls, settings: MountConfig) -> Estate:
        """Mount.

        Raises:
            WeightfsError: there is no source, or it can't be mounted there.
        """
        try:
            source_fd = os.open(settings.source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as e:
            raise UsageError(
                f"can't serve it: {os.strerror(e.errno or 0)}", path=settings.source, mend="name an existing folder"
            ) from e
        mounts.clear_stale(settings.mountpoint)
        kernel_fd = mounts.mount(settings.source, settings.mountpoint, for_others=settings.for_others)
        here = mounts.find(settings.mountpoint)
        self = cls(
            kernel_fd=kernel_fd,
            ledger_fd=ledger.create(),
            source_fd=source_fd,
            device=here.device if here is not None else "",
            is_kept=_has_keeper(),
        )
        if self.is_kept:
            for name, fd in zip(_NAMES, (self.kernel_fd, self.ledger_fd, self.source_fd), strict=True):
                systemd.keep(name, fd)
        return self

    @classmethod
    def from_manager(cls, settings: MountConfig) -> Estate | None:
        """What the service manager kept, if that still is a mount."""
        kept = systemd.kept(os.environ, os.getpid())
        three = [kept.pop(name) for name in _NAMES if name in kept]
        held = {int(name[len(_HELD_NAME) :], 16): fd for name, fd in kept.items() if name.startswith(_HELD_NAME)}
        for inode in held:  # from now on they change with every open
            systemd.discard(f"{_HELD_NAME}{inode:x}")
        here = mounts.find(settings.mountpoint)
        if len(three) == len(_NAMES) and not _is_dead(three[0]) and here is not None:
            kernel, book, source = three
            self = cls(kernel_fd=kernel, ledger_fd=book, source_fd=source, device=here.device, held=held)
            self.is_kept = _has_keeper()
            if here.source == settings.source:
                return self
            self.unmount(settings.mountpoint)  # it shows another folder
        for fd in (*three, *held.values()):
            os.close(fd)
        for name in _NAMES:
            systemd.discard(name)
        return None

    @classmethod
    def from_handoff(cls, document: dict[str, Any]) -> Estate:
        """What a predecessor described before it became this process."""
        self = cls(
            kernel_fd=document["kernel_fd"],
            ledger_fd=document["ledger_fd"],
            source_fd=document["source_fd"],
            device=document["device"],
            held={int(inode): fd for inode, fd in document["held"]},
            mounted_at=document["mounted_at"],
            is_kept=document["is_kept"],
            listener=_socket_of(document["listener_fd"]),
            control=_socket_of(document["control_fd"]),
            places=document["places"],
        )
        self.set_inheritable(False)
        return self

    def handoff(self) -> dict[str, Any]:
        """Described for `from_handoff`."""
        return {
            "kernel_fd": self.kernel_fd,
            "ledger_fd": self.ledger_fd,
            "source_fd": self.source_fd,
            "device": self.device,
            "held": list(self.held.items()),
            "mounted_at": self.mounted_at,
            "is_kept": self.is_kept,
            "listener_fd": self.listener.fileno() if self.listener is not None else None,
            "control_fd": self.control.fileno() if self.control is not None else None,
            "places": self.places,
        }

    def mount_anew(self, settings: MountConfig) -> Estate:
        """Take the mount away and make another in its place; the sockets stay.

        Raises:
            WeightfsError: see `mount`.
        """
        self.unmount(settings.mountpoint)
        for fd in (self.kernel_fd, self.ledger_fd, self.source_fd, *self.held.values()):
            os.close(fd)
        for name in _NAMES:
            systemd.discard(name)
        fresh = Estate.mount(settings)
        fresh.listener, fresh.control, fresh.places = self.listener, self.control, self.places
        return fresh

    def set_inheritable(self, inheritable: bool) -> None:
        """Whether all of it stays open across exec."""
        sockets = [one.fileno() for one in (self.listener, self.control) if one is not None]
        for fd in (self.kernel_fd, self.ledger_fd, self.source_fd, *self.held.values(), *sockets):
            os.set_inheritable(fd, inheritable)

    def listen(self, settings: MountConfig) -> None:
        """Make the sockets, where they are not there yet. A mount works without."""
        try:
            if self.listener is None:
                self.listener = self._bind(settings.supervisor_socket, None)
            if self.control is None:
                self.control = self._bind(settings.control_socket, settings.control_group)
        except (OSError, WeightfsError) as e:
            log.warning("no --replace, no control socket: %s", e)
        if self.listener is not None:
            self.listener.setblocking(False)

    def _bind(self, path: str, group: str | None) -> socket.socket:
        # Who listens there had this mountpoint before, and lives on only for files that are still open.
        listener = control.bind(path, group, even_if_taken=True)
        self.places[path] = os.stat(path).st_ino
        return listener

    def hold(self, inode: int, fd: int) -> None:
        """Keep a descriptor, which is ours from now on."""
        self.drop(inode)
        self.held[inode] = fd

    def drop(self, inode: int) -> None:
        """Close what is held for an inode."""
        if (fd := self.held.pop(inode, None)) is not None:
            os.close(fd)

    def is_dead(self) -> bool:
        """Whether the kernel has ended the connection: unmounted, and nobody has a file open."""
        return _is_dead(self.kernel_fd)

    def unmount(self, mountpoint: str) -> bool:
        """Take the mountpoint away, once; gives whether that had to be done lazily."""
        self.is_ours = False
        return mounts.take_away(mountpoint, self.device)

    def turn_away(self) -> None:
        """Answer EIO to all who wait for an answer: for an end after which nobody serves.

        A thread of a daemon that was killed may wait in the kernel for a lock that one of them holds. Until it has
        gone, it keeps the kernel's descriptor open, and the kernel waits with them.
        """
        with contextlib.suppress(OSError):
            os.write(self.kernel_fd, wire.NOTIFY_RESEND)
            for _ in range(_MOST_WAITING):
                request = os.read(self.kernel_fd, _REQUEST_BYTES)
                _, opcode, unique, _ = wire.IN_HEADER.unpack_from(request)
                if opcode not in wire.NO_REPLY:
                    with contextlib.suppress(FileNotFoundError):
                        os.write(self.kernel_fd, wire.OUT_HEADER.pack(wire.OUT_HEADER_BYTES, -errno.EIO, unique))

    def leave_to_manager(self) -> None:
        """The service manager keeps what is open for whom it starts next, and the rest since it was made."""
        for inode, fd in self.held.items():
            systemd.keep(f"{_HELD_NAME}{inode:x}", fd)

    def wind_up(self, settings: MountConfig) -> None:
        """Take away what is left of it once nobody serves."""
        for path, inode in self.places.items():
            with contextlib.suppress(OSError):
                if os.stat(path).st_ino == inode:  # else another mount has its own there by now
                    os.unlink(path)
        if self.is_kept and not mounts.find(settings.mountpoint):
            for name in _NAMES:
                systemd.discard(name)


def _has_keeper() -> bool:
    """Whether a service manager listens, and was told to keep descriptors (the unit says so to both)."""
    return bool(os.environ.get("WEIGHTFS_FD_STORE")) and bool(os.environ.get("NOTIFY_SOCKET"))


def _socket_of(fd: int | None) -> socket.socket | None:
    return socket.socket(fileno=fd) if fd is not None else None


def _is_dead(kernel_fd: int) -> bool:
    # Asked, not watched: a watcher would be woken by every request.
    poll = select.poll()
    poll.register(kernel_fd, 0)
    return bool(poll.poll(0))
