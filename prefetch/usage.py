"""Which files some process has open or mapped: what is in use is not evicted.

A closed handle may still be mapped, and the kernel tells a filesystem of neither, so /proc is read: `maps` and `fd` of
every process. What is mapped through a mount with passthrough may show there as the mount's inode or as the backing
one, depending on the kernel; what is open shows as the one it was opened by. So a file that a mount shows has two keys,
and whoever asks passes both.

It is a look, not a lock: a file may be opened a moment later. That costs its reader time and never a byte, since the
kernel passes over pages that are mapped when it drops a file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from weightfs import linux

Key = tuple[int, int]
"""`st_dev` and `st_ino`."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What was found.

    Attributes:
        in_use: those of the keys asked for that some process has open or mapped.
        unreadable: pids of processes whose mappings can't be read for lack of rights: they may use any of the files.
    """

    in_use: frozenset[Key]
    unreadable: frozenset[int]


def files_in_use(keys: Collection[Key], excluded: Collection[int] = (), *, root: str = "/") -> Usage:
    """Which of these files are in use by processes other than this one. Blocks (tens of ms): for a worker thread.

    Processes of other PID namespaces than the one of `root`'s /proc and those below can't be seen. No filesystem is
    asked, so a mount that does not answer does not matter.

    Args:
        keys: what to look for.
        excluded: pids that do not count beside this one: the mount's daemon and supervisor.
        root: holds `proc`.
    """
    wanted = {b"%02x:%02x %d" % (os.major(device), os.minor(device), inode): (device, inode) for device, inode in keys}
    if not wanted:
        return Usage(frozenset(), frozenset())
    devices = sorted({b"%02x:%02x" % (os.major(device), os.minor(device)) for device, _ in keys})
    mapping = re.compile(rb" ((?:%s) \d+)[ \n]" % b"|".join(devices))
    proc = os.fsencode(os.path.join(root, "proc"))
    left_out = {os.getpid(), *excluded}
    sought = frozenset(wanted.values())
    in_use: set[Key] = set()
    unreadable: set[int] = set()
    for name in os.listdir(proc):
        if not name.isdigit() or int(name) in left_out:
            continue
        try:
            in_use.update(sought.intersection(_open_files(b"%s/%s/fd" % (proc, name))))
            in_use.update(wanted[found] for found in set(mapping.findall(_maps(proc, name))) if found in wanted)
        except PermissionError:
            unreadable.add(int(name))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
    return Usage(frozenset(in_use), frozenset(unreadable))


def _maps(proc: bytes, name: bytes) -> bytes:
    """A process's mappings, read once; of its other threads where the first one has ended before them."""
    text = _read(b"%s/%s/maps" % (proc, name))
    if text:
        return text
    for thread in os.listdir(b"%s/%s/task" % (proc, name)):
        if thread != name and (text := _read(b"%s/%s/task/%s/maps" % (proc, name, thread))):
            return text
    return b""  # a thread of the kernel, or a process that has ended and was not waited for


def _read(path: bytes) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return b"".join(iter(lambda: os.read(fd, 1 << 18), b""))
    finally:
        os.close(fd)


def _open_files(folder: bytes) -> Iterator[Key]:
    for number in os.listdir(folder):
        try:
            yield linux.known_identity(b"%s/%s" % (folder, number))
        except OSError:
            continue  # closed meanwhile
