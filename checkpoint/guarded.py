"""Folders and files that nobody else could have written."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from typing import Final

from checkpoint.errors import CheckpointError, CorruptError

FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


def require_ours(found: os.stat_result, path: str) -> None:
    """Refuse what another user owns or may write.

    Raises:
        CorruptError: he does or may.
    """
    if found.st_uid not in (0, os.geteuid()):
        raise CorruptError(
            f"belongs to user {found.st_uid}, who could have changed it",
            path=path,
            mend="if you trust it all the same, make it yours with chown",
        )
    if stat.S_IMODE(found.st_mode) & 0o022:
        raise CorruptError(
            f"may be written by others (mode {stat.S_IMODE(found.st_mode):04o})",
            path=path,
            mend="if you trust it all the same, take that away with chmod go-w",
        )


def require_path_ours(path: str) -> None:
    """Refuse a folder that others could have put in another's place: it and all above it must be ours or root's.

    A folder that others may write passes when its sticky bit keeps them from our entries, as in /tmp.

    Raises:
        CorruptError: one is not.
        CheckpointError: one can't be examined.
    """
    current = os.path.realpath(path)
    is_above = False
    while True:
        try:
            found = os.stat(current)
        except OSError as e:
            raise CheckpointError(f"can't be examined: {os.strerror(e.errno or 0)}", path=current) from e
        if not (is_above and found.st_uid in (0, os.geteuid()) and found.st_mode & stat.S_ISVTX):
            require_ours(found, current)
        if current == "/":
            return
        current, is_above = os.path.dirname(current), True


@contextlib.contextmanager
def opened(name: str, flags: int, path: str, *, dir_fd: int | None = None) -> Iterator[int]:
    """A descriptor of a folder (`FOLDER`) or file (`FILE`) that is ours, closed at the end.

    Args:
        name: below `dir_fd`.
        flags: of open(2).
        path: of the whole, for errors.
        dir_fd: an open folder.

    Raises:
        CorruptError: it is a symlink or of another kind, or others may write it.
        CheckpointError: it can't be opened.
    """
    try:
        fd = os.open(name, flags, dir_fd=dir_fd)
    except OSError as e:
        raise unreadable(path, e) from e
    try:
        found = os.fstat(fd)
        if flags == FILE and not stat.S_ISREG(found.st_mode):
            raise CorruptError("is no regular file", path=path, mend="make the snapshot anew")
        require_ours(found, path)
        yield fd
    finally:
        os.close(fd)


def unreadable(path: str, error: OSError) -> CheckpointError:
    """The error for what can't be read: a CorruptError where the entry's kind, or that there is none, is the reason."""
    message = f"can't be read: {os.strerror(error.errno or 0)}"
    if error.errno in _NOT_WHAT_WAS_WRITTEN:
        return CorruptError(message, path=path, mend="make the snapshot anew")
    return CheckpointError(message, path=path)


def unwritable(path: str, error: OSError) -> CheckpointError:
    """The error for what can't be made, written or removed."""
    return CheckpointError(f"can't be written: {os.strerror(error.errno or 0)}", path=path)


# ELOOP is a symlink where O_NOFOLLOW forbids it; ENXIO a socket.
_NOT_WHAT_WAS_WRITTEN: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.EISDIR})
