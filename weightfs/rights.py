"""Who may enter a set of tensors: whoever may read its files where they lie.

A set's folder stands beside its files, or, where these are symlinks (Hugging Face's cache), somewhere else. Its listing
tells what their headers say, and a view's own mode says nothing of the folders its file lies in. So the set's folder
asks for it all: `r` of whoever may read every file, `x` of whoever may enter the folders above them.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from weightfs.source.base import Source, SourceStat

ACCESS_LIST: Final = b"system.posix_acl_access"
_ENTER: Final = 0o111
_READ: Final = 0o444
_ENTRY: Final = struct.Struct("<HHI")  # tag, permissions, id: posix_acl_xattr_entry of linux/posix_acl_xattr.h
_VERSION_BYTES: Final = 4
_NONE: Final = frozenset({errno.ENODATA, errno.EOPNOTSUPP})


class Rights(msgspec.Struct, frozen=True):
    """Owner, permission bits and access list (as the extended attribute has it) of a set's folder."""

    uid: int
    gid: int
    mode: int
    access_list: bytes | None = None


class _Barrier(msgspec.Struct, frozen=True):
    """Something on the way to a file, or a file, that does not let everyone through."""

    entry: SourceStat
    access_list: bytes | None


def rights_of(source: Source, folder: bytes, files: Iterable[bytes]) -> Rights | None:
    """What the folder of a set must ask for; None when that is nothing.

    Args:
        source: where the files lie.
        folder: the folder the set belongs to; whoever comes to the set has passed it and those above it.
        files: names of the set's files in `folder`. One that is gone asks for nothing.

    Raises:
        OSError: the source failed.
    """
    above = set(_parents(folder)) | {folder}
    landings = {path for name in files if (path := source.follow(os.path.join(folder, name))) is not None}
    on_the_way = {parent for path in landings for parent in _parents(path)} - above
    return combine(
        list(_barriers(source, sorted(on_the_way), _ENTER)), list(_barriers(source, sorted(landings), _READ))
    )


def combine(folders: list[_Barrier], files: list[_Barrier]) -> Rights | None:
    """One owner, mode and list that lets in nobody whom one of these shuts out; if need be only whoever serves."""
    barriers = folders + files
    if not barriers:
        return None
    owners = {(barrier.entry.uid, barrier.entry.gid) for barrier in barriers}
    lists = {barrier.access_list for barrier in barriers}
    # An owner, mode and list can be those of several things only if they agree on who is meant.
    if len(owners) > 1 or (lists != {None} and len(barriers) > 1):
        return Rights(os.geteuid(), os.getegid(), stat.S_IRUSR | stat.S_IXUSR)
    ((uid, gid),) = owners
    enter, read = _ENTER, _READ
    for barrier in folders:
        enter &= barrier.entry.mode
    for barrier in files:
        read &= barrier.entry.mode
    mode = enter | (read & enter << 2)
    (access_list,) = lists
    return Rights(uid, gid, mode, access_list and _translated(access_list, bool(folders)))


def _barriers(source: Source, paths: Iterable[bytes], wanted: int) -> Iterator[_Barrier]:
    for path in paths:
        try:
            entry = source.lstat(path)
            found: bytes | None = source.getxattr(path, ACCESS_LIST)
        except FileNotFoundError:
            continue
        except OSError as e:
            if e.errno not in _NONE:
                raise
            found = None
        if found is not None or entry.mode & wanted != wanted:
            yield _Barrier(entry, found)


def _translated(access_list: bytes, of_folder: bool) -> bytes:
    """The list of the one barrier there is: a folder's `x` becomes `rx`, a file's `r` stays beside everyone's `x`."""
    entries = bytearray(access_list)
    for at in range(_VERSION_BYTES, len(entries) - _ENTRY.size + 1, _ENTRY.size):
        tag, bits, who = _ENTRY.unpack_from(entries, at)
        bits = (5 if bits & 1 else 0) if of_folder else bits & 4 | 1
        _ENTRY.pack_into(entries, at, tag, bits, who)
    return bytes(entries)


def _parents(path: bytes) -> Iterator[bytes]:
    """Every folder above a path, the root (`b""`) excepted: whoever is on the mount has passed it."""
    while path := os.path.dirname(path):
        yield path
