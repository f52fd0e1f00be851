"""What outlives the daemon: shared memory that the supervisor keeps open and every daemon maps.

    words       who serves: version, deaths, heartbeat, the index's numbers
    INIT        the kernel's first request and the reply it was given: a successor must give the very same
    resent      requests that came again after a death, and how many deaths there had been before
    handles     (inode, handle) of every OPEN that was answered and not released
    inodes      (inode, backing id, size, mtime) of every inode that is open
    journal     what the index has not committed yet

A daemon may be killed between any two instructions. So each row begins with the word that makes it valid, which is
written last and taken away first, as one aligned store of 8 bytes; and the bytes are there for the successor because
they are memory of the kernel, not of the process. The supervisor reads the heartbeat and nothing else.
"""

from __future__ import annotations

import heapq
import mmap
import os
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from weightfs.errors import UnfitError

VERSION: Final = 1
"""Of the layout below. A daemon that knows another one can't take over from, or be followed by, one of this."""

_MAGIC: Final = int.from_bytes(b"weightfs", "little")
_PAGE: Final = 4096
_MAGIC_AT, _VERSION_AT, _DEATHS_AT, _CLEAN_AT, _HEARTBEAT_AT = range(5)
_EPOCH_AT, _NEXT_AT, _RESERVED_AT, _JOURNAL_AT, _ANSWERED_AT, _BACKING_AT = range(5, 11)
_HANDLES_HIGH_AT, _INODES_HIGH_AT = 11, 12
_TRIAL_AT: Final = 13
_INIT_REQUEST_AT: Final = _PAGE
_INIT_REPLY_AT: Final = 2 * _PAGE
_RESENT_AT: Final = 3 * _PAGE
_RESENT_PLACES: Final = range(_RESENT_AT // 8, _RESENT_AT // 8 + 2 * 1024, 2)
_HANDLES_AT: Final = 7 * _PAGE
_ROWS: Final = 1 << 20
_HANDLE_WORDS: Final = 2
_INODE_WORDS: Final = 4
_INODES_AT: Final = _HANDLES_AT + _ROWS * _HANDLE_WORDS * 8
_JOURNAL_BYTES_AT: Final = _INODES_AT + _ROWS * _INODE_WORDS * 8
_JOURNAL_BYTES: Final = 64 << 20
_TOTAL_BYTES: Final = _JOURNAL_BYTES_AT + _JOURNAL_BYTES
_LENGTHS: Final = struct.Struct("<III")
"""Of room, key and value of one record of the journal."""
_WORD_MASK: Final = (1 << 64) - 1


class OpenRow(NamedTuple):
    """An inode that is open.

    Attributes:
        inode: its number.
        backing_id: the kernel's number for its file; 0 where the kernel does not read it by itself.
        size, mtime_ns: what its file was when it was first opened; 0 for anything but whole files.
    """

    inode: int
    backing_id: int
    size: int
    mtime_ns: int


def create() -> int:
    """An empty ledger's descriptor; the caller owns it. Takes memory only for what is written (112 MiB at most)."""
    fd = os.memfd_create("weightfs-ledger", os.MFD_CLOEXEC)
    os.ftruncate(fd, _TOTAL_BYTES)
    os.pwrite(fd, struct.pack("<QQQQ", _MAGIC, VERSION, 0, 1), 0)
    return fd


class _Rows:
    """A table of rows of words; the first word of a row is not 0 while the row is valid."""

    def __init__(self, words: memoryview, at: int, width: int, high_at: int) -> None:
        self._words = words
        self._first = at // 8
        self._width = width
        self._high_at = high_at
        self._free: list[int] = []  # a heap: low rows first, so that few pages are touched
        for row in range(words[high_at]):
            if not words[self._first + row * width]:
                self._free.append(row)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        for row in range(self._words[self._high_at]):
            start = self._first + row * self._width
            if self._words[start]:
                yield row, *self._words[start : start + self._width]

    def put(self, *values: int) -> int | None:
        """Write a row; gives its number, None when the table is full."""
        if self._free:
            row = heapq.heappop(self._free)
        else:
            row = self._words[self._high_at]
            if row == _ROWS:
                return None
            self._words[self._high_at] = row + 1
        start = self._first + row * self._width
        for position in range(self._width - 1, -1, -1):  # what makes it valid comes last
            self._words[start + position] = values[position] & _WORD_MASK
        return row

    def take(self, row: int) -> None:
        """Make a row invalid."""
        self._words[self._first + row * self._width] = 0
        heapq.heappush(self._free, row)


class Ledger:
    """One mount's ledger, mapped. Runs on one thread, except the journal, which the index guards with its own lock.

    Attributes:
        culprit: the request in whose trial the daemon before this one died; 0 if in none.
    """

    def __init__(self, fd: int) -> None:
        """Map what `create` made; the descriptor stays the caller's.

        Raises:
            UnfitError: it is none, or of another version.
        """
        if os.fstat(fd).st_size != _TOTAL_BYTES:
            raise UnfitError("the running mount's shared memory has another form", mend="umount it, then mount again")
        self._bytes = mmap.mmap(fd, _TOTAL_BYTES)
        self._words = memoryview(self._bytes).cast("Q")
        if self._words[_MAGIC_AT] != _MAGIC or self._words[_VERSION_AT] != VERSION:
            raise UnfitError(
                f"the running mount's shared memory is of version {self._words[_VERSION_AT]}, this one knows {VERSION}",
                mend="umount it, then mount again",
            )
        self._after_death = 0
        self.culprit = 0
        self._look()

    def _look(self) -> None:
        """Find out which rows are valid."""
        self._handle_table = _Rows(self._words, _HANDLES_AT, _HANDLE_WORDS, _HANDLES_HIGH_AT)
        self._inode_table = _Rows(self._words, _INODES_AT, _INODE_WORDS, _INODES_HIGH_AT)
        self._handle_rows = {(inode, handle): row for row, inode, handle in self._handle_table}
        self._inode_rows = {inode: row for row, inode, *_ in self._inode_table}
        self._resent = {self._words[at]: at for at in _RESENT_PLACES if self._words[at]}

    # Who serves

    def begin(self) -> bool:
        """A daemon begins to serve; gives whether the one before it died instead of ending.

        A standby has mapped the ledger long before: what its predecessor has written since is seen from here on.
        """
        self._look()
        self._after_death = int(not self._words[_CLEAN_AT])
        self._words[_DEATHS_AT] += self._after_death
        self.culprit = self._words[_TRIAL_AT] if self._after_death else 0
        self._words[_TRIAL_AT] = 0
        self._words[_CLEAN_AT] = 0
        return bool(self._after_death)

    def end(self) -> None:
        """A daemon hands over in order."""
        self._words[_CLEAN_AT] = 1

    @property
    def deaths(self) -> int:
        """How many daemons of this mount have died."""
        return self._words[_DEATHS_AT]

    def beat(self) -> None:
        """Show the supervisor that the thread that serves goes round."""
        self._words[_HEARTBEAT_AT] += 1

    # INIT

    @property
    def init_request(self) -> bytes:
        """The kernel's first request; empty before it came."""
        return self._sized(_INIT_REQUEST_AT)

    @init_request.setter
    def init_request(self, message: bytes) -> None:
        self._set_sized(_INIT_REQUEST_AT, message)

    @property
    def init_reply(self) -> bytes:
        """What was answered to it; empty before."""
        return self._sized(_INIT_REPLY_AT)

    @init_reply.setter
    def init_reply(self, message: bytes) -> None:
        self._set_sized(_INIT_REPLY_AT, message)

    @property
    def is_answered(self) -> bool:
        """Whether the kernel has the reply to INIT for certain."""
        return bool(self._words[_ANSWERED_AT])

    def init_answered(self) -> None:
        """The kernel took it."""
        self._words[_ANSWERED_AT] = 1

    def _sized(self, at: int) -> bytes:
        length = self._words[at // 8]
        return self._bytes[at + 8 : at + 8 + length]

    def _set_sized(self, at: int, message: bytes) -> None:
        if len(message) > _PAGE - 8:
            raise ValueError(f"INIT of {len(message)} bytes")
        self._bytes[at + 8 : at + 8 + len(message)] = message
        self._words[at // 8] = len(message)

    # Requests that came again

    def deaths_seen(self, unique: int) -> int:
        """How many deaths a request that has come again has seen by now, this one being noted."""
        at = self._resent.get(unique)
        if at is not None:
            return self.deaths - self._words[at + 1]
        before = self.deaths - self._after_death
        for at in _RESENT_PLACES:
            if not self._words[at]:
                self._words[at + 1] = before
                self._words[at] = unique
                self._resent[unique] = at
                break
        return self._after_death  # also where the table is full: a request more that is tried again

    def on_trial(self, unique: int) -> None:
        """Such a request is being dealt with, and no other; 0 when that is over."""
        self._words[_TRIAL_AT] = unique

    def resent_answered(self, unique: int) -> None:
        """Such a request has its answer."""
        at = self._resent.pop(unique, None)
        if at is not None:
            self._words[at] = 0

    # Handles and inodes

    def add_handle(self, inode: int, handle: int) -> bool:
        """The kernel is about to get a handle; adding one twice changes nothing. False when there is no room."""
        if (inode, handle) in self._handle_rows:
            return True
        row = self._handle_table.put(inode, handle)
        if row is None:
            return False
        self._handle_rows[inode, handle] = row
        return True

    def discard_handle(self, inode: int, handle: int) -> None:
        """The kernel gave a handle back, or never got it."""
        row = self._handle_rows.pop((inode, handle), None)
        if row is not None:
            self._handle_table.take(row)

    def handles(self) -> dict[int, set[int]]:
        """Every handle the kernel has, by inode."""
        found: dict[int, set[int]] = {}
        for inode, handle in self._handle_rows:
            found.setdefault(inode, set()).add(handle)
        return found

    def put_inode(self, row: OpenRow) -> bool:
        """Note how an inode that is open is served, once. False when there is no room."""
        if row.inode in self._inode_rows:
            return True
        self._words[_BACKING_AT] = max(self._words[_BACKING_AT], row.backing_id)
        number = self._inode_table.put(*row)
        if number is None:
            return False
        self._inode_rows[row.inode] = number
        return True

    def discard_inode(self, inode: int) -> None:
        """An inode is open no more."""
        row = self._inode_rows.pop(inode, None)
        if row is not None:
            self._inode_table.take(row)

    def inodes(self) -> list[OpenRow]:
        """Every inode that is noted as open."""
        return [OpenRow(inode, backing, size, _signed(mtime)) for _, inode, backing, size, mtime in self._inode_table]

    @property
    def last_backing_id(self) -> int:
        """The largest backing id noted so far: one that was made and never noted lies just above."""
        return self._words[_BACKING_AT]

    # The index's numbers and journal

    def numbers(self) -> tuple[int, int, int]:
        """Epoch, next serial and end of the block reserved for this mount; zeros before the first."""
        return self._words[_EPOCH_AT], self._words[_NEXT_AT], self._words[_RESERVED_AT]

    def note_numbers(self, epoch: int, following: int, reserved: int) -> None:
        """Serials from `following` to `reserved` (exclusive) are still to be given out."""
        if epoch != self._words[_EPOCH_AT] or reserved != self._words[_RESERVED_AT]:
            self._words[_EPOCH_AT] = 0  # not valid while its parts change
            self._words[_RESERVED_AT] = reserved
        self._words[_NEXT_AT] = following
        self._words[_EPOCH_AT] = epoch

    def append(self, room: bytes, key: bytes, value: bytes) -> bool:
        """Note a record until it is committed; False when there is no room for it."""
        used = self._words[_JOURNAL_AT]
        parts = (_LENGTHS.pack(len(room), len(key), len(value)), room, key, value)
        length = sum(map(len, parts))
        if used + length > _JOURNAL_BYTES:
            return False
        at = _JOURNAL_BYTES_AT + used
        self._bytes[at : at + length] = b"".join(parts)
        self._words[_JOURNAL_AT] = used + length
        return True

    def records(self) -> Iterator[tuple[bytes, bytes, bytes]]:
        """Room, key and value of what was not committed, oldest first."""
        at, end = _JOURNAL_BYTES_AT, _JOURNAL_BYTES_AT + self._words[_JOURNAL_AT]
        while at < end:
            lengths = _LENGTHS.unpack_from(self._bytes, at)
            at += _LENGTHS.size
            parts = []
            for length in lengths:
                parts.append(self._bytes[at : at + length])
                at += length
            yield parts[0], parts[1], parts[2]

    def clear(self) -> None:
        """All of it is committed."""
        self._words[_JOURNAL_AT] = 0


def heartbeat(fd: int) -> int:
    """How often the daemon's serving thread has gone round, read without mapping anything."""
    return int.from_bytes(os.pread(fd, 8, 8 * _HEARTBEAT_AT), "little")


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
