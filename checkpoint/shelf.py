"""The folder of a store: who has locked what lies there, and what is left over. What it holds: `checkpoint.store`."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from typing import Final

from checkpoint import guarded, manifest
from checkpoint.errors import RetryError, SnapshotNameError
from checkpoint.locking import flock, leads_to

DRAFT: Final = ".draft."
REMOVED: Final = ".removed."
CHUNKS: Final = ".chunks"
CHUNKS_OPEN: Final = ".chunks-open"
"""Folders of packs: of what is encrypted, and of what is not."""
_STORE_S: Final = 10.0


class Shelf:
    """Names in a folder. Every method may be called from any process at any time.

    Args:
        path: the folder.

    Attributes:
        path: absolute.
    """

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)

    def names(self) -> tuple[str, ...]:
        """What lies in the store, in order: mostly snapshots.

        Raises:
            CheckpointError: the store can't be read.
        """
        try:
            return tuple(sorted(name for name in os.listdir(self.path) if not name.startswith(".")))
        except FileNotFoundError:
            return ()
        except OSError as e:
            raise guarded.unreadable(self.path, e) from e

    @contextlib.contextmanager
    def lock(self, name: str, *, shared: bool = False, timeout_s: float = 0) -> Iterator[None]:
        """Keep a snapshot from being removed or replaced, and (not shared) from being used.

        Args:
            name: of the snapshot.
            shared: whether others may hold it so as well.
            timeout_s: how long to wait for whoever holds it, in seconds.

        Raises:
            SnapshotNameError: there is none.
            RetryError: it is held.
        """
        manifest.require_name(name)
        folder = self._at(name)
        how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        until = time.monotonic() + timeout_s
        while True:
            try:
                fd = os.open(folder, guarded.FOLDER)
            except FileNotFoundError as e:
                raise self._unknown(name) from e
            except OSError as e:
                raise guarded.unreadable(folder, e) from e
            try:
                if not flock(fd, how, until):
                    raise RetryError(
                        "is in use", path=folder, mend="try again when it is neither restored nor replaced"
                    )
                if leads_to(folder, fd):  # and was not replaced while it was waited for
                    yield
                    return
            finally:
                os.close(fd)

    def recover(self) -> tuple[str, ...]:
        """Remove what processes that died have left; gives the names of the snapshots they were making or removing.

        What CRIU still writes must be ended before.

        Raises:
            CheckpointError: it can't be removed.
        """
        if not os.path.isdir(self.path):
            return ()
        removed = []
        with self._locked() as store_fd:
            for left in self._left(store_fd, DRAFT) + self._left(store_fd, REMOVED):
                if self._is_left_over(store_fd, left):
                    try:
                        remove(self._at(left))
                    except OSError as e:
                        raise guarded.unwritable(self._at(left), e) from e
                    removed.append(_name_of(left))
        self._sweep_chunks()
        return tuple(removed)

    def _sweep_chunks(self) -> None:
        """Remove packs that were never completed, unless somebody makes a snapshot now: then the next one does it."""
        for path in (self._at(CHUNKS), self._at(CHUNKS_OPEN)):
            if os.path.isdir(path) and any(name.startswith(DRAFT) for name in os.listdir(path)):
                from checkpoint.chunks.folder import Folder  # libraries that are hardly ever needed for this

                folder = Folder(path, None)
                with contextlib.suppress(RetryError), folder.locked(fcntl.LOCK_EX, 0):
                    folder.sweep()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """The store's own lock, held for moments; gives a descriptor of its folder."""
        guarded.require_path_ours(self.path)
        with guarded.opened(self.path, guarded.FOLDER & ~os.O_NOFOLLOW, self.path) as fd:
            if not flock(fd, fcntl.LOCK_EX, time.monotonic() + _STORE_S):
                raise RetryError("is locked by another process", path=self.path, mend="try again")
            yield fd

    def _left(self, store_fd: int, prefix: str) -> tuple[str, ...]:
        return tuple(sorted(name for name in os.listdir(store_fd) if name.startswith(prefix)))

    def _sweep(self) -> None:
        """Remove what is left of snapshots that were removed or replaced; what can't be is left to the next one."""
        guarded.require_path_ours(self.path)
        for name in os.listdir(self.path):
            if name.startswith(REMOVED):
                with contextlib.suppress(OSError):
                    remove(self._at(name))

    def _is_left_over(self, store_fd: int, temporary: str) -> bool:
        try:
            fd = os.open(temporary, guarded.FOLDER, dir_fd=store_fd)
        except OSError:  # no folder: nobody makes a snapshot in it
            return True
        try:
            return flock(fd, fcntl.LOCK_EX, 0)
        finally:
            os.close(fd)

    def _require_not_made(self, store_fd: int, name: str) -> None:
        for left in self._left(store_fd, DRAFT):
            if _name_of(left) == name and not self._is_left_over(store_fd, left):
                raise RetryError("is being made by another process", path=self._at(name), mend="wait until it is done")

    def _require_free(self, name: str) -> None:
        if os.path.lexists(self._at(name)):
            raise SnapshotNameError(
                "there is a snapshot of that name already", path=self._at(name), mend="use --replace or another name"
            )

    def _unknown(self, name: str) -> SnapshotNameError:
        return SnapshotNameError(
            f"there is no snapshot {name!r}", path=self.path, mend="weightfs snapshot list shows those there are"
        )

    def _at(self, name: str) -> str:
        return os.path.join(self.path, name)


def temporary(prefix: str, name: str) -> str:
    """A new name for what has no name of its own yet, or any more."""
    return f"{prefix}{name}.{os.urandom(4).hex()}"


def _name_of(temporary: str) -> str:
    return temporary.split(".", 2)[2].rpartition(".")[0]


def remove(path: str) -> None:
    """Remove a folder or anything else, whoever else is at it as well."""
    if os.path.islink(path) or not os.path.isdir(path):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        return
    while True:
        try:
            shutil.rmtree(path)
        except FileNotFoundError:  # somebody else was faster with a part of it
            if os.path.lexists(path):
                continue
        return
