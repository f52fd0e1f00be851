"""The process that looks through a source for `indexing.py`: lists every folder, parses every header it is asked for.

A process of its own, since parsing a million tensors takes the interpreter for 10 s: threads of the daemon would make
each request wait for it. It runs at the lowest priority, is the first to be ended when memory runs out, writes nothing
but to its pipe, and ends when the daemon does. Headers are read by several threads, so that a slow disk has several to
fetch; whoever reads the pipe sets the pace.

Messages are MessagePack behind a length of four bytes. It says, in this order:

    Listed      a folder; answered by Wanted: which of its weight files have no record
    Found       records of those
    Read        everything was listed and read
    NextPage    answered by Page: rows of the index, each with the token of what must be there for it to stay
    Dead        rows whose token was not seen, twice: first in the crawl, then in another one, since a file may have
                been moved from where the first came later to where it had been already; answered by Next
    Done        that was all; or why it was not
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Final, TypeVar

import msgspec

from weightfs.errors import EntryError, ShortReadError, WeightfsError
from weightfs.formats import format_of, group_shards
from weightfs.headers import SETTLED_NS, is_settled, read_record, slot_of
from weightfs.index.upkeep import GONE, FoundFile, Row, set_token
from weightfs.source.base import Source, SourceStat
from weightfs.source.local import LocalSource

_READERS: Final = 4
_MOST_HEADER_BYTES: Final = 16 << 20
"""Larger headers are left to whoever asks for them: four at a time would take gigabytes."""
_ASKED: Final = 256  # files asked about in one transaction of the daemon
_BATCH_BYTES: Final = 256 << 10
_BATCH_FILES: Final = 16
_YOUNG_ROUNDS: Final = 5
"""How often files that are still being written are visited again; then the next crawl has them."""
_DEAD: Final = 100  # rows dropped in one transaction of the daemon, under 1 ms
_LENGTH_BYTES: Final = 4
_T = TypeVar("_T")


class Start(msgspec.Struct, tag=True, array_like=True):
    """The first message, to the crawl: whether to say which rows are dead."""

    prune: bool


class Listed(msgspec.Struct, tag=True, array_like=True):
    """A folder (or none, but files again): how many weight files it has, and what those settled would be kept as."""

    folders: int
    files: int
    slots: list[bytes]


class Wanted(msgspec.Struct, tag=True, array_like=True):
    """Positions in `Listed.slots`."""

    which: list[int]


class Found(msgspec.Struct, tag=True, array_like=True):
    """Parsed headers."""

    files: list[FoundFile]


class Read(msgspec.Struct, tag=True, array_like=True):
    """Everything was listed, and every header read: `failed` folders or files could not be, `young` ones change."""

    failed: int
    young: int


class NextPage(msgspec.Struct, tag=True, array_like=True):
    """The rows behind one, which are wanted."""

    after: bytes


class Page(msgspec.Struct, tag=True, array_like=True):
    """Rows, and the last of them; empty when there are no more."""

    rows: list[Row]
    after: bytes


class Dead(msgspec.Struct, tag=True, array_like=True):
    """Rows to drop."""

    rows: list[bytes]


class Next(msgspec.Struct, tag=True, array_like=True):
    """Go on."""


class Done(msgspec.Struct, tag=True, array_like=True):
    """The last message: why it gave up, or None."""

    failure: str | None


FromCrawl = Listed | Found | Read | NextPage | Dead | Done
ToCrawl = Start | Wanted | Page | Next


class Wire:
    """Messages over a pair of pipes. For one thread."""

    def __init__(self, reader: IO[bytes], writer: IO[bytes], accepts: object) -> None:
        """`accepts`: the union of the messages the other side sends."""
        self._reader = reader
        self._writer = writer
        self._decode = msgspec.msgpack.Decoder(accepts).decode
        self._encode = msgspec.msgpack.Encoder().encode

    def send(self, message: msgspec.Struct) -> None:
        """Hand a message over.

        Raises:
            OSError: the other side is gone.
        """
        text = self._encode(message)
        self._writer.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        self._writer.flush()

    def receive(self) -> object:
        """The other side's next message.

        Raises:
            EOFError: it is gone.
        """
        return self._decode(self._exactly(int.from_bytes(self._exactly(_LENGTH_BYTES), "little")))

    def _exactly(self, length: int) -> bytes:
        text = self._reader.read(length)
        if len(text) < length:
            raise EOFError
        return text

    def ask(self, message: msgspec.Struct, kind: type[_T]) -> _T:
        """Send a message and give its answer."""
        self.send(message)
        answer = self.receive()
        assert isinstance(answer, kind)
        return answer


class _Weights(msgspec.Struct, frozen=True):
    """One weight file as it was listed."""

    path: bytes
    name: str
    entry: SourceStat


class Crawl:
    """One look through a source."""

    def __init__(self, source: Source, wire: Wire) -> None:
        self._source = source
        self._wire = wire
        self._seen: set[bytes] = set()
        self._young: list[_Weights] = []
        self._failed = 0
        self._is_complete = True
        self._pool = ThreadPoolExecutor(_READERS)
        self._reading: deque[Future[FoundFile | None]] = deque()
        self._batch: list[FoundFile] = []

    def run(self, *, prune: bool) -> None:
        """Do all of it.

        Raises:
            OSError, EOFError: the daemon is gone.
        """
        for weights in self._folders():
            self._want(weights)
        self._collect(0)
        for _ in range(_YOUNG_ROUNDS):
            if not self._young:
                break
            self._visit_again()
        self._wire.send(Read(self._failed, len(self._young)))
        if prune and self._is_complete:
            self._prune()

    # Listing

    def _folders(self) -> Iterator[list[_Weights]]:
        """Each folder's weight files; whatever was seen is noted."""
        self._seen.add(self._source.lstat(b"").inode_key)
        waiting = [(b"", self._source.lstat(b"").inode_key)]
        while waiting:
            folder, key = waiting.pop()
            try:
                rows = self._source.entries(folder)
            except FileNotFoundError:
                continue
            except OSError:
                self._fail(listing=True)
                continue
            weights, names = [], []
            for name, entry in rows:
                self._seen.add(entry.inode_key)
                path = os.path.join(folder, name)
                text = os.fsdecode(name)
                if entry.is_directory:
                    waiting.append((path, entry.inode_key))
                elif format_of(text) is not None:
                    names.append(text)
                    with contextlib.suppress(OSError):
                        weights += self._located(path, text, entry)
            self._seen.update(set_token(key, name) for name in group_shards(names))
            self._note(weights)
            yield weights

    def _located(self, path: bytes, name: str, entry: SourceStat) -> list[_Weights]:
        if entry.is_symlink:
            target = self._source.follow(path)
            if target is None:
                return []
            path, entry = target, self._source.lstat(target)
        return [_Weights(path, name, entry)] if entry.is_file else []

    def _note(self, weights: list[_Weights]) -> None:
        self._seen.update(slot_of(one.entry.identity, one.name) for one in weights)

    def _fail(self, *, listing: bool) -> None:
        self._failed += 1
        if listing:
            self._is_complete = False  # what lies in there was not seen and may well exist

    # Reading

    def _want(self, weights: list[_Weights], *, anew: bool = True) -> None:
        now_ns = time.time_ns()
        old = [one for one in weights if is_settled(one.entry, now_ns)]
        self._young += [one for one in weights if not is_settled(one.entry, now_ns)]
        counts = (1, len(weights)) if anew else (0, 0)
        for start in range(0, max(len(old), 1), _ASKED):
            some = old[start : start + _ASKED]
            listed = Listed(*counts, [slot_of(one.entry.identity, one.name) for one in some])
            counts = 0, 0
            for at in self._wire.ask(listed, Wanted).which:
                self._reading.append(self._pool.submit(self._read, some[at]))
                self._collect(2 * _READERS)

    def _read(self, one: _Weights) -> FoundFile | None:
        try:
            record = read_record(self._source, one.path, one.entry, one.name, most_bytes=_MOST_HEADER_BYTES)
        except (EntryError, ShortReadError, FileNotFoundError):
            return None  # being replaced
        except OSError:
            self._fail(listing=False)
            return None
        if record is None:
            return None
        encoded = msgspec.msgpack.encode(record)
        return FoundFile(one.entry.identity, one.path, one.name, 2 * len(record.tensors), encoded)

    def _collect(self, most: int) -> None:
        """Wait until no more than `most` headers are being read, and hand over what there is; 0 leaves nothing."""
        while len(self._reading) > most:
            if (found := self._reading.popleft().result()) is not None:
                self._batch.append(found)
            large = sum(len(one.record) for one in self._batch) >= _BATCH_BYTES
            if large or len(self._batch) >= _BATCH_FILES:
                self._hand_over()
        if not most:
            self._hand_over()

    def _hand_over(self) -> None:
        if self._batch:
            self._wire.send(Found(self._batch))
            self._batch = []

    def _visit_again(self) -> None:
        """Look at files that were too young once they are old enough."""
        youngest_ns = max(max(one.entry.ctime_ns, one.entry.mtime_ns) for one in self._young)
        time.sleep(min(max(youngest_ns + SETTLED_NS - time.time_ns(), 0) + 1_000_000, 2 * SETTLED_NS) / 1e9)
        again, self._young = self._young, []
        weights: list[_Weights] = []
        for one in again:
            with contextlib.suppress(OSError):
                weights.append(_Weights(one.path, one.name, self._source.lstat(one.path)))
        self._note(weights)
        self._want(weights, anew=False)
        self._collect(0)

    # Dropping

    def _prune(self) -> None:
        dead: dict[bytes, list[bytes]] = {}
        after = GONE
        while True:
            page = self._wire.ask(NextPage(after), Page)
            for row, token in page.rows:
                if token not in self._seen:
                    dead.setdefault(token, []).append(row)
            after = page.after
            if not after:
                break
        if not dead:
            return
        self._seen.clear()
        for _ in self._folders():
            pass
        if not self._is_complete:
            return
        rows = [row for token, rows in dead.items() if token not in self._seen for row in rows]
        for at in range(0, len(rows), _DEAD):
            self._wire.ask(Dead(rows[at : at + _DEAD]), Next)


def _step_back() -> None:
    """Lowest priority on the processor and on the disk, which follows it, and the first to go when memory is short."""
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    os.nice(19)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")


def main() -> None:
    """Crawl the folder that was inherited as the descriptor named first on the command line; its path is second."""
    _step_back()
    wire = Wire(sys.stdin.buffer, sys.stdout.buffer, ToCrawl)
    start = wire.receive()
    assert isinstance(start, Start)
    failure = None
    try:
        Crawl(LocalSource(sys.argv[2], descriptor=int(sys.argv[1])), wire).run(prune=start.prune)
    except (OSError, WeightfsError) as e:
        failure = str(e)
    wire.send(Done(failure))


if __name__ == "__main__":
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        main()
