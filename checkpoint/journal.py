"""What a command has begun: written before each step, so that whoever comes after its death can complete or undo it.

A journal is a file in the runtime folder (`checkpoint.runtime`): processes do not outlive the machine's uptime, and
neither need it. Its owner holds a flock on it; one that is not locked was left by a command that died.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from checkpoint import guarded, locking, runtime
from checkpoint.errors import CheckpointError

_FOLDER: Final = "checkpoint"
_SUFFIX: Final = ".json"


class Entry(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What is under way.

    Attributes:
        kind: `create` or `restore`.
        step: the last one that was begun; see `creation` and `restoration`.
        name: of the snapshot.
        store: its folder.
        images: the folder CRIU writes to or reads.
        tree: (pid, start in clock ticks) of every process; of a restore, empty.
        root: pid of the root.
        command: the root's command line.
        cuda: the number of the state in which each CUDA process was found, by pid.
        leave_running: a create's option.
        own_pids: its processes are numbered in a pid namespace of their own, which ends with the command.
        since_ticks: clock ticks since boot when it began.
        id: the snapshot will have.
        started: the tree was started for the snapshot; undone, it ends.
        point: the folder through which the root speaks (`points`), empty without.
        work: the folder for what CRIU says, which goes with the journal.
        stuck: why it could be neither completed nor undone when that was tried last; empty where it was not tried.
    """

    kind: str
    step: str = "begun"
    name: str
    store: str
    images: str = ""
    tree: list[tuple[int, int]] = []
    root: int = 0
    command: list[str] = []
    cuda: dict[int, int] = {}
    leave_running: bool = False
    since_ticks: int = 0
    own_pids: bool = False
    id: str = ""
    started: bool = False
    point: str = ""
    work: str = ""
    stuck: str = ""


class Journal:
    """One command's journal, a context manager: what leaves it has come to an end that needs no recovery.

    Left with an error that says `is_half_done` it stays, for `weightfs snapshot recover`.

    Args:
        entry: what is begun.

    Attributes:
        entry: what is written; `at` changes it.

    Raises:
        CorruptError: others could have written in the folder for journals.
        CheckpointError: that can't be made, or nothing be written there.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self._nbytes = 0
        self._path, self._fd = _begun(runtime.made(_FOLDER))
        entry.work = self._path.removesuffix(_SUFFIX)
        self._write()
        try:
            os.mkdir(entry.work, 0o700)
        except OSError as e:
            raise guarded.unwritable(entry.work, e) from e

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        if isinstance(error, CheckpointError) and error.is_half_done:
            note_stuck(self._path, self.entry, error)
        else:
            finish(self._path)
        os.close(self._fd)

    def at(self, step: str, **changes: Any) -> None:
        """A step begins; `changes` are to the entry.

        Raises:
            CheckpointError: it can't be written.
        """
        self.entry.step = step
        for key, value in changes.items():
            setattr(self.entry, key, value)
        self._write()

    def _write(self) -> None:
        # Behind the lines before, of which the last whole one counts: a signal may cut a write short, and so may a disk
        # that is full. The lock is the file's, so another can't take its place.
        content = msgspec.json.encode(self.entry) + b"\n"
        try:
            if os.pwrite(self._fd, content, self._nbytes) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as e:
            raise guarded.unwritable(self._path, e) from e
        self._nbytes += len(content)


def _begun(folder: str) -> tuple[str, int]:
    """A new journal, locked, with its path. Whoever looks for those that were left over may lock or remove it first."""
    while True:
        path = os.path.join(folder, f"{os.urandom(8).hex()}{_SUFFIX}")
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise guarded.unwritable(path, e) from e
        if locking.flock(fd, fcntl.LOCK_EX, 0) and locking.leads_to(path, fd):
            return path, fd
        os.close(fd)


def left_over() -> Iterator[tuple[str, Entry]]:
    """Journals of commands that died, each locked while it is dealt with; gives its path and entry.

    Raises:
        CorruptError: others could have written where they lie.
        CheckpointError: they can't be read; or one of them, when all others were dealt with.
    """
    unread: CheckpointError | None = None
    folder = runtime.path_of(_FOLDER)
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return
    except OSError as e:
        raise CheckpointError(f"can't be read: {os.strerror(e.errno or 0)}", path=folder) from e
    guarded.require_path_ours(folder)
    for name in names:
        if not name.endswith(_SUFFIX):
            continue
        path = os.path.join(folder, name)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            content = os.pread(fd, os.fstat(fd).st_size, 0).rpartition(b"\n")[0].rpartition(b"\n")[2]
            if not content or not os.path.exists(path):  # it died before it began anything, or ended meanwhile
                finish(path)
                continue
            try:
                entry = msgspec.json.decode(content, type=Entry)
            except msgspec.DecodeError as e:
                mend = "look what is stopped (ps -e), then remove it"
                unread = CheckpointError(f"can't be read: {e}", path=path, mend=mend)
                continue
            yield path, entry
        except BlockingIOError:
            continue
        finally:
            os.close(fd)
    if unread is not None:
        raise unread


def note_stuck(path: str, entry: Entry, why: CheckpointError) -> None:
    """Note in a journal that what it tells of can't be put right for now. It stays also where that can't be written."""
    entry.stuck = str(why)
    with contextlib.suppress(OSError), open(path, "ab", buffering=0) as file:
        file.write(b"\n" + msgspec.json.encode(entry) + b"\n")  # what was cut short may be before it


def finish(path: str) -> None:
    """What a journal tells of has come to an end, or was dealt with."""
    shutil.rmtree(path.removesuffix(_SUFFIX), ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
