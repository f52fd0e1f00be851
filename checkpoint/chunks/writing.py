"""Adding chunks to a store's packs."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Self

from checkpoint import guarded
from checkpoint.chunks import pack
from checkpoint.chunks.folder import DRAFT, INDEX, PACK, Folder, write, write_at
from checkpoint.chunks.pack import Head, Table
from checkpoint.chunks.sealing import TAG_BYTES, Envelope, Kind
from checkpoint.errors import CheckpointError

PACK_BYTES: Final = 256 << 20
"""From here on a new pack is begun: what is rarely live is found in pieces this large, and written anew in them."""
_FLUSHED_BYTES: Final = 32 << 20
"""From here on what is written is brought to the disk while the rest is compressed, not all of it at the end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Added:
    """What a writer did.

    Attributes:
        chunks: how many were added, those that were there already included.
        nbytes: of all of them.
        new_chunks: how many were not there.
        new_nbytes: of those.
        stored_nbytes: what those take in the packs.
    """

    chunks: int
    nbytes: int
    new_chunks: int
    new_nbytes: int
    stored_nbytes: int


class PackWriter:
    """Adds chunks; `Packs.begin` gives one. Any thread may add. As a context manager it removes what was not committed.

    An error in any thread ends it: everything after that raises the first one.

    Args:
        folder: whose lock is held for as long as this lives.
        digest_key: the store's.
        known: ids of the chunks that are there.
        threads: that compress and seal beside those that call `add`.
    """

    def __init__(self, folder: Folder, digest_key: bytes, known: AbstractSet[bytes], *, threads: int) -> None:
        self._folder = folder
        self._digest_key = digest_key
        self._known = known
        self._lock = threading.Lock()
        self._mine: set[bytes] = set()
        self._drafts: list[_PackDraft] = []
        self._fault: BaseException | None = None
        self._counts = {"chunks": 0, "nbytes": 0, "new_chunks": 0, "new_nbytes": 0, "stored_nbytes": 0}
        self._pool = ThreadPoolExecutor(max(1, threads), thread_name_prefix="seal")
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="flush")
        self._idle = threading.Semaphore(threads)
        self._unflushed_nbytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abandon()

    def add(self, content: memoryview) -> bytes:
        """Add a chunk; gives its id, 32 bytes. The buffer may be used again when this returns.

        A copy is compressed and sealed by another thread where one is idle; else this one does it.

        Args:
            content: 1 byte to `pack.MOST_CHUNK_BYTES`.

        Raises:
            CheckpointError: it, or one before it, can't be written.
        """
        if not 0 < content.nbytes <= pack.MOST_CHUNK_BYTES:
            raise ValueError(f"a chunk has 1 to {pack.MOST_CHUNK_BYTES} bytes, not {content.nbytes}")
        id_ = pack.digest(self._digest_key, content)
        with self._lock:
            self._require_whole()
            self._count(chunks=1, nbytes=content.nbytes)
            if id_ in self._known or id_ in self._mine:
                return id_
            self._mine.add(id_)
            self._count(new_chunks=1, new_nbytes=content.nbytes)
        if self._idle.acquire(blocking=False):
            self._pool.submit(self._put_elsewhere, id_, bytes(content))
        else:
            self._put(id_, content)
        return id_

    def move(self, head: Head, payload: bytes) -> None:
        """Add a chunk of another pack as it is compressed there; see `pack.open_chunk`. Errors are those of `add`."""
        self._append(head, payload)

    def commit(self) -> Added:
        """Wait until all that was added is on the disk, and give it its names.

        Raises:
            CheckpointError: something can't be written. Nothing that was there before has changed.
        """
        self._pool.shutdown()
        self._flusher.shutdown()
        self._require_whole()
        try:
            with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
                list(pool.map(_PackDraft.finish, self._drafts))
            for draft in self._drafts:
                draft.publish()
            if self._drafts:
                self._folder.sync()
        except BaseException as e:
            self._fault = e
            raise
        self._drafts = []
        return Added(**self._counts)

    def abandon(self) -> None:
        """Remove what was not committed. Harmless after `commit`, and when called twice."""
        self._fault = self._fault or CheckpointError("no chunk is added any more", path=self._folder.path)
        self._pool.shutdown(cancel_futures=True)
        self._flusher.shutdown(cancel_futures=True)
        for draft in self._drafts:
            draft.remove()
        self._drafts = []

    def _put_elsewhere(self, id_: bytes, content: bytes) -> None:
        try:
            self._put(id_, memoryview(content))
        except BaseException:  # noqa: BLE001  # the next `add` or `commit` raises it
            pass
        finally:
            self._idle.release()

    def _put(self, id_: bytes, content: memoryview) -> None:
        """Compress, seal and write a chunk."""
        try:
            method, payload = pack.compressed(content)
            self._append(Head(len(payload) + TAG_BYTES, content.nbytes, method, id_), payload)
        except BaseException as e:
            self._fault = self._fault or e
            raise

    def _append(self, head: Head, payload: bytes | memoryview) -> None:
        with self._lock:
            self._require_whole()
            if not self._drafts or not self._drafts[-1].has_room(head):
                self._drafts.append(_PackDraft(self._folder, self._digest_key))
            draft = self._drafts[-1]
            number, at = draft.reserve(head)
            self._count(stored_nbytes=pack.HEAD_BYTES + head.sealed_nbytes)
            self._unflushed_nbytes += head.sealed_nbytes
            is_due = self._unflushed_nbytes >= _FLUSHED_BYTES
            if is_due:
                self._unflushed_nbytes = 0
        draft.write(number, at, head, payload)
        if is_due:
            self._flusher.submit(self._flush, draft)

    def _flush(self, draft: _PackDraft) -> None:
        try:
            draft.flush()
        except BaseException as e:  # noqa: BLE001  # the next `add` or `commit` raises it; a disk tells only once
            self._fault = self._fault or e

    def _count(self, **more: int) -> None:
        for name, count in more.items():
            self._counts[name] += count

    def _require_whole(self) -> None:
        if isinstance(self._fault, CheckpointError):
            raise self._fault
        if self._fault is not None:
            raise CheckpointError("chunks can't be added", path=self._folder.path) from self._fault


class _PackDraft:
    """A pack that is being written."""

    def __init__(self, folder: Folder, digest_key: bytes) -> None:
        self._folder = folder
        self._envelope = Envelope.new(Kind.PACK, folder.master, digest_key)
        self._sealer = self._envelope.sealer("chunks")
        self._name = self._envelope.id.hex()
        self._path = folder.at(DRAFT + self._name + PACK)
        self._rows = bytearray()
        self._end = pack.START
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            self._fd = os.open(self._path, flags, 0o600)
        except OSError as e:
            raise guarded.unwritable(self._path, e) from e

    def has_room(self, head: Head) -> bool:
        return self._end + head.sealed_nbytes <= PACK_BYTES and len(self._rows) < pack.MOST_CHUNKS * pack.HEAD_BYTES

    def reserve(self, head: Head) -> tuple[int, int]:
        """The number and the offset of a record; under the writer's lock. It must be written, or all is given up."""
        number, at = len(self._rows) // pack.HEAD_BYTES, self._end
        self._rows += head.encoded()
        self._end += pack.HEAD_BYTES + head.sealed_nbytes
        return number, at

    def write(self, number: int, at: int, head: Head, payload: bytes | memoryview) -> None:
        """Seal and write a record; any thread, in any order."""
        sealed = pack.seal_chunk(self._sealer, number, head, payload)
        try:
            write_at(self._fd, [head.encoded(), sealed], at)
        except OSError as e:
            raise guarded.unwritable(self._path, e) from e

    def flush(self) -> None:
        """Wait until what was written so far is on the disk; any thread."""
        try:
            os.fdatasync(self._fd)
        except OSError as e:
            raise guarded.unwritable(self._path, e) from e

    def finish(self) -> None:
        """Write what is at both ends, and the index, and wait until all is on the disk."""
        rows = bytes(self._rows)
        try:
            write_at(self._fd, [pack.encode_end(self._sealer, rows)], self._end)
            write_at(self._fd, [pack.encode_start(self._envelope, self._folder.master)], 0)
            os.fsync(self._fd)
        except OSError as e:
            raise guarded.unwritable(self._path, e) from e
        index = pack.encode_index(self._envelope, Table.of(rows, self._path))
        write(self._folder.at(DRAFT + self._name + INDEX), index)

    def publish(self) -> None:
        """Give it its name; the index first, for without its pack it is nothing."""
        try:
            for suffix in (INDEX, PACK):
                os.rename(self._folder.at(DRAFT + self._name + suffix), self._folder.at(self._name + suffix))
        except OSError as e:
            raise guarded.unwritable(self._path, e) from e
        self._close()

    def remove(self) -> None:
        """Remove it; harmless when it has its name."""
        self._close()
        for suffix in (INDEX, PACK):
            with contextlib.suppress(OSError):
                os.unlink(self._folder.at(DRAFT + self._name + suffix))

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
