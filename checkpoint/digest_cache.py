"""Digests of files that have not changed since they were read, so that nothing is read twice.

A file is known by its identity: device, inode, size, mtime and ctime. Who rewrites a file under its old size and mtime
can't set its ctime back, so such a file is read anew. What had changed less than two seconds before it was read is not
recorded, for a filesystem's clock may be that coarse: a later write could leave the same ctime.

What is lost or damaged is only read again: nothing here fails.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import struct
import time
import zlib
from collections.abc import Iterable
from typing import Final, Self

from checkpoint import guarded
from checkpoint.digests import Digested, Identity
from checkpoint.errors import CheckpointError

YOUNG_NS: Final = 2_000_000_000
MOST_ROWS: Final = 100_000
"""About 15 MB. Those not used for longest go first."""

_log = logging.getLogger(__name__)
_KEY: Final = struct.Struct("<QQQqq")
_ROW: Final = struct.Struct("<32sI")
_NOTED_NS: Final = 86_400 * 10**9
_WAIT_S: Final = 2.0
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS digest (identity BLOB PRIMARY KEY, value BLOB NOT NULL, used_ns INTEGER NOT NULL)
WITHOUT ROWID
"""


class DigestCache:
    """Digests by identity, in a file that processes share. One thread at a time.

    Args:
        path: of the file; it and its folder are made if need be. Where others could have written it, it is not used.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._used: list[bytes] = []
        self._connection = self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the file back."""
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error), self._connection:
                rows = [(time.time_ns(), key) for key in self._used]
                self._connection.executemany("UPDATE digest SET used_ns = ? WHERE identity = ?", rows)
            self._connection.close()
            self._connection = None

    def get(self, identity: Identity) -> str | None:
        """The digest of a file's bytes, 64 hexadecimal digits; None where it is not known."""
        if self._connection is None:
            return None
        key = _key(identity)
        try:
            row = self._connection.execute("SELECT value, used_ns FROM digest WHERE identity = ?", (key,)).fetchone()
        except sqlite3.Error as e:
            self._give_up(e)
            return None
        if row is None or not isinstance(row[0], bytes) or len(row[0]) != _ROW.size:
            return None
        digest, check = _ROW.unpack(row[0])
        if check != _check(key, digest):
            return None
        if row[1] < time.time_ns() - _NOTED_NS:  # one write a day and file, at the end: restore waits for each
            self._used.append(key)
        return str(digest.hex())

    def put(self, found: Iterable[Digested]) -> None:
        """Remember digests; not those of files that had just changed when they were read."""
        if self._connection is None:
            return
        rows = []
        for one in found:
            if max(one.identity.mtime_ns, one.identity.ctime_ns) + YOUNG_NS <= one.started_ns:
                key, digest = _key(one.identity), bytes.fromhex(one.blake3)
                rows.append((key, _ROW.pack(digest, _check(key, digest)), one.started_ns))
        try:
            with self._connection:
                self._connection.executemany("INSERT OR REPLACE INTO digest VALUES (?, ?, ?)", rows)
                self._connection.execute(
                    "DELETE FROM digest WHERE identity IN "
                    "(SELECT identity FROM digest ORDER BY used_ns DESC LIMIT -1 OFFSET ?)",
                    (MOST_ROWS,),
                )
        except sqlite3.Error as e:
            self._give_up(e)

    def _open(self) -> sqlite3.Connection | None:
        try:
            os.makedirs(os.path.dirname(self.path), mode=0o700, exist_ok=True)
            guarded.require_path_ours(os.path.dirname(self.path))
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                guarded.require_ours(os.fstat(fd), self.path)
            finally:
                os.close(fd)
            try:
                return self._connect()
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError as e:  # it is none, or a damaged one
                _log.warning("%s is damaged and begun anew: %s", self.path, e)
                self._remove()
                return self._connect()
        except (OSError, CheckpointError, sqlite3.Error) as e:
            _log.warning("digests are not remembered: %s", e)
            return None

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=_WAIT_S)
        try:
            with connection:
                connection.execute(_SCHEMA)
                connection.execute("SELECT used_ns FROM digest LIMIT 1").fetchone()
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    def _give_up(self, error: Exception) -> None:
        _log.warning("%s is not used any more: %s", self.path, error)
        self.close()
        if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
            self._remove()

    def _remove(self) -> None:
        for path in (self.path, self.path + "-journal"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def _key(identity: Identity) -> bytes:
    return _KEY.pack(identity.device, identity.inode, identity.nbytes, identity.mtime_ns, identity.ctime_ns)


def _check(key: bytes, digest: bytes) -> int:
    return zlib.crc32(key + digest)
