"""Where the chunks of a folder are, as it was looked up at one moment."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import threading
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Final

from checkpoint import guarded
from checkpoint.chunks import pack
from checkpoint.chunks.folder import Folder, Pack
from checkpoint.errors import CheckpointError, CorruptError, RetryError

_NUMBER_BITS: Final = 20
_NUMBER: Final = (1 << _NUMBER_BITS) - 1
MOST_LOOKS: Final = 32
"""At a folder whose packs come and go all the while; each look takes about as long as one who changes it must take."""
_GAP_BYTES: Final = 256 << 10
"""Chunks this near to each other are read ahead at once."""


_BESIDE_BYTES: Final = 64 << 10
"""Records this near to each other are read at once."""
_MOST_READ_BYTES: Final = 4 << 20


class GoneError(Exception):
    """A chunk is not where it was when the folder was looked up, or was nowhere."""


class Catalogue:
    """Packs and the chunks in them. Any thread may read; files are closed when the last one that reads is done.

    Args:
        folder: looked up now.
        digest_key: the store's.

    Attributes:
        packs: those that can be used.
        faults: why others can't, by name.
        places: where each chunk is: the ordinal of its pack and, in the low 20 bits, the number of its record.

    Raises:
        RetryError: packs came or went at each of many looks.
    """

    def __init__(self, folder: Folder, digest_key: bytes) -> None:
        self.digest_key = digest_key
        self.packs: list[Pack] = []
        self.faults: dict[str, CheckpointError] = {}
        self.places: dict[bytes, int] = {}
        self._opened: dict[int, OpenPack] = {}
        self._lock = threading.Lock()
        if not any(self._look_up(folder) for _ in range(MOST_LOOKS)):
            raise RetryError("its packs change faster than they can be listed", path=folder.path, mend="try again")

    def _look_up(self, folder: Folder) -> bool:
        """Fill it in; gives False where packs came or went meanwhile: a listing may have missed old and new."""
        self.packs, self.faults, self.places = [], {}, {}
        names = folder.packs()
        for name in names:
            try:
                found = folder.load(name, self.digest_key)
            except CheckpointError as e:
                self.faults[name] = e
                continue
            base = len(self.packs) << _NUMBER_BITS
            self.packs.append(found)
            for number, head in enumerate(found.table):
                if head.method != pack.LOST:
                    self.places[head.id] = base + number
        return folder.packs() == names

    def get(self, id_: bytes) -> bytes:
        """A whole chunk.

        Raises:
            GoneError: it is not there.
            CorruptError: it is damaged.
            CheckpointError: it can't be read.
        """
        found = self.places.get(id_)
        if found is None:
            raise GoneError
        return self._open(found >> _NUMBER_BITS).get(found & _NUMBER)

    def get_all(self, ids: Sequence[bytes]) -> list[Any]:
        """Whole chunks, in that order, each with the buffer protocol; errors are those of `get`."""
        places = [self.places.get(id_, -1) for id_ in ids]
        if -1 in places:
            raise GoneError
        found: list[Any] = []
        for ordinal, group in itertools.groupby(places, lambda place: place >> _NUMBER_BITS):
            found += self._open(ordinal).get_all([place & _NUMBER for place in group])
        return found

    def prefetch(self, ids: Collection[bytes]) -> int:
        """Have the kernel read chunks ahead; gives how many bytes. Those it does not find are left out."""
        wanted: dict[int, list[int]] = {}
        for id_ in set(ids):
            if (found := self.places.get(id_)) is not None:
                wanted.setdefault(found >> _NUMBER_BITS, []).append(found & _NUMBER)
        total = 0
        for ordinal, numbers in wanted.items():
            with contextlib.suppress(GoneError):
                total += self._open(ordinal).prefetch(sorted(numbers))
        return total

    def _open(self, ordinal: int) -> OpenPack:
        opened = self._opened.get(ordinal)
        if opened is None:
            with self._lock:
                opened = self._opened.get(ordinal)
                if opened is None:
                    opened = self._opened[ordinal] = OpenPack(self.packs[ordinal])
        return opened


class OpenPack:
    """A pack that is open for as long as somebody uses it.

    Args:
        found: the pack.

    Raises:
        GoneError: it is gone.
        CheckpointError: it can't be opened.
    """

    def __init__(self, found: Pack) -> None:
        self._fd = -1
        self._pack = found
        self._sealer = found.envelope.sealer("chunks")
        try:
            with guarded.opened(found.path, guarded.FILE, found.path) as fd:
                self._fd = os.dup(fd)
        except CheckpointError as e:
            if not os.path.lexists(found.path):
                raise GoneError from e
            raise

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def payload(self, number: int) -> bytes:
        """The chunk of a record, as it is compressed.

        Raises:
            GoneError: the pack is gone.
            CorruptError: it is damaged.
            CheckpointError: it can't be read.
        """
        head = self._pack.table[number]
        sealed = self._read(self._pack.table.offsets[number] + pack.HEAD_BYTES, head.sealed_nbytes)
        return pack.open_chunk(self._sealer, number, head, sealed, self._pack.path)

    def get(self, number: int) -> bytes:
        """The chunk of a record; errors are those of `payload`."""
        return pack.expand(self._pack.table[number], self.payload(number), self._pack.path)

    def get_all(self, numbers: Sequence[int]) -> list[Any]:
        """Chunks of records, in that order, near ones read at once; errors are those of `payload`."""
        table, path = self._pack.table, self._pack.path
        payloads: dict[int, bytes] = {}
        wanted = set(numbers)
        for first, last in _near(sorted(wanted), table.offsets):
            start = table.offsets[first]
            sealed = memoryview(self._read(start, table.offsets[last + 1] - start))
            for number in range(first, last + 1):
                if number in wanted:
                    at = table.offsets[number] + pack.HEAD_BYTES - start
                    head = table[number]
                    payloads[number] = pack.open_chunk(
                        self._sealer, number, head, sealed[at : at + head.sealed_nbytes], path
                    )
        return pack.expand_all([table[number] for number in numbers], [payloads[number] for number in numbers], path)

    def _read(self, offset: int, nbytes: int) -> bytes:
        path = self._pack.path
        try:
            content = os.pread(self._fd, nbytes, offset)
        except OSError as e:
            if e.errno == errno.ESTALE:  # NFS: another host removed it
                raise GoneError from e
            raise guarded.unreadable(path, e) from e
        if len(content) != nbytes:
            raise CorruptError("ends within a chunk", path=path, mend="make the snapshot anew")
        return content

    def prefetch(self, numbers: list[int]) -> int:
        """Read records ahead, near ones at once."""
        offsets, total, start, end = self._pack.table.offsets, 0, 0, 0
        for number in [*numbers, -1]:
            if number < 0 or offsets[number] > end + _GAP_BYTES:
                if end > start:
                    os.posix_fadvise(self._fd, start, end - start, os.POSIX_FADV_WILLNEED)
                    total += end - start
                start = offsets[number]
            end = offsets[number + 1]
        return total


def _near(numbers: Sequence[int], offsets: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The first and the last of those, ascending, that are read at once."""
    first = last = numbers[0]
    for number in numbers[1:]:
        is_near = offsets[number] - offsets[last + 1] <= _BESIDE_BYTES
        if not is_near or offsets[number + 1] - offsets[first] > _MOST_READ_BYTES:
            yield first, last
            first = number
        last = number
    yield first, last
