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
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import msgspec

from checkpoint import guarded, manifest
from checkpoint.drafts import Draft
from checkpoint.errors import CheckpointError, MisfitError, SnapshotNameError
from checkpoint.locking import flock
from checkpoint.shelf import DRAFT, REMOVED, Shelf, remove, temporary
from checkpoint.snapshots import IMAGES, Snapshot, examined
from weightfs import linux

if TYPE_CHECKING:
    from checkpoint.chunks.keys import MasterKey
    from checkpoint.chunks.packs import Pruned

__all__ = ["DEFAULT", "Draft", "Listed", "Snapshot", "Store"]

DEFAULT: Final = "/var/lib/weightfs/snapshots"
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


class Store(Shelf):
    """The snapshots in a folder. Every method may be called from any process at any time.

    Args:
        path: the folder; `begin` makes it if need be.
    """

    def __init__(self, path: str = DEFAULT) -> None:
        super().__init__(path)

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
                folder = self._at(temporary(DRAFT, name))
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
                    removed = self._at(temporary(REMOVED, name))
                    os.rename(folder, removed)
                    os.fsync(store_fd)
                remove(removed)
            except FileNotFoundError as e:
                raise self._unknown(name) from e
            except OSError as e:
                raise guarded.unwritable(folder, e) from e
        self._sweep()

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
                        os.rename(folder, self._at(temporary(REMOVED, name)))
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


def _state(path: str) -> tuple[int, int] | None:
    """What tells a folder from another that had its name: inode numbers are used again at once."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns
