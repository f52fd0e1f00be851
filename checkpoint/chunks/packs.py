"""The chunks of a store: each kept once, compressed and sealed, found by its id.

An id is the chunk's BLAKE3 under a key that is the store's own. See `folder` for what lies where and who locks it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Final

from checkpoint.chunks import collecting, rotating
from checkpoint.chunks.catalogue import MOST_LOOKS, Catalogue, GoneError
from checkpoint.chunks.collecting import Pruned, Rebuilt
from checkpoint.chunks.folder import Folder
from checkpoint.chunks.keys import MasterKey
from checkpoint.chunks.rotating import Rotated
from checkpoint.chunks.writing import Added, PackWriter
from checkpoint.errors import CheckpointError, CorruptError, RetryError

__all__ = ["Added", "PackWriter", "Packs", "Pruned", "Rebuilt", "Rotated"]

_BEGIN_S: Final = 60.0
_ANEW: Final = "make the snapshot anew"


class Packs:
    """The packs of a folder. Any thread may use it, and any number of processes and hosts.

    What is in the folder is looked up once, and again when a chunk is not where it was.

    Args:
        path: the folder; `begin` makes it if need be.
        master: the key it is sealed with; None where nothing is encrypted. One folder has one.
    """

    def __init__(self, path: str, master: MasterKey | None) -> None:
        self.folder = Folder(os.path.abspath(path), master)
        self._lock = threading.Lock()
        self._catalogue: Catalogue | None = None

    def close(self) -> None:
        """Close its files, when those that read now are done. It may be used again."""
        with self._lock:
            self._catalogue = None

    @contextlib.contextmanager
    def begin(self, *, threads: int | None = None) -> Iterator[PackWriter]:
        """Begin to add chunks. Nothing is pruned until this ends: commit what needs them before.

        What was not committed by then is removed.

        Args:
            threads: that compress and seal, besides those that call `add`; one a processor unless told.

        Raises:
            RetryError: chunks are being pruned.
            CorruptError: the master key is not the store's, or others may write the folder.
            CheckpointError: the folder can't be written.
        """
        self.folder.make()
        with self.folder.locked(fcntl.LOCK_SH, _BEGIN_S):
            digest_key = self.folder.made_digest_key()
            catalogue = Catalogue(self.folder, digest_key)  # of which nothing goes by now
            with PackWriter(
                self.folder,
                digest_key,
                frozenset(catalogue.places),
                threads=(os.cpu_count() or 1) if threads is None else threads,
            ) as writer:
                yield writer

    def prune(self, live: Callable[[], Iterable[bytes]]) -> Pruned:
        """Remove chunks that no snapshot needs; see `collecting.prune`."""
        return collecting.prune(self.folder, live)

    def rebuild(self) -> Rebuilt:
        """Read every chunk, and make indexes anew that name those which are whole; see `collecting.rebuild`."""
        return collecting.rebuild(self.folder)

    def rotate(self, new: MasterKey, every_object: rotating.Objects = rotating.none) -> Rotated:
        """Wrap every key with another master key, which is this one's from now on; see `rotating.rotate`."""
        rotated = rotating.rotate(self.folder, new, every_object)
        self.folder = Folder(self.folder.path, new)
        return rotated

    @property
    def digest_key(self) -> bytes:
        """The store's key, to which sealed objects are bound; 32 bytes.

        Raises:
            CorruptError: there is none, or the master key is not the store's.
        """
        return self._found().digest_key

    def read(self, id_: bytes, into: memoryview, at: int = 0) -> None:
        """Fill a buffer with bytes of a chunk. Nothing is written to it that was not found to be authentic.

        Args:
            id_: the chunk's.
            into: whose length says how many bytes.
            at: where they begin in the chunk.

        Raises:
            CorruptError: the chunk is damaged, is not in the store, or has fewer bytes.
            RetryError: it was moved each time it was looked for.
            CheckpointError: it can't be read.
        """
        content = self.get(id_)
        if len(content) < at + into.nbytes:
            raise CorruptError(
                f"the chunk {id_.hex()} has only {len(content)} bytes", path=self.folder.path, mend=_ANEW
            )
        into[:] = memoryview(content)[at : at + into.nbytes]

    def get(self, id_: bytes) -> bytes:
        """A whole chunk; errors are those of `read`."""
        catalogue, is_new = self._found(), False
        for _ in range(MOST_LOOKS):
            try:
                return catalogue.get(id_)
            except GoneError as e:
                if is_new and id_ not in catalogue.places:
                    raise self._missing(id_, catalogue) from e
            # It may have been moved more than once meanwhile, or added after another thread had looked.
            catalogue, is_new = self._found_after(catalogue)
        raise RetryError(f"the chunk {id_.hex()} is moved again and again", path=self.folder.path, mend="try again")

    def get_all(self, ids: Sequence[bytes]) -> list[Any]:
        """Whole chunks, in that order, with as few calls as can be; errors are those of `read`.

        Each has the buffer protocol. Chunks that follow one another may do so in memory as well.
        """
        try:
            return self._found().get_all(ids)
        except GoneError:  # one by one they are looked up again
            return [self.get(id_) for id_ in ids]

    def prefetch(self, ids: Collection[bytes]) -> int:
        """Have the kernel read chunks ahead; gives how many bytes. Those that are not there are left out."""
        return self._found().prefetch(ids)

    def _found(self) -> Catalogue:
        with self._lock:
            if self._catalogue is None:
                self._catalogue = self._new()
            return self._catalogue

    def _found_after(self, stale: Catalogue) -> tuple[Catalogue, bool]:
        """A later look at the folder, and whether it is of now; else another thread's."""
        with self._lock:
            if self._catalogue is not None and self._catalogue is not stale:
                return self._catalogue, False
            self._catalogue = self._new()
            return self._catalogue, True

    def _missing(self, id_: bytes, catalogue: Catalogue) -> CheckpointError:
        """Why there is no such chunk: where packs can't be used, it may be in one of them."""
        for fault in catalogue.faults.values():
            return fault
        return CorruptError(f"the chunk {id_.hex()} is missing", path=self.folder.path, mend=_ANEW)

    def _new(self) -> Catalogue:
        digest_key = self.folder.digest_key()
        if digest_key is None:
            raise CorruptError("there are no chunks", path=self.folder.path, mend=_ANEW)
        return Catalogue(self.folder, digest_key)
