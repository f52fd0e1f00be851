"""The LMDB file of an index while it is in use: it grows, and what turns out to be damaged is begun anew.

What is foreign, of another schema or damaged is renamed aside, and a new index begins under a new epoch.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Final, TypeVar

import lmdb
import msgspec

from weightfs.errors import IndexStoreError
from weightfs.index.files import IndexFiles
from weightfs.index.numbers import Numbers
from weightfs.index.opening import Rooms, check, open_environment, settle_meta
from weightfs.index.schema import ROOMS
from weightfs.index.seals import CorruptIndexError

log = logging.getLogger(__name__)

_DAMAGED: Final = (
    lmdb.CorruptedError,
    lmdb.InvalidError,
    lmdb.PageNotFoundError,
    lmdb.PanicError,
    lmdb.VersionMismatchError,
)
"""What LMDB says of a file that is not, or no longer, an index; anything else (a full disk, no memory) says nothing of
the file."""
_T = TypeVar("_T")


class Database:
    """Transactions on the index's file. Thread-safe.

    Attributes:
        lock: held while anything is read or written, since growing the map ends the transactions that are open.
        numbers: those it gives out.
        rooms: LMDB's handles, for use within a transaction of `read` or `write`.
        set_aside: where an unusable predecessor was moved, with the reason, or None.
    """

    def __init__(
        self, files: IndexFiles, source: str, numbers: Numbers, *, epoch_after: int, may_be_damaged: bool
    ) -> None:
        """Open or make it, its folder included.

        Args:
            files: the index's.
            source: an index of another one is foreign.
            numbers: begun with it.
            epoch_after: a new index gets an epoch larger than this.
            may_be_damaged: whether it must be walked, if it was not closed.

        Raises:
            IndexStoreError: the folder can't be written.
        """
        self._files = files
        self._source = source
        self._env: lmdb.Environment | None = None
        self.lock = threading.RLock()
        self.numbers = numbers
        self.rooms: Rooms = {}
        self.set_aside: tuple[str, str] | None = None
        try:
            os.makedirs(files.folder, mode=0o700, exist_ok=True)
            self._open(epoch_after, may_be_damaged=may_be_damaged)
        except OSError as e:
            raise IndexStoreError(
                f"can't keep an index: {os.strerror(e.errno or 0)}",
                path=files.folder,
                mend="--state-dir names another folder",
            ) from e
        except lmdb.Error as e:
            raise IndexStoreError(f"can't keep an index: {e}", path=files.folder) from e

    def _open(self, epoch_after: int, *, may_be_damaged: bool) -> None:
        try:
            if may_be_damaged and os.path.exists(self._files.path):
                check(self._files)
            self._attach(epoch_after)
        except (*_DAMAGED, CorruptIndexError, msgspec.MsgspecError) as e:
            self._put_aside(str(e))
            self._attach(epoch_after)

    def rebuild(self, reason: str) -> None:
        """Begin anew under a live mount; the caller holds the lock.

        Where a new index can't be made (a full disk), the mount goes on without one, and the next write tries again.
        """
        if self._env is not None:
            self._env.close()
            self._env = None
        try:
            self._put_aside(reason)
            self._attach(self.numbers.epoch)
        except (OSError, lmdb.Error) as e:
            log.warning("no new index yet: %s", e)

    def _put_aside(self, reason: str) -> None:
        aside = self._files.put_aside()
        self.set_aside = (aside, reason)
        log.warning("index set aside to %s, a new one is built: %s", aside, reason)
        self._files.drop_older(aside)

    def _attach(self, epoch_after: int) -> None:
        env = open_environment(self._files.path)
        try:
            self.rooms = {room: env.open_db(room) for room in ROOMS}
            with env.begin(write=True) as txn:
                meta = settle_meta(txn, self.rooms, self._source, max(epoch_after, self._files.last_epoch()))
                taken_over = self.numbers.take_over(meta.epoch)
                if not taken_over:
                    self.numbers.reserve(txn, self.rooms[b"meta"], 0)
            self._files.note_epoch(self.numbers.epoch)
            if not taken_over:
                env.sync(True)
            env.reader_check()  # readers that were killed would keep their pages for ever
            self.numbers.note()
        except BaseException:
            self.numbers.give_up()
            env.close()
            raise
        self._env = env
        self._files.mark_open()

    def take_numbers(self, count: int) -> int:
        """Reserve a run of `count` inode numbers and give its first.

        Raises:
            IndexStoreError: the block is used up, and another could not be written.
        """
        with self.lock:
            if not self.numbers.has(count):
                try:
                    self.write(lambda txn: self.numbers.reserve(txn, self.rooms[b"meta"], count))
                    self.sync()
                except IndexStoreError:
                    self.numbers.give_up()
                    raise
            return self.numbers.take(count)

    def read(self, read: Callable[[lmdb.Transaction], _T]) -> _T | None:
        """Read in one transaction; None where the index can't be read just now, which is never an error to a caller."""
        with self.lock:
            for _ in range(3):
                if self._env is None:
                    break
                try:
                    with self._env.begin() as txn:
                        return read(txn)
                except lmdb.MapResizedError:
                    self._env.set_mapsize(0)  # a daemon that shares it has made it grow
                except (*_DAMAGED, CorruptIndexError) as e:
                    self.rebuild(str(e))
                except lmdb.Error as e:
                    log.warning("index not read: %s", e)
                    break
        return None

    def write(self, write: Callable[[lmdb.Transaction], None]) -> None:
        """Write in one transaction, under the lock as every other: growing the map ends those that are open.

        Raises:
            IndexStoreError: it could not be written.
        """
        with self.lock:
            for _ in range(8):  # each turn doubles the map, or begins anew
                try:
                    if self._env is None:
                        self._attach(self.numbers.epoch)
                    assert self._env is not None
                    with self._env.begin(write=True) as txn:
                        write(txn)
                    return
                except lmdb.MapFullError:
                    assert self._env is not None
                    self._env.set_mapsize(2 * self._env.info()["map_size"])
                except lmdb.MapResizedError:
                    assert self._env is not None
                    self._env.set_mapsize(0)
                except (*_DAMAGED, CorruptIndexError) as e:
                    self.rebuild(str(e))
                except (OSError, lmdb.Error) as e:
                    raise IndexStoreError(f"can't be written: {e}", path=self._files.path) from e
        raise IndexStoreError("can't be written: it is damaged or full again and again", path=self._files.path)

    def sync(self) -> None:
        """Have what is committed on the disk, without the lock.

        Raises:
            IndexStoreError: the disk failed.
        """
        if (env := self._env) is not None:
            try:
                env.sync(True)
            except lmdb.Error as e:
                raise IndexStoreError(f"can't be written: {e}", path=self._files.path) from e

    def close(self) -> None:
        """Close it, and leave the mark that spares the next open its walk."""
        with self.lock:
            if self._env is None:
                return
            self._env.close()
            self._env = None
        self._files.mark_clean()
