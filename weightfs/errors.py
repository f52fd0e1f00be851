"""Every error weightfs raises on purpose.

    WeightfsError                    exit 1, EIO
    ├── UsageError                   exit 2            a command line or configuration that makes no sense
    ├── UnfitError                   exit 3            this machine lacks something
    ├── BusyError                    exit 75           try again
    ├── IntegrityError               exit 4   EIO      bytes are not what they claim to be
    │   ├── FormatError                                a header that does not describe its file
    │   └── ShortReadError                             the source gave fewer bytes than it promised
    ├── IndexStoreError                                the index can't be used
    └── EntryError                                     what a filesystem call answers
        ├── NotFoundError                     ENOENT
        ├── NotADirectoryEntryError           ENOTDIR
        ├── IsADirectoryEntryError            EISDIR
        ├── NotASymlinkError                  EINVAL
        ├── StaleError                        ESTALE   the nodeid names content that is no longer there
        ├── ReadOnlyError                     EROFS
        ├── NoAttributeError                  ENODATA
        ├── ForbiddenError                    EACCES
        ├── UnsupportedError                  EOPNOTSUPP
        └── DeadlineError                     EIO

Errnos live in one table, in `weightfs.fuse`; exit codes are class attributes here because every command shares them.
"""

from __future__ import annotations

from typing import ClassVar


class WeightfsError(Exception):
    """Root of the tree.

    Args:
        message: what went wrong and why, one line, no trailing period.
        path: the file or folder it is about, if any.
        mend: what the user can do about it, one line, if known.
    """

    exit_code: ClassVar[int] = 1
    code: ClassVar[str] = "failed"

    def __init__(self, message: str, *, path: str | None = None, mend: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.path = path
        self.mend = mend

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class UsageError(WeightfsError):
    """A command line or configuration that makes no sense."""

    exit_code = 2
    code = "usage"


class UnfitError(WeightfsError):
    """This machine lacks a capability the command needs."""

    exit_code = 3
    code = "unfit"


class BusyError(WeightfsError):
    """The command may succeed later, unchanged."""

    exit_code = 75
    code = "busy"


class IntegrityError(WeightfsError):
    """Bytes are not what they claim to be."""

    exit_code = 4
    code = "integrity"


class FormatError(IntegrityError):
    """A header that does not describe its file.

    Args:
        reason: a stable word for scripts, such as `header-length` or `tensor-overlap`.
        message: what is wrong, with the values found.
        offset: the byte in the file at which the fault shows.
        path: the file, filled in by whoever knows it.
    """

    def __init__(self, reason: str, message: str, *, offset: int, path: str | None = None) -> None:
        super().__init__(message, path=path)
        self.reason = reason
        self.offset = offset

    def __str__(self) -> str:
        return f"{super().__str__()} (at byte {self.offset})"


class ShortReadError(IntegrityError):
    """The source gave fewer bytes than it promised: never passed on, since the kernel would fill up with zeros."""


class IndexStoreError(WeightfsError):
    """The index can't be opened, read or written."""

    code = "index"


class EntryError(WeightfsError):
    """A filesystem call that can't be carried out."""

    code = "entry"


class NotFoundError(EntryError):
    """No entry of that name."""


class NotADirectoryEntryError(EntryError):
    """A directory operation on something else."""


class IsADirectoryEntryError(EntryError):
    """A file operation on a directory."""


class NotASymlinkError(EntryError):
    """readlink on something else."""


class StaleError(EntryError):
    """The nodeid names content that is no longer there; the kernel looks the name up again."""


class ReadOnlyError(EntryError):
    """The mount never writes."""


class NoAttributeError(EntryError):
    """No extended attribute of that name."""


class ForbiddenError(EntryError):
    """The entry leads out of the source."""


class UnsupportedError(EntryError):
    """The entry exists, but can't be opened through the mount (a FIFO, socket or device)."""


class DeadlineError(EntryError):
    """The source did not answer in time."""
