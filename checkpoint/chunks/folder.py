"""The files of a store's chunks, and who may change them when.

    STORE/packs/                0700
        key                     0600; the store's digest key, in an envelope of its own
        ID.pack                 0600; it has this name only when all of it is on the disk
        ID.index                0600; what the heads in the pack say; made from the pack where it is missing or damaged
        .draft.*                being written, or left over by a process that died

Whoever adds chunks holds a shared flock on the folder until the snapshot that needs them is committed: what he wrote,
and what he found there and refers to, stays. Whoever removes or changes anything holds an exclusive one. So with the
exclusive lock every draft is left over. Readers hold none: a pack may go while it is read, but only when its chunks are
elsewhere or belong to no snapshot.
"""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from checkpoint import guarded
from checkpoint.chunks import pack
from checkpoint.chunks.keys import KEY_BYTES, MasterKey
from checkpoint.chunks.pack import Table
from checkpoint.chunks.sealing import ENVELOPE_BYTES, Envelope, Kind, unwrapped
from checkpoint.errors import CheckpointError, CorruptError, RetryError
from checkpoint.locking import flock

KEY: Final = "key"
DRAFT: Final = ".draft."
PACK: Final = ".pack"
INDEX: Final = ".index"

_PACK_NAME: Final = re.compile(r"([0-9a-f]{32})\.pack", re.ASCII)
_INDEX_NAME: Final = re.compile(r"([0-9a-f]{32})\.index", re.ASCII)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pack:
    """A pack whose envelope opened and whose heads are authentic.

    Attributes:
        path: absolute.
        envelope: its keys.
        table: its records.
    """

    path: str
    envelope: Envelope
    table: Table


class Folder:
    """The folder `STORE/packs`; no state but its path and key.

    Args:
        path: absolute.
        master: None where nothing is encrypted.
    """

    def __init__(self, path: str, master: MasterKey | None) -> None:
        self.path = path
        self.master = master

    def at(self, name: str) -> str:
        """The path of an entry."""
        return os.path.join(self.path, name)

    def make(self) -> None:
        """Make the folder, if need be.

        Raises:
            CheckpointError: it can't be made.
        """
        try:
            os.makedirs(self.path, mode=0o700, exist_ok=True)
        except OSError as e:
            raise guarded.unwritable(self.path, e) from e

    @contextlib.contextmanager
    def locked(self, how: int, timeout_s: float) -> Iterator[int]:
        """The lock; gives a descriptor of the folder.

        Args:
            how: LOCK_SH to add chunks, LOCK_EX to remove and change what is there.
            timeout_s: how long to wait, in seconds.

        Raises:
            RetryError: others held it all the while.
            CorruptError: others may write the folder.
        """
        guarded.require_path_ours(self.path)
        with guarded.opened(self.path, guarded.FOLDER, self.path) as fd:
            if not flock(fd, how, time.monotonic() + timeout_s):
                holder = "a snapshot is being made" if how == fcntl.LOCK_EX else "they are being pruned"
                raise RetryError(f"its chunks are in use: {holder}", path=self.path, mend="try again when that is done")
            yield fd

    def digest_key(self) -> bytes | None:
        """The store's key of the ids of chunks; None where it has none yet.

        Raises:
            CorruptError: it is damaged, or the master key is not the store's.
        """
        path = self.at(KEY)
        if not os.path.lexists(path):
            return None
        content = read(path, ENVELOPE_BYTES + 1)
        if len(content) != ENVELOPE_BYTES:
            raise CorruptError("has another size than the key of a store", path=path, mend="weightfs snapshot recover")
        return unwrapped(content, Kind.STORE, self.master, path).digest_key

    def made_digest_key(self) -> bytes:
        """The same; makes it where there is none, taken from a pack where there are some. The lock must be held."""
        while (found := self.digest_key()) is None:
            envelope = Envelope.new(Kind.STORE, self.master, self._digest_key_of_packs())
            draft = self.draft(envelope.wrapped(self.master))
            try:
                os.link(draft, self.at(KEY))  # which, unlike rename, never replaces one
                os.unlink(draft)
            except FileExistsError:
                continue  # somebody else was faster
            except OSError as e:
                raise guarded.unwritable(self.at(KEY), e) from e
            self.sync()
        return found

    def packs(self) -> tuple[str, ...]:
        """The names of packs, in order; none where there is no folder."""
        return self._names(_PACK_NAME)

    def indexes(self) -> tuple[str, ...]:
        """The names of indexes, in order."""
        return self._names(_INDEX_NAME)

    def envelope(self, name: str, digest_key: bytes) -> Envelope:
        """The keys of a pack; errors are those of `load`."""
        path = self.at(name)
        envelope = self._envelope(path)
        if envelope.id.hex() + PACK != name:
            raise CorruptError(f"is the pack {envelope.id.hex()}", path=path, mend="make the snapshot anew")
        if not hmac.compare_digest(envelope.digest_key, digest_key):
            raise CorruptError("belongs to another store", path=path, mend="make the snapshot anew")
        return envelope

    def load(self, name: str, digest_key: bytes) -> Pack:
        """Open a pack, by its index or else by its own heads; no chunk of it is read.

        Raises:
            CorruptError: there is none, it is damaged, another pack's or store's, or wrapped with another key.
            CheckpointError: it can't be read.
        """
        path, envelope = self.at(name), self.envelope(name, digest_key)
        index = path.removesuffix(PACK) + INDEX
        try:
            table = pack.decode_index(envelope, read(index, pack.MOST_INDEX_BYTES), index)
        except CheckpointError as e:
            _log.warning("the heads of %s are read, for its index can't be used: %s", path, e)
            table = walked(path, envelope)
        nbytes = _size(path)
        if nbytes != table.pack_nbytes:
            raise CorruptError(
                f"has {nbytes} bytes, not the {table.pack_nbytes} written", path=path, mend="weightfs snapshot recover"
            )
        return Pack(path=path, envelope=envelope, table=table)

    def replace(self, name: str, content: bytes) -> None:
        """Write an entry, or another one in its place when that is on the disk; with the exclusive lock.

        Raises:
            CheckpointError: it can't be written.
        """
        draft = self.draft(content)
        try:
            os.rename(draft, self.at(name))
        except OSError as e:
            raise guarded.unwritable(self.at(name), e) from e
        self.sync()

    def draft(self, content: bytes) -> str:
        """The path of a new file that is on the disk, to be renamed; swept where whoever wrote it dies before.

        Raises:
            CheckpointError: it can't be written.
        """
        path = self.at(f"{DRAFT}{secrets.token_hex(8)}")
        write(path, content)
        return path

    def remove(self, names: Sequence[str]) -> None:
        """Remove entries; with the exclusive lock.

        Raises:
            CheckpointError: one can't be removed.
        """
        for name in names:
            try:
                os.unlink(self.at(name))
            except FileNotFoundError:
                pass
            except OSError as e:
                raise guarded.unwritable(self.at(name), e) from e
        if names:
            self.sync()

    def sweep(self) -> None:
        """Remove what processes that died have left; with the exclusive lock."""
        whole = {name.removesuffix(PACK) for name in self.packs()}
        left = [name for name in self._listed() if name.startswith(DRAFT)]
        self.remove(left + [name for name in self.indexes() if name.removesuffix(INDEX) not in whole])

    def sync(self) -> None:
        """Wait until the names in it are on the disk."""
        try:
            with guarded.opened(self.path, guarded.FOLDER, self.path) as fd:
                os.fsync(fd)
        except OSError as e:
            raise guarded.unwritable(self.path, e) from e

    def _digest_key_of_packs(self) -> bytes:
        """The one that the packs there are made with; a new one where there are none."""
        fault: CheckpointError | None = None
        for name in self.packs():
            try:
                return self._envelope(self.at(name)).digest_key
            except CheckpointError as e:
                fault = e
        if fault is not None:
            raise fault
        return secrets.token_bytes(KEY_BYTES)

    def _envelope(self, path: str) -> Envelope:
        return pack.decode_start(read(path, pack.START), self.master, path)

    def _names(self, pattern: re.Pattern[str]) -> tuple[str, ...]:
        return tuple(sorted(name for name in self._listed() if pattern.fullmatch(name)))

    def _listed(self) -> list[str]:
        try:
            return os.listdir(self.path)
        except FileNotFoundError:
            return []
        except OSError as e:
            raise guarded.unreadable(self.path, e) from e


def walked(path: str, envelope: Envelope) -> Table:
    """The table of a pack, from its heads; the pack's end makes them authentic.

    Raises:
        CorruptError: they are not those written.
        CheckpointError: it can't be read.
    """
    with guarded.opened(path, guarded.FILE, path) as fd:
        rows, at = pack.heads(lambda at, count: os.pread(fd, count, at), path)
        end = os.pread(fd, pack.END_BYTES, at)
    pack.require_end(envelope.sealer("chunks"), rows, end, path)
    return Table.of(rows, path)


def write(path: str, content: bytes) -> None:
    """Write a new file of ours, and wait until it is on the disk.

    Raises:
        CheckpointError: it can't be written.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            write_at(fd, [content], 0)
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as e:
        raise guarded.unwritable(path, e) from e


def write_at(fd: int, parts: list[bytes], at: int) -> None:
    """Write all of it at an offset.

    Raises:
        OSError: it can't be written.
    """
    written = os.pwritev(fd, parts, at)
    rest = memoryview(b"".join(parts))[written:] if written < sum(map(len, parts)) else memoryview(b"")
    while rest:  # after a signal, or on a full disk, where the next call fails
        at += written
        written = os.pwrite(fd, rest, at)
        rest = rest[written:]


def read(path: str, most: int) -> bytes:
    """Up to `most` bytes of a file of ours.

    Raises:
        CorruptError: there is none, or others may write it.
        CheckpointError: it can't be read.
    """
    try:
        with guarded.opened(path, guarded.FILE, path) as fd, open(fd, "rb", closefd=False) as file:
            return file.read(most)
    except OSError as e:
        raise guarded.unreadable(path, e) from e


def _size(path: str) -> int:
    try:
        return os.stat(path, follow_symlinks=False).st_size
    except OSError as e:
        raise guarded.unreadable(path, e) from e
