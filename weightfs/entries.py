"""What calls answer: attributes, rows of a listing and their cookies, how a file was opened. No I/O."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

import msgspec

TENSORS: Final = b".tensors"
NPY: Final = b".npy"
STATE: Final = b".weightfs"
READABLE_BITS: Final = 0o444
_FIRST_COOKIE: Final = 16


class Attributes(msgspec.Struct):
    """One inode as stat(2) shows it; times in nanoseconds since 1970, `blocks` in units of 512 bytes.

    Attributes:
        name_s, own_s: for how long its name, and the rest, may be believed without asking; None is as configured.
    """

    inode: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    blocks: int
    block_bytes: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    name_s: float | None = None
    own_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """How the kernel is to treat a file just opened.

    Attributes:
        keep_cache: what the kernel has cached of it is still true.
        direct: its size means nothing; every read must come to us.
    """

    keep_cache: bool
    direct: bool = False


class DirectoryEntry(msgspec.Struct, frozen=True):
    """One row of a listing; `cookie` depends on the name alone, so a listing can go on after a restart."""

    name: bytes
    attributes: Attributes
    cookie: int


def cookie_of(entry: DirectoryEntry) -> int:
    """The cookie, as a key to sort by."""
    return entry.cookie


def cookie(name: bytes) -> int:
    """63 bits that depend on the name alone: two of 100,000 names agree once in a billion folders."""
    digest = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1
    return max(digest, _FIRST_COOKIE)
