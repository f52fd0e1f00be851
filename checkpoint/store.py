"""Where snapshots lie: a folder each, written under a temporary name, and renamed when it is complete and on the disk.

    STORE/                      0700
        NAME/                   0700; it has this name only when all of it is on the disk
            manifest.json       0600
            images/             0700; what CRIU wrote, flat
        .draft.NAME.RANDOM/     being written, being removed, or left over by a process that died

Nothing else changes what is in a snapshot. Whoever makes one holds a flock on its draft's folder, whoever restores one
a shared flock on its folder, whoever removes or replaces one an exclusive one; the kernel drops them with the process.
Programs that are executed do not inherit the descriptors. What has a temporary name and is not locked is left over.

A process may be killed at any instruction: under NAME there is then the old snapshot, the new one, or (if there was no
old one) none. `recover` removes what is left over.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import msgspec

from checkpoint import guarded, manifest
from checkpoint.digests import digest_files, sync_files
from checkpoint.errors import CheckpointError, CorruptError, MisfitError, RetryError, SnapshotNameError
from checkpoint.guarded import cannot
from checkpoint.manifest import ImageFile, Manifest
from weightfs import linux

DEFAULT: Final = "/var/lib/weightfs/snapshots"
_MANIFEST: Final = "manifest.json"
_IMAGES: Final = "images"
_DRAFT: Final = ".draft."
_STORE_S: Final = 10.0
_IN_USE_S: Final = 30.0
_LOOK_S: Final = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A complete snapshot whose names, owners, modes and sizes are as its manifest says.

    Attributes:
        manifest: what it says.
        folder: of the snapshot, absolute.
        bytes_stored: what it takes on the disk.
    """

    manifest: Manifest
    folder: str
    bytes_stored: int

    @property
    def images(self) -> str:
        """The folder for CRIU to read; its log and statistics go elsewhere (`--work-dir`), for nothing may be added."""
        return os.path.join(self.folder, _IMAGES)

    def verify(self) -> int:
        """Read every image, and compare its digest; gives how many bytes that were.

        Raises:
            CorruptError: one is not what was written.
        """
        wanted = {os.path.join(self.images, file.name): file for file in self.manifest.files}
        try:
            found = digest_files(wanted, follow=False)
        except RetryError as e:
            raise CorruptError("changed while it was read", path=e.path, mend=_ANEW) from e
        for path, file in wanted.items():
            if found[path].blake3 != file.blake3 or found[path].identity.nbytes != file.nbytes:
                raise CorruptError("its bytes are not those that were written", path=path, mend=_ANEW)
        return self.manifest.bytes_logical


@dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """A name in the store.

    Attributes:
        name: of the snapshot.
        snapshot: what lies there, None where that can't be used.
        fault: why it can't.
    """

    name: str
    snapshot: Snapshot | None
    fault: CheckpointError | None


class Draft:
    """A snapshot that is being made. Its lock is held until `commit` or `abandon`, or this process ends.

    Attributes:
        name: the snapshot will have.
        id: the snapshot will have: random, 32 hexadecimal digits.
        folder: under its temporary name.
    """

    def __init__(self, store: Store, name: str, folder: str, lock_fd: int, *, replace: bool) -> None:
        self.name = name
        self.id = secrets.token_hex(16)
        self.folder = folder
        self._store = store
        self._lock_fd = lock_fd
        self._replace = replace

    @property
    def images(self) -> str:
        """The empty folder for CRIU to write to; all that is in it at `commit` belongs to the snapshot."""
        return os.path.join(self.folder, _IMAGES)

    def commit(self, said: Manifest) -> Snapshot:
        """Digest the images, write the manifest, wait until all is on the disk, and give it its name.

        Args:
            said: `name` and `id` are this draft's; `files` and `bytes_logical` are filled in.

        Raises:
            SnapshotNameError: there is one of that name already, which is not to be replaced.
            RetryError: the one to be replaced is in use.
            CheckpointError: it can't be written, or CRIU left something that is no plain file.

        Whatever is raised, nothing has changed under the name, and the draft is still there to `abandon`.
        """
        if (said.name, said.id) != (self.name, self.id):
            raise ValueError(f"the manifest is of {said.name} {said.id}, not of {self.name} {self.id}")
        try:
            files = self._finish_images()
            complete = msgspec.structs.replace(said, files=files, bytes_logical=sum(file.nbytes for file in files))
            _write(os.path.join(self.folder, _MANIFEST), manifest.encode(complete))
            _sync_folder(self.folder)
        except OSError as e:
            raise cannot("be written", e.filename or self.folder, e) from e
        self._store._publish(self.folder, self.name, replace=self._replace)
        self._release()
        return self._store.open(self.name)

    def abandon(self) -> None:
        """Remove it. Harmless after `commit`, and when called twice."""
        if self._lock_fd >= 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._release()

    def _finish_images(self) -> list[ImageFile]:
        paths = {}
        with os.scandir(self.images) as entries:
            for entry in entries:
                if not entry.is_file(follow_symlinks=False) or not manifest.is_image_name(entry.name):
                    raise CheckpointError("can't be part of a snapshot: it is no plain file", path=entry.path)
                os.chmod(entry.path, 0o600, follow_symlinks=False)
                paths[entry.path] = entry.name
        digests = digest_files(paths, follow=False)
        sync_files(paths)
        _sync_folder(self.images)
        return [
            ImageFile(name=name, nbytes=digests[path].identity.nbytes, blake3=digests[path].blake3)
            for path, name in sorted(paths.items())
        ]

    def _release(self) -> None:
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1


class Store:
    """The snapshots in a folder. Every method may be called from any process at any time.

    Args:
        path: the folder; `begin` makes it if need be.
    """

    def __init__(self, path: str = DEFAULT) -> None:
        self.path = os.path.abspath(path)

    def begin(self, name: str, *, replace: bool = False) -> Draft:
        """Begin a snapshot.

        Args:
            name: see `manifest.require_name`.
            replace: whether one that has that name makes way when the new one is complete.

        Raises:
            SnapshotNameError: it can't be a name, or there is one already that is not to be replaced.
            RetryError: one of that name is being made.
            CorruptError: others may write the store.
            CheckpointError: the store can't be written.
        """
        manifest.require_name(name)
        try:
            os.makedirs(self.path, mode=0o700, exist_ok=True)
        except OSError as e:
            raise cannot("be made", self.path, e) from e
        with self._locked() as store_fd:
            if not replace:
                self._require_free(name)
            for left in self._drafts(store_fd):
                if _draft_name(left) == name and not self._is_left_over(store_fd, left):
                    raise RetryError(
                        "is being made by another process", path=self._at(name), mend="wait until it is done"
                    )
            temporary = f"{_DRAFT}{name}.{secrets.token_hex(4)}"
            folder = self._at(temporary)
            lock_fd = -1
            try:
                os.mkdir(temporary, 0o700, dir_fd=store_fd)
                lock_fd = os.open(temporary, guarded.FOLDER, dir_fd=store_fd)
                fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.mkdir(_IMAGES, 0o700, dir_fd=lock_fd)
            except OSError as e:
                if lock_fd >= 0:
                    os.close(lock_fd)
                shutil.rmtree(folder, ignore_errors=True)
                raise cannot("be written", folder, e) from e
            return Draft(self, name, folder, lock_fd, replace=replace)

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
        with (
            guarded.opened(folder, guarded.FOLDER, folder) as folder_fd,
            guarded.opened(_IMAGES, guarded.FOLDER, os.path.join(folder, _IMAGES), dir_fd=folder_fd) as images_fd,
            guarded.opened(_MANIFEST, guarded.FILE, os.path.join(folder, _MANIFEST), dir_fd=folder_fd) as manifest_fd,
        ):
            try:
                return _examined(name, folder, folder_fd, images_fd, manifest_fd)
            except OSError as e:
                raise cannot("be read", folder, e) from e

    def verify(self, name: str) -> Snapshot:
        """A snapshot whose every byte is what was written; errors are those of `open` and `Snapshot.verify`."""
        with self.lock(name, shared=True):
            snapshot = self.open(name)
            snapshot.verify()
            return snapshot

    def list(self) -> tuple[Listed, ...]:
        """All snapshots by name; one that can't be used comes with the reason. A store that is not there is empty.

        Raises:
            CheckpointError: the store can't be read.
        """
        found = []
        for name in self._names():
            try:
                found.append(Listed(name=name, snapshot=self.open(name), fault=None))
            except SnapshotNameError:
                continue  # removed since it was listed, or not one of ours
            except CheckpointError as e:
                found.append(Listed(name=name, snapshot=None, fault=e))
        return tuple(found)

    def remove(self, name: str) -> None:
        """Remove a snapshot, whatever state it is in.

        Raises:
            SnapshotNameError: there is none.
            RetryError: it is in use.
            CheckpointError: it can't be removed.
        """
        manifest.require_name(name)
        with self._locked() as store_fd, self.lock(name):
            temporary = f"{_DRAFT}{name}.{secrets.token_hex(4)}"
            try:
                os.rename(name, temporary, src_dir_fd=store_fd, dst_dir_fd=store_fd)
                os.fsync(store_fd)
                _remove(self._at(temporary))
            except OSError as e:
                raise cannot("be removed", self._at(name), e) from e

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
                raise cannot("be opened", folder, e) from e
            try:
                if not _flock(fd, how, until):
                    raise RetryError("is in use", path=folder, mend="try again when no restore reads it")
                if _leads_to(folder, fd):  # and was not replaced while it was waited for
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
            for left in self._drafts(store_fd):
                if self._is_left_over(store_fd, left):
                    try:
                        _remove(self._at(left))
                    except OSError as e:
                        raise cannot("be removed", self._at(left), e) from e
                    removed.append(_draft_name(left))
        return tuple(removed)

    def _publish(self, folder: str, name: str, *, replace: bool) -> None:
        """Give a complete draft its name, and remove what had it."""
        temporary = os.path.basename(folder)
        with contextlib.ExitStack() as held:
            store_fd = held.enter_context(self._locked())
            try:
                if not os.path.lexists(self._at(name)):
                    os.rename(temporary, name, src_dir_fd=store_fd, dst_dir_fd=store_fd)
                    os.fsync(store_fd)
                    return
                if not replace:
                    self._require_free(name)
                held.enter_context(self.lock(name, timeout_s=_IN_USE_S))
                linux.exchange(store_fd, temporary, name)
                os.fsync(store_fd)
            except OSError as e:
                if e.errno in (errno.EINVAL, errno.ENOSYS):
                    raise MisfitError(
                        "its filesystem can't replace a folder at once",
                        path=self.path,
                        mend=f"remove {name} first, or keep snapshots on ext4, XFS or btrfs",
                    ) from e
                raise cannot("be written", self._at(name), e) from e
            shutil.rmtree(folder, ignore_errors=True)  # of the old one; what is left of it, `recover` removes

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """The store's own lock, held for moments; gives a descriptor of its folder."""
        guarded.require_path_ours(self.path)
        with guarded.opened(self.path, guarded.FOLDER & ~os.O_NOFOLLOW, self.path) as fd:
            if not _flock(fd, fcntl.LOCK_EX, time.monotonic() + _STORE_S):
                raise RetryError("is locked by another process", path=self.path, mend="try again")
            yield fd

    def _names(self) -> tuple[str, ...]:
        try:
            return tuple(sorted(name for name in os.listdir(self.path) if not name.startswith(".")))
        except FileNotFoundError:
            return ()
        except OSError as e:
            raise cannot("be read", self.path, e) from e

    def _drafts(self, store_fd: int) -> tuple[str, ...]:
        return tuple(sorted(name for name in os.listdir(store_fd) if name.startswith(_DRAFT)))

    def _is_left_over(self, store_fd: int, temporary: str) -> bool:
        try:
            fd = os.open(temporary, guarded.FOLDER, dir_fd=store_fd)
        except OSError as e:
            raise cannot("be opened", self._at(temporary), e) from e
        try:
            return _flock(fd, fcntl.LOCK_EX, 0)
        finally:
            os.close(fd)

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


_ANEW: Final = "make the snapshot anew"


def _examined(name: str, folder: str, folder_fd: int, images_fd: int, manifest_fd: int) -> Snapshot:
    """A snapshot, once all that lies in its folder is what the manifest says."""
    path = os.path.join(folder, _MANIFEST)
    if os.fstat(manifest_fd).st_size > manifest.MOST_BYTES:
        raise CorruptError("is too large for a manifest", path=path, mend=_ANEW)
    with open(manifest_fd, "rb", closefd=False) as content:
        said = manifest.decode(content.read(manifest.MOST_BYTES), path)
    if said.name != name:
        raise CorruptError(f"is that of the snapshot {said.name}", path=path, mend=f"call the folder {said.name}")
    _require_entries(folder_fd, {_MANIFEST, _IMAGES}, folder)
    images = os.path.join(folder, _IMAGES)
    _require_entries(images_fd, {file.name for file in said.files}, images)
    stored = os.fstat(manifest_fd).st_blocks * 512
    for file in said.files:
        where = os.path.join(images, file.name)
        found = os.stat(file.name, dir_fd=images_fd, follow_symlinks=False)
        if not stat.S_ISREG(found.st_mode):
            raise CorruptError("is no regular file", path=where, mend=_ANEW)
        guarded.require_ours(found, where)
        if found.st_size != file.nbytes:
            raise CorruptError(f"has {found.st_size} bytes, not the {file.nbytes} written", path=where, mend=_ANEW)
        stored += found.st_blocks * 512
    return Snapshot(manifest=said, folder=folder, bytes_stored=stored)


def _require_entries(fd: int, wanted: set[str], path: str) -> None:
    found = set(os.listdir(fd))
    if missing := sorted(wanted - found):
        raise CorruptError("is missing", path=os.path.join(path, missing[0]), mend=_ANEW)
    if extra := sorted(found - wanted):
        raise CorruptError("does not belong to the snapshot", path=os.path.join(path, extra[0]), mend="remove it")


def _draft_name(temporary: str) -> str:
    return temporary.removeprefix(_DRAFT).rpartition(".")[0]


def _flock(fd: int, how: int, until: float) -> bool:
    """Lock a folder; whether that succeeded in time. flock(2) has no timeout of its own, so it is tried anew."""
    while True:
        try:
            fcntl.flock(fd, how | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(_LOOK_S)
        else:
            return True


def _leads_to(path: str, fd: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def _write(path: str, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with open(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(fd)


def _sync_folder(path: str) -> None:
    fd = os.open(path, guarded.FOLDER)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove(folder: str) -> None:
    if os.path.islink(folder) or not os.path.isdir(folder):
        os.unlink(folder)
    else:
        shutil.rmtree(folder)
