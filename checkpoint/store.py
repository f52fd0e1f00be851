"""Where snapshots lie: a folder each, written under a temporary name, and renamed when it is complete and on the disk.

    STORE/                      0700
        .chunks/, .chunks-open/ see `checkpoint.contents`
        NAME/                   0700; it has this name only when all of it is on the disk
            manifest.json       0600
            images/             0700; what CRIU wrote, flat: of a plain one
            recipes             0600; of every other: what these files are made of
        .draft.NAME.RANDOM/     being written, or left over by a process that died
        .removed.NAME.RANDOM/   removed or replaced; whoever finds it removes the rest

Nothing else changes what is in a snapshot. Whoever makes one holds a flock on its draft's folder, whoever restores one
a shared flock on its folder, whoever removes or replaces one an exclusive one; the kernel drops them with the process.
Programs that are executed do not inherit the descriptors. What has a temporary name and is not locked is left over.

A process may be killed at any instruction: under NAME there is then the old snapshot, the new one, or (if there was no
old one) none. `recover` removes what is left over. Whoever needs both locks takes the store's last.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import shutil
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import msgspec

from checkpoint import guarded, manifest
from checkpoint.drafts import Draft
from checkpoint.errors import CheckpointError, MisfitError, RetryError, SnapshotNameError
from checkpoint.locking import flock, leads_to
from checkpoint.snapshots import IMAGES, Snapshot, examined
from weightfs import linux

if TYPE_CHECKING:
    from checkpoint.chunks.keys import MasterKey
    from checkpoint.chunks.packs import Pruned

__all__ = ["DEFAULT", "Draft", "Listed", "Snapshot", "Store"]

DEFAULT: Final = "/var/lib/weightfs/snapshots"
_DRAFT: Final = ".draft."
_REMOVED: Final = ".removed."
CHUNKS: Final = ".chunks"
CHUNKS_OPEN: Final = ".chunks-open"
"""Folders of packs: of what is encrypted, and of what is not."""
_STORE_S: Final = 10.0
_IN_USE_S: Final = 30.0
"""For a restore to end: it holds its snapshot until its process answers."""


class Listed(msgspec.Struct, frozen=True, kw_only=True):
    """A name in the store.

    Attributes:
        name: of the snapshot.
        snapshot: what lies there, None where that can't be used.
        fault: why it can't.
    """

    name: str
    snapshot: Snapshot | None
    fault: CheckpointError | None


class Store:
    """The snapshots in a folder. Every method may be called from any process at any time.

    Args:
        path: the folder; `begin` makes it if need be.
    """

    def __init__(self, path: str = DEFAULT) -> None:
        self.path = os.path.abspath(path)

    def require_new(self, name: str, *, replace: bool) -> None:
        """Refuse a name before a process is started for it; see `begin`."""
        manifest.require_name(name)
        if not replace:
            self._require_free(name)

    def begin(self, name: str, *, replace: bool = False) -> Draft:
        """Begin a snapshot.

        Args:
            name: see `manifest.require_name`.
            replace: whether one that has that name makes way when the new one is complete.

        Raises:
            SnapshotNameError: it can't be a name, or there is one already that is not to be replaced.
            RetryError: one of that name is being made; or it is to be replaced, and is still in use after 30 s. Nobody
                else can use it then until the draft ends: whoever makes the new one may have stopped a process for it,
                and could not wait.
            CorruptError: others may write the store.
            CheckpointError: the store can't be written.
        """
        manifest.require_name(name)
        try:
            os.makedirs(self.path, mode=0o700, exist_ok=True)
        except OSError as e:
            raise guarded.unwritable(self.path, e) from e
        self._sweep()
        with contextlib.ExitStack() as held:
            is_kept = replace and self._keep(name, held)
            with self._locked() as store_fd:
                if not replace:
                    self._require_free(name)
                self._require_not_made(store_fd, name)
                folder = self._at(_temporary(_DRAFT, name))
                lock_fd = -1
                try:
                    os.mkdir(folder, 0o700)
                    lock_fd = os.open(folder, guarded.FOLDER)
                    flock(lock_fd, fcntl.LOCK_EX, 0)
                    os.mkdir(IMAGES, 0o700, dir_fd=lock_fd)
                except OSError as e:
                    if lock_fd >= 0:
                        os.close(lock_fd)
                    shutil.rmtree(folder, ignore_errors=True)
                    raise guarded.unwritable(folder, e) from e
            publish = functools.partial(self._publish, folder, name, replace=replace, is_kept=is_kept)
            return Draft(name, folder, lock_fd, publish, self._sweep, held.pop_all())

    def open(self, name: str) -> Snapshot:
        """A snapshot; examined, but its images are not read: see `Snapshot.verify`.

        Hold `lock(name, shared=True)` for as long as it is used.

        Raises:
            SnapshotNameError: there is none.
            CorruptError: it is not what the store wrote, or others could have written it.
            MisfitError: a newer weightfs wrote it.
        """
        manifest.require_name(name)
        folder = self._at(name)
        if not os.path.lexists(folder):
            raise self._unknown(name)
        guarded.require_path_ours(self.path)
        return examined(name, folder)

    def verify(self, name: str, master: MasterKey | None = None) -> Snapshot:
        """A snapshot whose every byte is what was written; errors are those of `open`, and of reading all of it.

        Args:
            name: of the snapshot.
            master: the key it is encrypted with; None where it must not be encrypted.
        """
        with self.lock(name, shared=True):
            snapshot = self.open(name)
            if snapshot.manifest.content == "plain":
                snapshot.require_not_encrypted(master)
                snapshot.verify()
            else:
                from checkpoint import contents  # libraries that those who only look at names do not need

                contents.Vault(self.path, master).verify(snapshot)
            return snapshot

    def collect(self, master: MasterKey | None) -> Pruned:
        """Remove chunks that no snapshot needs.

        Args:
            master: the key they are encrypted with; None for those that are not.

        Raises:
            RetryError: a snapshot is being made.
            CorruptError: the recipes of one can't be read, so that what it needs is not known.
            CheckpointError: chunks can't be read or written. No chunk that is needed went.
        """
        from checkpoint import contents
        from checkpoint.chunks.packs import Pruned

        vault = contents.Vault(self.path, master)
        if not os.path.isdir(vault.packs.folder.path):
            return Pruned(removed=0, rewritten=0, freed_nbytes=0, faults={})
        return vault.packs.prune(contents.live_chunks(vault, self._usable))

    def list(self) -> tuple[Listed, ...]:
        """All snapshots by name; one that can't be used comes with the reason. A store that is not there is empty.

        Raises:
            CheckpointError: the store can't be read.
        """
        return tuple(one for name in self.names() if (one := self._listed(name)) is not None)

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

    def remove(self, name: str) -> None:
        """Remove a snapshot, whatever state it is in.

        Raises:
            SnapshotNameError: there is none.
            RetryError: it is in use.
            CheckpointError: it can't be removed.
        """
        manifest.require_name(name)
        folder = self._at(name)
        if not os.path.lexists(folder):
            raise self._unknown(name)
        with contextlib.ExitStack() as held:
            if os.path.isdir(folder) and not os.path.islink(folder):
                held.enter_context(self.lock(name))
            try:
                with self._locked() as store_fd:
                    removed = self._at(_temporary(_REMOVED, name))
                    os.rename(folder, removed)
                    os.fsync(store_fd)
                _remove(removed)
            except FileNotFoundError as e:
                raise self._unknown(name) from e
            except OSError as e:
                raise guarded.unwritable(folder, e) from e
        self._sweep()

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
            for left in self._left(store_fd, _DRAFT) + self._left(store_fd, _REMOVED):
                if self._is_left_over(store_fd, left):
                    try:
                        _remove(self._at(left))
                    except OSError as e:
                        raise guarded.unwritable(self._at(left), e) from e
                    removed.append(_name_of(left))
        self._sweep_chunks()
        return tuple(removed)

    def _sweep_chunks(self) -> None:
        """Remove packs that were never completed, unless somebody makes a snapshot now: then the next one does it."""
        for path in (self._at(CHUNKS), self._at(CHUNKS_OPEN)):
            if os.path.isdir(path) and any(name.startswith(_DRAFT) for name in os.listdir(path)):
                from checkpoint.chunks.folder import Folder  # libraries that are hardly ever needed for this

                folder = Folder(path, None)
                with contextlib.suppress(RetryError), folder.locked(fcntl.LOCK_EX, 0):
                    folder.sweep()

    def _keep(self, name: str, held: contextlib.ExitStack) -> bool:
        """Hold what is to be replaced, where something is, until `held` ends."""
        with self._locked() as store_fd:
            self._require_not_made(store_fd, name)  # who makes one holds it as well, and is not waited for
        try:
            held.enter_context(self.lock(name, timeout_s=_IN_USE_S))
        except SnapshotNameError:
            return False
        return True

    def _publish(self, folder: str, name: str, *, replace: bool, is_kept: bool) -> Snapshot:
        """Give a complete draft its name; what had that name is for `_sweep`. Waits for nobody who uses a snapshot."""
        target = self._at(name)
        while True:
            with contextlib.ExitStack() as held:
                is_there = os.path.lexists(target)
                if is_there and not is_kept:
                    if not replace:
                        self._require_free(name)
                    held.enter_context(self.lock(name))
                store_fd = held.enter_context(self._locked())
                if os.path.lexists(target) is not is_there:
                    continue  # somebody else was faster
                try:
                    if is_there:
                        linux.exchange(store_fd, os.path.basename(folder), name)
                        os.rename(folder, self._at(_temporary(_REMOVED, name)))
                    else:
                        os.rename(folder, target)
                    os.fsync(store_fd)
                except OSError as e:
                    if is_there and e.errno in (errno.EINVAL, errno.ENOSYS):
                        raise MisfitError(
                            "its filesystem can't replace a folder at once",
                            path=self.path,
                            mend=f"remove {name} first, or keep snapshots on ext4, XFS or btrfs",
                        ) from e
                    raise guarded.unwritable(target, e) from e
                return self.open(name)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """The store's own lock, held for moments; gives a descriptor of its folder."""
        guarded.require_path_ours(self.path)
        with guarded.opened(self.path, guarded.FOLDER & ~os.O_NOFOLLOW, self.path) as fd:
            if not flock(fd, fcntl.LOCK_EX, time.monotonic() + _STORE_S):
                raise RetryError("is locked by another process", path=self.path, mend="try again")
            yield fd

    def _listed(self, name: str) -> Listed | None:
        """What lies under a name; None where nothing does, or it is none of ours."""
        while True:
            before = _state(self._at(name))
            try:
                return Listed(name=name, snapshot=self.open(name), fault=None)
            except SnapshotNameError:
                return None
            except CheckpointError as e:
                # No lock is held: half of one snapshot and half of another would seem damaged.
                if before == _state(self._at(name)):
                    return Listed(name=name, snapshot=None, fault=e)

    def _usable(self) -> Iterator[Snapshot]:
        """All snapshots; the first that can't be used is an error."""
        for one in self.list():
            if one.fault is not None:
                raise one.fault
            if one.snapshot is not None:
                yield one.snapshot

    def _left(self, store_fd: int, prefix: str) -> tuple[str, ...]:
        return tuple(sorted(name for name in os.listdir(store_fd) if name.startswith(prefix)))

    def _sweep(self) -> None:
        """Remove what is left of snapshots that were removed or replaced; what can't be is left to the next one."""
        guarded.require_path_ours(self.path)
        for name in os.listdir(self.path):
            if name.startswith(_REMOVED):
                with contextlib.suppress(OSError):
                    _remove(self._at(name))

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
        for left in self._left(store_fd, _DRAFT):
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


def _temporary(prefix: str, name: str) -> str:
    return f"{prefix}{name}.{os.urandom(4).hex()}"


def _name_of(temporary: str) -> str:
    return temporary.split(".", 2)[2].rpartition(".")[0]


def _state(path: str) -> tuple[int, int] | None:
    """What tells a folder from another that had its name: inode numbers are used again at once."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns


def _remove(path: str) -> None:
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
