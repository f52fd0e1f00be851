"""Mounting, unmounting, and what /proc says is mounted."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import re
import shutil
import socket
import stat
import subprocess
from dataclasses import dataclass
from typing import Final

from weightfs import linux
from weightfs.errors import BusyError, UnfitError, UsageError, WeightfsError

FSTYPE: Final = "fuse.weightfs"
_ANSWER_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Mounted:
    """A weightfs mount, from /proc/self/mountinfo."""

    mountpoint: str
    source: str
    device: str


@dataclass(frozen=True, slots=True)
class TableRow:
    """Any mount of this mount namespace: a line of /proc/self/mountinfo (proc(5)).

    Attributes:
        number, parent: its own number and that of the mount it stands on.
        is_shared: whether what is mounted on it shows in namespaces that were made from this one.
    """

    number: int
    parent: int
    device: str
    mountpoint: str
    is_shared: bool
    fstype: str
    source: str


def mount_table() -> list[TableRow]:
    """Every mount of this mount namespace, in the order in which they were mounted."""
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            before, separator, after = line.rstrip("\n").partition(" - ")
            if not separator:
                continue
            fields, (fstype, source) = before.split(" "), after.split(" ")[:2]
            is_shared = any(field.startswith("shared:") for field in fields[6:])
            number, parent = int(fields[0]), int(fields[1])
            found.append(
                TableRow(number, parent, fields[2], _unescape(fields[4]), is_shared, fstype, _unescape(source))
            )
    return found


def mounted() -> list[Mounted]:
    """The weightfs mounts of this mount namespace."""
    return [Mounted(row.mountpoint, row.source, row.device) for row in mount_table() if row.fstype == FSTYPE]


def find(mountpoint: str) -> Mounted | None:
    """The weightfs mount at a path, the topmost one."""
    return next((mount for mount in reversed(mounted()) if mount.mountpoint == mountpoint), None)


def is_privileged() -> bool:
    """Whether this process may mount by itself."""
    return linux.has_capability(linux.CAP_SYS_ADMIN)


def passthrough_refusal() -> str | None:
    """Why the kernel would not let this process set passthrough up, whatever its version; None if it would."""
    if not is_privileged():
        return "passthrough needs CAP_SYS_ADMIN"
    if not linux.in_initial_user_namespace():
        return "passthrough needs the machine's own user namespace, not a container's"
    return None


def clear_stale(mountpoint: str) -> bool:
    """Take away the mount of a daemon that died, and examine the folder to mount on; gives whether there was one.

    Raises:
        UsageError: the folder does not exist, or is no folder.
        WeightfsError: a living weightfs is mounted there.
        BusyError: one that does not answer is.
    """
    try:
        entry = os.stat(mountpoint)
    except OSError as e:
        if e.errno not in (errno.ENOTCONN, errno.ECONNABORTED) or find(mountpoint) is None:
            raise UsageError(
                f"can't mount there: {os.strerror(e.errno or 0)}", path=mountpoint, mend="create the folder first"
            ) from e
        unmount(mountpoint, lazy=True)
        return True
    if not stat.S_ISDIR(entry.st_mode):
        raise UsageError("can't mount there: it is not a folder", path=mountpoint, mend="name an existing folder")
    if find(mountpoint) is None:
        return False
    # stat(2) may have been answered from the kernel's cache after the daemon died; statfs(2) never is.
    try:
        asked = subprocess.run(["stat", "-f", "--", mountpoint], capture_output=True, timeout=_ANSWER_S, check=False)
    except subprocess.TimeoutExpired:
        raise BusyError(
            "a weightfs is mounted there that does not answer",
            path=mountpoint,
            mend=f"weightfs umount --lazy {mountpoint}",
        ) from None
    if asked.returncode == 0:
        raise WeightfsError(
            "a weightfs is mounted there already", path=mountpoint, mend=f"weightfs umount {mountpoint}, or --replace"
        )
    unmount(mountpoint, lazy=True)
    return True


def mount(source: str, mountpoint: str, *, for_others: bool) -> int:
    """Mount and give the kernel's descriptor, non-blocking; the caller owns it.

    With CAP_SYS_ADMIN by mount(2), else through fusermount3, which is setuid and hands the descriptor back.

    Raises:
        UnfitError: no /dev/fuse, or neither way works.
    """
    if is_privileged():
        try:
            fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as e:
            raise UnfitError(
                f"can't open it: {os.strerror(e.errno or 0)}", path="/dev/fuse", mend="modprobe fuse"
            ) from e
        options = f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},default_permissions"
        try:
            flags = linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV
            linux.mount(source, mountpoint, FSTYPE, flags, options + (",allow_other" if for_others else ""))
        except OSError as e:
            os.close(fd)
            raise UnfitError(f"mount(2) failed: {os.strerror(e.errno or 0)}", path=mountpoint) from e
        return fd
    return _fusermount(source, mountpoint, for_others)


def _fusermount(source: str, mountpoint: str, for_others: bool) -> int:
    helper = shutil.which("fusermount3")
    if helper is None:
        raise UnfitError("not root, and there is no fusermount3", path=mountpoint, mend="apt-get install fuse3")
    theirs, ours = socket.socketpair()
    escaped = source.replace("\\", "\\\\").replace(",", "\\,")
    options = f"ro,nosuid,nodev,default_permissions,subtype=weightfs,fsname={escaped}" + (
        ",allow_other" if for_others else ""
    )
    with theirs, ours:
        done = subprocess.run(
            [helper, "-o", options, "--", mountpoint],
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
            pass_fds=[theirs.fileno()],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise UnfitError(f"fusermount3 failed: {done.stderr.strip()}", path=mountpoint)
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(4))
    fds = array.array("i", ancillary[0][2])
    os.set_blocking(fds[0], False)
    os.set_inheritable(fds[0], False)
    return fds[0]


def unmount(mountpoint: str, *, lazy: bool = False, tell_users: bool = True) -> None:
    """Unmount; `lazy` takes the name away at once and lets users finish. `tell_users` looks through /proc for them.

    Raises:
        BusyError: someone uses it.
        WeightfsError: it is not ours to unmount, or something else failed.
    """
    try:
        if is_privileged():
            linux.umount(mountpoint, linux.MNT_DETACH if lazy else 0)
            return
    except OSError as e:
        if e.errno == errno.EBUSY:
            raise BusyError(
                f"is in use{_by_whom(mountpoint) if tell_users else ''}",
                path=mountpoint,
                mend=f"weightfs umount --lazy {mountpoint}",
            ) from e
        raise WeightfsError(f"can't unmount it: {os.strerror(e.errno or 0)}", path=mountpoint) from e
    helper = shutil.which("fusermount3")
    if helper is None:
        raise UnfitError("not root, and there is no fusermount3", path=mountpoint, mend="apt-get install fuse3")
    done = subprocess.run(
        [helper, "-u", *(["-z"] if lazy else []), "--", mountpoint], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = done.stderr.strip()
        kind = BusyError if "busy" in reason else WeightfsError
        raise kind(f"can't unmount it: {reason}", path=mountpoint, mend=f"weightfs umount --lazy {mountpoint}")


def take_away(mountpoint: str, device: str) -> bool:
    """Unmount one mount, lazily if it is in use, and no other that is at its place by now; gives whether lazily."""
    here = find(mountpoint)
    if here is None or here.device != device:
        return False
    try:
        unmount(mountpoint, tell_users=False)
    except WeightfsError:
        with contextlib.suppress(WeightfsError):
            unmount(mountpoint, lazy=True)
        return True
    return False


def is_stuck(mountpoint: str) -> bool:
    """Whether who asks a mount waits for ever, or for long at least."""
    try:
        subprocess.run(["stat", "-f", "--", mountpoint], capture_output=True, timeout=_ANSWER_S, check=False)
    except subprocess.TimeoutExpired:
        return True
    return False


def abort(mountpoint: str) -> None:
    """End a mount's connection, so that everybody who waits for an answer gets an error; it stays mounted, and dead.

    For one whose daemon can't answer any more. Needs CAP_SYS_ADMIN; without it nothing happens.
    """
    with contextlib.suppress(OSError):  # EBUSY: that is after the abort, when it is in use
        linux.umount(mountpoint, linux.MNT_FORCE)


def _by_whom(mountpoint: str) -> str:
    """` by pid 12, 34`, as far as /proc shows it without touching the mount itself."""
    users = []
    inside = re.compile(re.escape(mountpoint) + r"(/|$)")
    for pid in filter(str.isdigit, os.listdir("/proc")):
        links = [f"/proc/{pid}/cwd", f"/proc/{pid}/root"]
        try:
            links += [f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd")]
        except OSError:
            continue
        for link in links:
            try:
                if inside.match(os.readlink(link)):
                    users.append(pid)
                    break
            except OSError:
                continue
    return f" by pid {', '.join(users[:10])}" if users else ""


def raise_readahead(mounted_at: Mounted, kib: int) -> bool:
    """Let the kernel read that far ahead on a mount (the default is 128 KiB); False where that is not permitted."""
    try:
        with open(f"/sys/class/bdi/{mounted_at.device}/read_ahead_kb", "w") as setting:
            setting.write(str(kib))
    except OSError:
        return False
    return True


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)
