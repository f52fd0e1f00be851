"""Changing what is in a store's packs: removing what no snapshot needs, and mending indexes.

All of it holds the exclusive lock. At each moment the folder is one that can be used: what is new has its name, and is
on the disk, before what it replaces goes.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from checkpoint import guarded
from checkpoint.chunks import pack
from checkpoint.chunks.catalogue import Catalogue, OpenPack
from checkpoint.chunks.folder import INDEX, KEY, PACK, Folder, Pack, read, walked
from checkpoint.chunks.pack import Table
from checkpoint.chunks.sealing import ENVELOPE_BYTES, Envelope, key_id_of
from checkpoint.chunks.writing import PackWriter
from checkpoint.errors import CheckpointError, CorruptError

_WAIT_S: Final = 10.0
_SPARSE: Final = 0.5
"""A pack with less of it live is written anew: so the packs take at most twice what is live."""
_MANY: Final = 8
"""So many packs of about a size are merged."""
_TIERS: Final = (1 << 20, 8 << 20, 64 << 20)
"""Packs of less are of about a size, in bytes. Merged they are of the next one: a chunk is written anew three times at
most for that, and a prune leaves 21 packs below the last at most.
"""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pruned:
    """What `prune` did.

    Attributes:
        removed: how many packs went.
        rewritten: how many of those had chunks that are needed, which are in new packs; they had few of them, or were
            many small ones.
        freed_nbytes: by how much the folder is smaller.
        faults: packs that can't be read and were left as they are, by name.
    """

    removed: int
    rewritten: int
    freed_nbytes: int
    faults: dict[str, CheckpointError]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rebuilt:
    """What `rebuild` found.

    Attributes:
        chunks: how many are whole.
        lost: how many are not, by the name of their pack; 0 for one that only lacks its end.
        faults: packs that can't be opened at all, by name.
    """

    chunks: int
    lost: dict[str, int]
    faults: dict[str, CheckpointError]


def prune(folder: Folder, live: Callable[[], Iterable[bytes]]) -> Pruned:
    """Remove chunks that nobody needs.

    Args:
        folder: of the packs.
        live: called while nobody can begin to add chunks; gives the ids of all that any snapshot needs.

    Raises:
        RetryError: somebody adds chunks.
        CheckpointError: the folder can't be read or written; and whatever `live` raises. No chunk that is needed went.
    """
    with folder.locked(fcntl.LOCK_EX, _WAIT_S):
        wanted = set(live())
        before = _nbytes(folder)
        folder.sweep()
        digest_key = folder.digest_key()
        if digest_key is None:
            return Pruned(removed=0, rewritten=0, freed_nbytes=before - _nbytes(folder), faults={})
        catalogue = Catalogue(folder, digest_key)
        faults = dict(catalogue.faults)
        going: list[Pack] = []
        rewritten = 0
        needed = _needed(catalogue.packs, wanted)
        dense = {found.path: nbytes for found, numbers in needed if (nbytes := _dense_nbytes(found, numbers))}
        stays = dense.keys() - _many_small(dense)
        with PackWriter(folder, digest_key, frozenset(), threads=0) as writer:
            for found, numbers in needed:
                if found.path in stays:
                    continue
                try:
                    _move(found, numbers, writer)
                except CorruptError as e:
                    faults[os.path.basename(found.path)] = e
                    continue
                going.append(found)
                rewritten += bool(numbers)
            writer.commit()
        names = [os.path.basename(found.path) for found in going]
        folder.remove([each for name in names for each in (name, name.removesuffix(PACK) + INDEX)])
        return Pruned(removed=len(going), rewritten=rewritten, freed_nbytes=before - _nbytes(folder), faults=faults)


def rebuild(folder: Folder) -> Rebuilt:
    """Read every chunk, and make indexes anew that name those which are whole; also the store's key, from a pack.

    What is lost is then added anew by whoever makes a snapshot that has it.

    Raises:
        RetryError: somebody adds chunks.
        CorruptError: the master key is not the store's.
        CheckpointError: the folder can't be written.
    """
    with folder.locked(fcntl.LOCK_EX, _WAIT_S):
        folder.sweep()
        _remove_damaged_key(folder)
        digest_key = folder.made_digest_key()
        chunks, lost, faults = 0, {}, {}
        for name in folder.packs():
            try:
                envelope = folder.envelope(name, digest_key)
                table, is_whole = _salvaged(folder.at(name), envelope)
            except CheckpointError as e:
                faults[name] = e
                continue
            gone = sum(head.method == pack.LOST for head in table)
            chunks += len(table) - gone
            if gone or not is_whole:
                lost[name] = gone
            _replace_index(folder, name, envelope, table)
        return Rebuilt(chunks=chunks, lost=lost, faults=faults)


def _needed(packs: list[Pack], wanted: set[bytes]) -> list[tuple[Pack, list[int]]]:
    """The records of each pack that are needed; where several packs have a chunk, that of the fullest one."""
    counts = {found.path: sum(head.id in wanted for head in found.table) for found in packs}
    kept: set[bytes] = set()
    needed = []
    for found in sorted(packs, key=lambda each: counts[each.path], reverse=True):
        numbers = []
        for number, head in enumerate(found.table):
            if head.method != pack.LOST and head.id in wanted and head.id not in kept:
                kept.add(head.id)
                numbers.append(number)
        needed.append((found, numbers))
    return needed


def _dense_nbytes(found: Pack, numbers: list[int]) -> int:
    """What the records of a pack take that are needed; 0 where that is too little of it."""
    nbytes = sum(pack.HEAD_BYTES + found.table[number].sealed_nbytes for number in numbers)
    return nbytes if nbytes >= _SPARSE * (found.table.offsets[-1] - pack.START) else 0


def _many_small(sizes: Mapping[str, int]) -> set[str]:
    """Which packs are to be one, by the bytes of each that are needed."""
    merged: set[str] = set()
    for least, most in zip((0, *_TIERS), _TIERS, strict=False):
        alike = {path for path, nbytes in sizes.items() if least <= nbytes < most}
        if len(alike) >= _MANY:
            merged |= alike
    return merged


def _move(found: Pack, numbers: list[int], writer: PackWriter) -> None:
    opened = OpenPack(found)
    for number in numbers:
        writer.move(found.table[number], opened.payload(number))


def _salvaged(path: str, envelope: Envelope) -> tuple[Table, bool]:
    """The table of a pack in which chunks that are not whole are LOST, and whether nothing else is missing."""
    table, is_whole = _best_table(path, envelope)
    opened = OpenPack(Pack(path=path, envelope=envelope, table=table))
    rows = bytearray(table.rows)
    for number, head in enumerate(table):
        try:
            if head.method == pack.LOST or pack.digest(envelope.digest_key, opened.get(number)) != head.id:
                raise CorruptError("holds a chunk of another id", path=path)
        except CorruptError as e:
            _log.warning("chunk %d of %s is lost: %s", number, path, e)
            at = number * pack.HEAD_BYTES
            rows[at : at + pack.HEAD_BYTES] = head.lost().encoded()
    return Table.of(bytes(rows), path, table.pack_nbytes), is_whole


def _best_table(path: str, envelope: Envelope) -> tuple[Table, bool]:
    """A pack's own heads where they are all there; else what its index says; else those up to where they end."""
    try:
        return walked(path, envelope), True
    except CorruptError as e:
        _log.warning("%s is damaged: %s", path, e)
    nbytes = os.stat(path).st_size
    index = path.removesuffix(PACK) + INDEX
    try:
        rows = pack.decode_index(envelope, read(index, pack.MOST_INDEX_BYTES), index).rows
    except CheckpointError:
        rows = b""
    if not rows:
        with guarded.opened(path, guarded.FILE, path) as fd:
            rows = pack.heads(lambda at, count: os.pread(fd, count, at), path)[0]
    return Table.of(pack.within(rows, nbytes), path, nbytes), False


def _replace_index(folder: Folder, name: str, envelope: Envelope, table: Table) -> None:
    """Write an index, unless it is there."""
    index = name.removesuffix(PACK) + INDEX
    try:
        if pack.decode_index(envelope, read(folder.at(index), pack.MOST_INDEX_BYTES), index) == table:
            return
    except CheckpointError:
        pass
    folder.replace(index, pack.encode_index(envelope, table))


def _remove_damaged_key(folder: Folder) -> None:
    """Remove the store's key where it is none, not where another master key is needed."""
    if os.path.lexists(folder.at(KEY)):
        content = read(folder.at(KEY), ENVELOPE_BYTES + 1)
        if len(content) != ENVELOPE_BYTES or key_id_of(content) is None:
            folder.remove([KEY])


def _nbytes(folder: Folder) -> int:
    """The size of all that is in it."""
    try:
        with os.scandir(folder.path) as entries:
            return sum(entry.stat(follow_symlinks=False).st_size for entry in entries)
    except OSError as e:
        raise guarded.unreadable(folder.path, e) from e
