"""What the weight files of the source contain: headers parsed once, remembered by content, grouped into sets.

Everything here may wait for the source, so it runs in worker threads; all of it is thread-safe.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

import msgspec

from weightfs.errors import EntryError, FormatError, ShortReadError, StaleError
from weightfs.formats import (
    encode_name,
    format_of,
    group_shards,
    merge_shards,
    npy_header,
    parse_weight_map,
)
from weightfs.formats.layout import WeightLayout
from weightfs.formats.shards import MAX_INDEX_BYTES
from weightfs.headers import is_settled, read_record, slot_of
from weightfs.index.schema import FileRecord
from weightfs.index.store import IndexStore
from weightfs.index.young import YoungFile
from weightfs.model import read_exactly
from weightfs.source.base import Source, SourceStat

log = logging.getLogger(__name__)

_MAX_RUNS: Final = 4096  # parsed files kept in memory
_MAX_SETS: Final = 256
_MAX_TENSORS: Final = 100_000
"""Tensors kept in memory, in parsed files and once more in sets: about 0.3 KB each."""
_MAX_FAULTS: Final = 1024
_RECENT_S: Final = 1.0
_K = TypeVar("_K")
_V = TypeVar("_V")


@dataclass(frozen=True, slots=True)
class ParsedFile:
    """One content of one weight file.

    Attributes:
        identity: of that content.
        path: where it was found, relative to the root, symlinks resolved.
        name: what it is called in the folder it was found in.
        record: what its header said.
        settled: whether the identity can be relied on to change with the content.
    """

    identity: bytes
    path: bytes
    name: str
    record: FileRecord
    settled: bool

    @property
    def layout(self) -> WeightLayout | None:
        """What its header said, as a layout made anew each time; None when the header has a fault."""
        return None if self.record.fault else self.record.layout(self.name)


@dataclass(frozen=True, slots=True)
class ViewSet:
    """The tensors of one set, by the file name each has on the mount -> (file it lies in, position in its layout).

    Attributes:
        name: of the set.
        raw: the entries of `.tensors/`; empty for big-endian files, since those files promise little-endian bytes.
        npy: the entries of `.npy/`.
    """

    name: str
    raw: Mapping[bytes, tuple[ParsedFile, int]]
    npy: Mapping[bytes, tuple[ParsedFile, int]]

    def __len__(self) -> int:
        """Names in both."""
        return len(self.raw) + len(self.npy)


class Library:
    """Parsed weight files of one source."""

    def __init__(self, source: Source, index: IndexStore) -> None:
        self._source = source
        self._index = index
        self._lock = threading.Lock()
        self._runs: OrderedDict[bytes, ParsedFile] = OrderedDict()  # by `slot_of`
        self._bases: list[int] = []  # sorted; parallel to _by_base's keys
        self._by_base: dict[int, bytes] = {}
        self._tensors = 0  # in `_runs`
        self._sets: OrderedDict[tuple[object, ...], ViewSet | None] = OrderedDict()
        self._recent: OrderedDict[tuple[bytes, str], tuple[float, ViewSet]] = OrderedDict()
        self.headers_parsed = 0
        self._faults: OrderedDict[bytes, tuple[bytes, FormatError]] = OrderedDict()

    @property
    def models(self) -> int:
        """Weight files whose header is in memory."""
        return len(self._runs)

    def parsed(self, path: bytes, entry: SourceStat, name: str) -> ParsedFile:
        """The header of the weight file at `path`, which is `entry` now; a fault is remembered like a layout.

        `name` is what the file is called where it was found: a symlink's own name tells the format, its target's
        (a digest, in Hugging Face's cache) does not.

        Raises:
            ShortReadError, StaleError: the file changed while it was read.
            OSError: the source failed.
        """
        identity = entry.identity
        slot = slot_of(identity, name)
        settled = is_settled(entry, time.time_ns())
        with self._lock:
            known = self._runs.get(slot)
            if known is not None and known.path == path and (known.settled or not settled):
                self._runs.move_to_end(slot)
                return known
        record = self._index.file(slot) if settled else None
        if record is None:
            record = self._parse(path, name, entry, known.record if known else None)
            if settled:
                record = self._index.put_file_once(slot, record)
        elif known is not None and not known.settled and known.record.tensors == record.tensors:
            # The crawl has recorded it since it was young; the numbers given out then are the ones that stay.
            record = known.record
            self._index.put_file(slot, record)
        if settled and record.base and self._index.owner_of_view(record.base) != (identity, path, name):
            self._index.put_owner(record.base, identity, path, name)
        if record.base and not settled:
            self._index.put_young(YoungFile(identity, path, name, record))
        found = ParsedFile(identity, path, name, record, settled)
        self._remember(found)
        return found

    def _parse(self, path: bytes, name: str, entry: SourceStat, before: FileRecord | None) -> FileRecord:
        fresh = read_record(self._source, path, entry, name)
        assert fresh is not None, "no limit was set"
        self.headers_parsed += 1
        if not fresh.tensors:
            return fresh
        same = before is not None and fresh.tensors == before.tensors
        base = before.base if before is not None and same else self._index.take(2 * len(fresh.tensors))
        return msgspec.structs.replace(fresh, base=base)

    def _remember(self, found: ParsedFile) -> None:
        with self._lock:
            slot = slot_of(found.identity, found.name)
            if slot in self._runs:
                self._drop(self._runs.pop(slot))
            self._runs[slot] = found
            self._tensors += len(found.record.tensors)
            name = os.fsdecode(found.path)
            if found.record.fault:
                reason, message, offset = found.record.fault
                fault = FormatError(reason, message, offset=offset, path=name)
                self._faults[found.path] = found.identity, fault
                if len(self._faults) > _MAX_FAULTS:
                    self._faults.popitem(last=False)
            else:
                self._faults.pop(found.path, None)
            if found.record.base:
                bisect.insort(self._bases, found.record.base)
                self._by_base[found.record.base] = slot
            while len(self._runs) > 1 and (len(self._runs) > _MAX_RUNS or self._tensors > _MAX_TENSORS):
                self._drop(self._runs.popitem(last=False)[1])

    def _drop(self, gone: ParsedFile) -> None:
        """Undo what `_remember` noted of a file just taken out of `_runs`."""
        self._tensors -= len(gone.record.tensors)
        if self._by_base.pop(gone.record.base, None) is not None:
            self._bases.remove(gone.record.base)

    def current_faults(self) -> list[FormatError]:
        """The faults found so far, of files that are still what they were. May wait for the source."""
        with self._lock:
            found = [(path, identity, fault) for path, (identity, fault) in self._faults.items()]
        current = []
        for path, identity, fault in sorted(found, key=lambda row: row[0]):
            with contextlib.suppress(OSError):
                if self._source.lstat(path).identity == identity:
                    current.append(fault)
        return current

    def view(self, inode: int) -> tuple[ParsedFile, int, bool] | None:
        """Whose tensor a view's number stands for: (file, position in its layout, whether it is the `.npy` form).

        None for a number that belongs to no run of views.
        """
        with self._lock:
            at = bisect.bisect_right(self._bases, inode) - 1
            found = self._runs.get(self._by_base[self._bases[at]]) if at >= 0 else None
        if found is None or not _holds(found.record, inode):
            owner = self._index.owner_of_view(inode)
            record = self._index.file(slot_of(owner[0], owner[2])) if owner else None
            if owner is not None and record is not None and _holds(record, inode):
                found = ParsedFile(owner[0], owner[1], owner[2], record, settled=True)
            elif (young := self._index.young_file(inode)) is not None:
                found = ParsedFile(young.identity, young.path, young.name, young.record, settled=False)
            else:
                return None
            self._remember(found)
        position, npy = divmod(inode - found.record.base, 2)
        return found, position, bool(npy)

    def sets(self, names: Iterable[bytes]) -> dict[str, tuple[str, ...]]:
        """The sets among the entries of a folder: set name -> weight files, in shard order."""
        texts = (os.fsdecode(name) for name in names)
        return group_shards(name for name in texts if format_of(name))

    def view_set(self, folder: bytes, name: str) -> ViewSet | None:
        """The tensors of one set of a folder, or None when there is no such set or its headers have a fault.

        Raises:
            OSError: the source failed.
        """
        names = self._source.names(folder)
        files = self.sets(names).get(name)
        if files is None:
            return None
        located: list[tuple[str, bytes, SourceStat]] = []
        for file in files:
            path = self._source.follow(os.path.join(folder, os.fsencode(file)))
            if path is None:
                continue
            try:
                entry = self._source.lstat(path)
            except FileNotFoundError:
                continue
            if entry.is_file:
                located.append((file, path, entry))
        weight_map = self._weight_map_file(folder, name, files, names)
        key = (folder, name, weight_map and weight_map[1].identity, *(entry.identity for _, _, entry in located))
        with self._lock:
            known = key in self._sets
            if known:
                self._sets.move_to_end(key)
                found, settled = self._sets[key], True
        if not known:
            found, settled = self._merge(name, located, weight_map)
        with self._lock:
            if settled:
                self._sets[key] = found
            if found is not None:
                self._recent[folder, name] = (time.monotonic() + _RECENT_S, found)
                self._recent.move_to_end((folder, name))
            _trim(self._sets, lambda views: len(views or ()))
            _trim(self._recent, lambda row: len(row[1]), lambda row: row[0] < time.monotonic())
        return found

    def last_change_ns(self, folder: bytes, name: str | None) -> int:
        """When a set of a folder (None: any of them), or the folder, last changed: listings are good until then."""
        changes = [self._source.lstat(folder)]
        sets = self.sets(self._source.names(folder))
        for file in sets.get(name, ()) if name is not None else itertools.chain(*sets.values()):
            path = self._source.follow(os.path.join(folder, os.fsencode(file)))
            with contextlib.suppress(FileNotFoundError):
                changes += [self._source.lstat(path)] if path is not None else []
        return max(max(change.mtime_ns, change.ctime_ns) for change in changes)

    def recent_view_set(self, folder: bytes, name: str) -> ViewSet | None:
        """A set that was found to be current within the last second. Never waits.

        Walking a set's tensors would else examine all its shards for each one. Each view still compares its own file.
        """
        with self._lock:
            expires, found = self._recent.get((folder, name), (0.0, None))
        return found if time.monotonic() < expires else None

    def forget_recent(self, folder: bytes) -> None:
        """A folder has changed: the next look-up of a set in it examines the files."""
        with self._lock:
            for key in [key for key in self._recent if key[0] == folder]:
                del self._recent[key]

    def _merge(
        self,
        name: str,
        located: list[tuple[str, bytes, SourceStat]],
        weight_map: tuple[bytes, SourceStat] | None,
    ) -> tuple[ViewSet | None, bool]:
        parsed: dict[str, ParsedFile] = {}
        try:
            for file, path, entry in located:
                parsed[file] = self.parsed(path, entry, file)
        except (EntryError, ShortReadError):
            return None, False  # being written: the next look-up tries again
        settled = all(one.settled for one in parsed.values())
        # A symlink's own name may differ from its target's (Hugging Face's blobs): the set speaks of the former.
        layouts = {file: one.record.layout(file) for file, one in parsed.items() if not one.record.fault}
        if not layouts:
            return None, settled
        try:
            merged = merge_shards(list(layouts.values()), self._weight_map(*weight_map) if weight_map else None)
        except FormatError as e:
            log.debug("no tensor views: %s", e)
            return None, settled
        except (EntryError, ShortReadError):
            return None, False
        places = {
            (file, extent.name): position
            for file, layout in layouts.items()
            for position, extent in enumerate(layout.tensors)
        }
        raw, npy = {}, {}
        for extent in merged.tensors:
            place = parsed[extent.file], places[extent.file, extent.name]
            if merged.byte_order == "little":
                raw[os.fsencode(encode_name(extent.name))] = place
            if npy_header(extent.dtype, extent.shape) is not None:
                npy[os.fsencode(encode_name(extent.name, ".npy"))] = place
        return ViewSet(name, raw, npy), settled

    def _weight_map_file(
        self, folder: bytes, name: str, files: tuple[str, ...], names: list[bytes]
    ) -> tuple[bytes, SourceStat] | None:
        """Path and stat of the file that says which shard holds which tensor, if the set has one."""
        file = os.fsencode(f"{name}.{format_of(files[0])}.index.json")
        path = self._source.follow(os.path.join(folder, file)) if file in names else None
        return (path, self._source.lstat(path)) if path is not None else None

    def _weight_map(self, path: bytes, entry: SourceStat) -> Mapping[str, str]:
        if entry.size > MAX_INDEX_BYTES:
            raise FormatError("index-length", f"has {entry.size} bytes, {MAX_INDEX_BYTES} at most", offset=0)
        fd, opened = self._source.open(path)
        try:
            if opened.identity != entry.identity:
                raise StaleError("changed while it was read", path=os.fsdecode(path))
            return parse_weight_map(read_exactly(fd)(0, entry.size))
        finally:
            os.close(fd)


def _trim(
    rows: OrderedDict[_K, _V], size: Callable[[_V], int], is_over: Callable[[_V], bool] = lambda _: False
) -> None:
    """Drop the oldest rows: those that are over, and those too many or, by the names they hold, too large together."""
    names = sum(size(row) for row in rows.values())
    while rows:
        key, oldest = next(iter(rows.items()))
        is_too_much = len(rows) > 1 and (len(rows) > _MAX_SETS or names > _MAX_TENSORS)
        if not is_too_much and not is_over(oldest):
            return
        names -= size(oldest)
        del rows[key]


def _holds(record: FileRecord, inode: int) -> bool:
    return bool(record.base) and record.base <= inode < record.base + 2 * len(record.tensors)
