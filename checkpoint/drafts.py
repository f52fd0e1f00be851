"""A snapshot that is being made, under a temporary name."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import msgspec

from checkpoint import guarded, manifest
from checkpoint.digests import digest_files, sync_files
from checkpoint.errors import CheckpointError
from checkpoint.manifest import ImageFile, Manifest
from checkpoint.snapshots import IMAGES, MANIFEST, RECIPES, Snapshot


class Draft:
    """A snapshot that is being made; `Store.begin` gives one. Its lock is held until `commit`, `abandon` or the end of
    this process. As a context manager it abandons what was not committed.

    Args:
        name: the snapshot will have.
        folder: under its temporary name; exists, and is empty but for the folder `images`.
        lock_fd: a locked descriptor of it, which is the draft's own from now on.
        publish: gives the complete draft its name and returns the snapshot.
        sweep: removes what had the name.

    Attributes:
        id: the snapshot will have: random, 32 hexadecimal digits.
    """

    def __init__(
        self,
        name: str,
        folder: str,
        lock_fd: int,
        publish: Callable[[], Snapshot],
        sweep: Callable[[], None],
        held: contextlib.ExitStack,
    ) -> None:
        self.name = name
        self.folder = folder
        self.id = os.urandom(16).hex()
        self._lock_fd = lock_fd
        self._publish = publish
        self._sweep = sweep
        self._held = held

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abandon()

    @property
    def images(self) -> str:
        """The empty folder for CRIU to write to; all that is in it at `commit` belongs to a plain snapshot."""
        return os.path.join(self.folder, IMAGES)

    def commit(self, said: Manifest, *, sealed: Callable[[bytes], bytes] | None = None) -> Snapshot:
        """Write the manifest and what it tells of, wait until all is on the disk, and give it its name.

        Args:
            said: `name` and `id` are this draft's; of a plain one, `files` and `bytes_logical` are filled in.
            sealed: gives the recipes, bound to a manifest's content; None for a plain one, whose images are digested.

        Raises:
            SnapshotNameError: there is one of that name already, which is not to be replaced.
            RetryError: there is one of that name since the draft began, and it is in use.
            CheckpointError: it can't be written, or CRIU left something that is no plain file.

        Whatever is raised, nothing has changed under the name, and the draft is still there to `abandon`.
        """
        if (said.name, said.id) != (self.name, self.id):
            raise ValueError(f"the manifest is of {said.name} {said.id}, not of {self.name} {self.id}")
        try:
            if sealed is None:
                files = self._finish_images()
                said = msgspec.structs.replace(said, files=files, bytes_logical=sum(file.nbytes for file in files))
            content = manifest.encode(said)
            _write(os.path.join(self.folder, MANIFEST), content)
            if sealed is not None:
                _write(os.path.join(self.folder, RECIPES), sealed(content))
                os.rmdir(self.images)
            _sync_folder(self.folder)
        except OSError as e:
            raise guarded.unwritable(e.filename or self.folder, e) from e
        made = self._publish()
        self._release()
        self._sweep()
        return made

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
        with ThreadPoolExecutor(1) as pool:  # the disk and the processors are busy at the same time
            on_disk = pool.submit(sync_files, paths)
            digests = digest_files(paths, follow=False)
            on_disk.result()
        _sync_folder(self.images)
        return [
            ImageFile(name=name, nbytes=digests[path].identity.nbytes, blake3=digests[path].blake3)
            for path, name in sorted(paths.items())
        ]

    def _release(self) -> None:
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1
            self._held.close()


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
