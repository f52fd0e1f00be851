"""The seal of every record in the index: a digest of its room, its key and itself. Pure."""

from __future__ import annotations

import hashlib
from typing import Final

from weightfs.errors import IndexStoreError

_SEAL_BYTES: Final = 8


class CorruptIndexError(IndexStoreError):
    """The file is there and is not an index of ours, or not any more."""


def seal(room: bytes, key: bytes, value: bytes) -> bytes:
    """A value as it is stored."""
    return hashlib.blake2b(value, digest_size=_SEAL_BYTES, key=room + key[:32]).digest() + value


def unseal(room: bytes, key: bytes, sealed: bytes) -> bytes:
    """The value of what was stored under that key of that room.

    Raises:
        CorruptIndexError: it is not what was stored.
    """
    value = sealed[_SEAL_BYTES:]
    if seal(room, key, value)[:_SEAL_BYTES] != sealed[:_SEAL_BYTES]:
        raise CorruptIndexError(f"a record of room {room.decode()} fails its digest")
    return value
