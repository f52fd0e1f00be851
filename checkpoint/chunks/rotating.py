"""Another master key for a store's packs, and for what is sealed beside them.

    at first        each pack, each object and `key` have an envelope of the old key
    then            packs and objects one after another have a second one, of the new key
    then            `key` has one of the new key, instead of the old one
    then            packs and objects one after another lose that of the old key

So the old key opens everything until `key` is replaced, and the new one from there on. No chunk is written.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from checkpoint import guarded
from checkpoint.chunks import objects, pack
from checkpoint.chunks.folder import KEY, Folder, read, write_at
from checkpoint.chunks.keys import MasterKey
from checkpoint.chunks.sealing import ENVELOPE_BYTES, Kind, rewrapped
from checkpoint.errors import CheckpointError, CorruptError

_WAIT_S: Final = 10.0

Change: TypeAlias = Callable[[bytes, str], bytes]
"""Gives what is to be written in place of an object read at a path, or raises a CorruptError."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rotated:
    """What has another key.

    Attributes:
        packs: how many have it.
        objects: how many have it.
        faults: packs by their name, and objects by their path, that neither key opens; they are as they were.
    """

    packs: int
    objects: int
    faults: dict[str, CheckpointError] = field(default_factory=dict)


Objects: TypeAlias = Callable[[Change], tuple[int, dict[str, CheckpointError]]]
"""Changes every object of the store: each is on the disk before it takes the other one's place. Gives how many objects
there are now as asked for, and the faults of the others, by path."""


def none(change: Change) -> tuple[int, dict[str, CheckpointError]]:
    """The objects of a store that has packs only."""
    del change
    return 0, {}


def rotate(folder: Folder, new: MasterKey, every_object: Objects = none) -> Rotated:
    """Wrap every key of a store with another master key. Interrupted, it can be done again, and done again is harmless.

    Who has a copy of the old envelopes and the old key still reads what was sealed until now.

    Args:
        folder: that has the old master key.
        new: the other one.
        every_object: called twice, while nobody can begin to add chunks, and so neither objects that need them.

    Raises:
        RetryError: somebody adds chunks; and whatever `every_object` raises.
        CorruptError: the store has neither key.
        CheckpointError: the folder can't be written.
    """
    old = folder.master
    if old is None:
        raise ValueError("what is not encrypted has no key to change")
    with folder.locked(fcntl.LOCK_EX, _WAIT_S):
        folder.sweep()
        path = folder.at(KEY)
        key = rewrapped(read(path, ENVELOPE_BYTES), Kind.STORE, old, new, path)
        faults: dict[str, CheckpointError] = {}
        for name in folder.packs():
            try:
                _add_envelope(folder.at(name), old, new)
            except CorruptError as e:
                faults[name] = e
        faults |= every_object(lambda content, path: objects.opening_with_both(content, old, new, path))[1]
        folder.replace(KEY, key)
        whole = [name for name in folder.packs() if name not in faults]
        for name in whole:
            _clear_envelopes(folder.at(name), new)
        count, more = every_object(lambda content, path: objects.opening_with_one(content, new, path))
        return Rotated(packs=len(whole), objects=count, faults={**more, **faults})


def _add_envelope(path: str, old: MasterKey, new: MasterKey) -> None:
    """Have a pack open with both keys."""
    start = read(path, pack.START)
    at = pack.slot_to_fill(start, old, new)
    if at is None:
        pack.decode_start(start, new, path)
    else:
        _overwrite(path, [at], pack.decode_start(start, old, path).wrapped(new))


def _clear_envelopes(path: str, new: MasterKey) -> None:
    """Have a pack open with the new key alone."""
    _overwrite(path, pack.slots_to_clear(read(path, pack.START), new), bytes(ENVELOPE_BYTES))


def _overwrite(path: str, slots: list[int], content: bytes) -> None:
    if not slots:
        return
    try:
        fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            for at in slots:
                write_at(fd, [content], at)
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as e:
        raise guarded.unwritable(path, e) from e
