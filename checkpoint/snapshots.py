"""A snapshot on the disk: examined before anything in it is believed."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Collection
from typing import TYPE_CHECKING, Final

import blake3
import msgspec

from checkpoint import guarded, manifest
from checkpoint.digests import digest_files
from checkpoint.errors import CorruptError, RetryError
from checkpoint.manifest import Manifest

if TYPE_CHECKING:
    from checkpoint.chunks.keys import MasterKey

MANIFEST: Final = "manifest.json"
IMAGES: Final = "images"
RECIPES: Final = "recipes"
_ANEW: Final = "make the snapshot anew"


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """A complete snapshot whose names, owners, modes and sizes are as its manifest says.

    Attributes:
        manifest: what it says.
        folder: of the snapshot, absolute.
        bytes_stored: what it takes on the disk: its folder, and what its chunks added to the store.
        digest: BLAKE3 of the file `manifest.json`, 32 bytes; recipes are bound to it.
    """

    manifest: Manifest
    folder: str
    bytes_stored: int
    digest: bytes

    @property
    def recipes(self) -> str:
        """The file that holds the recipes of one that is not plain; see `checkpoint.contents`."""
        return os.path.join(self.folder, RECIPES)

    @property
    def images(self) -> str:
        """Of a plain one, the folder for CRIU to read.

        Its log and statistics go elsewhere (`--work-dir`), for nothing may be added.
        """
        return os.path.join(self.folder, IMAGES)

    def require_not_encrypted(self, master: MasterKey | None) -> None:
        """Refuse a plain one where a key is given: who gives one takes nothing that anybody could have written.

        Raises:
            CorruptError: a key is given.
        """
        if master is not None:
            mend = "use --no-encrypt to trust it"
            raise CorruptError("is not encrypted, though a key is given", path=self.folder, mend=mend)

    def verify(self, names: Collection[str] | None = None, stopping: threading.Event | None = None) -> int:
        """Read images of a plain one, and compare their digests; gives how many bytes that were.

        Args:
            names: of the images; without, all.
            stopping: when it is set, it ends early, with an error.

        Raises:
            CorruptError: one is not what was written.
        """
        files = [file for file in self.manifest.files if names is None or file.name in names]
        wanted = {os.path.join(self.images, file.name): file for file in files}
        try:
            found = digest_files(wanted, follow=False, stopping=stopping)
        except RetryError as e:
            raise CorruptError("changed while it was read", path=e.path, mend=_ANEW) from e
        for path, file in wanted.items():
            if found[path].blake3 != file.blake3 or found[path].identity.nbytes != file.nbytes:
                raise CorruptError("its bytes are not those that were written", path=path, mend=_ANEW)
        return sum(file.nbytes for file in files)


def examined(name: str, folder: str) -> Snapshot:
    """The snapshot in a folder, once all that lies there is what the manifest says; images are not read.

    Args:
        name: it must have.
        folder: where it lies; absolute.

    Raises:
        CorruptError: it is not what the store wrote, or others could have written it.
        MisfitError: a newer weightfs wrote it.
        CheckpointError: it can't be read.
    """
    with (
        guarded.opened(folder, guarded.FOLDER, folder) as folder_fd,
        guarded.opened(MANIFEST, guarded.FILE, os.path.join(folder, MANIFEST), dir_fd=folder_fd) as manifest_fd,
    ):
        try:
            said, digest = _read_manifest(name, folder, manifest_fd)
            examine = _examined_images if said.content == "plain" else _examined_recipes
            stored = os.fstat(manifest_fd).st_blocks * 512 + examine(said, folder, folder_fd)
        except OSError as e:
            raise guarded.unreadable(folder, e) from e
    return Snapshot(manifest=said, folder=folder, bytes_stored=stored, digest=digest)


def _read_manifest(name: str, folder: str, fd: int) -> tuple[Manifest, bytes]:
    """What the manifest says, and its digest."""
    path = os.path.join(folder, MANIFEST)
    if os.fstat(fd).st_size > manifest.MOST_BYTES:
        raise CorruptError("is too large for a manifest", path=path, mend=_ANEW)
    with open(fd, "rb", closefd=False) as file:
        content = file.read(manifest.MOST_BYTES)
    said = manifest.decode(content, path)
    if said.name != name:
        raise CorruptError(f"is that of the snapshot {said.name}", path=path, mend=f"call the folder {said.name}")
    return said, digest_of(content)


def digest_of(content: bytes) -> bytes:
    """What recipes are bound to: the digest of all that is in a manifest."""
    return blake3.blake3(content).digest()


def _examined_images(said: Manifest, folder: str, folder_fd: int) -> int:
    """What the images take on the disk, once all that lies there is what the manifest says."""
    images = os.path.join(folder, IMAGES)
    stored = 0
    with guarded.opened(IMAGES, guarded.FOLDER, images, dir_fd=folder_fd) as images_fd:
        _require_entries(folder_fd, {MANIFEST, IMAGES}, folder)
        _require_entries(images_fd, {file.name for file in said.files}, images)
        for file in said.files:
            where = os.path.join(images, file.name)
            found = os.stat(file.name, dir_fd=images_fd, follow_symlinks=False)
            if not stat.S_ISREG(found.st_mode):
                raise CorruptError("is no regular file", path=where, mend=_ANEW)
            guarded.require_ours(found, where)
            if found.st_size != file.nbytes:
                raise CorruptError(f"has {found.st_size} bytes, not the {file.nbytes} written", path=where, mend=_ANEW)
            stored += found.st_blocks * 512
    return stored


def _examined_recipes(said: Manifest, folder: str, folder_fd: int) -> int:
    """What the recipes and the chunks that came with them take; `checkpoint.contents` reads them."""
    _require_entries(folder_fd, {MANIFEST, RECIPES}, folder)
    with guarded.opened(RECIPES, guarded.FILE, os.path.join(folder, RECIPES), dir_fd=folder_fd) as fd:
        return os.fstat(fd).st_blocks * 512 + said.bytes_added


def _require_entries(fd: int, wanted: set[str], path: str) -> None:
    found = set(os.listdir(fd))
    if missing := sorted(wanted - found):
        raise CorruptError("is missing", path=os.path.join(path, missing[0]), mend=_ANEW)
    if extra := sorted(found - wanted):
        raise CorruptError("does not belong to the snapshot", path=os.path.join(path, extra[0]), mend="remove it")
