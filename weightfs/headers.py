"""From a weight file of a source to the record of its header. Blocking; knows nothing of who asks."""

from __future__ import annotations

import logging
import os

from weightfs.errors import FormatError, StaleError
from weightfs.formats import ReadAt, format_of, parse_header
from weightfs.index.schema import FileRecord
from weightfs.model import read_exactly
from weightfs.source.base import Source, SourceStat

log = logging.getLogger(__name__)

SETTLED_NS = 2_000_000_000
"""A file changed less than this ago may change again without its times showing it: remembered in memory only."""


def is_settled(entry: SourceStat, now_ns: int) -> bool:
    """Whether the identity of a file can be relied on to change with its content."""
    return now_ns - max(entry.ctime_ns, entry.mtime_ns) > SETTLED_NS


def slot_of(identity: bytes, name: str) -> bytes:
    """Where what a header says is kept: one content may lie under names of either format."""
    return identity + (format_of(name) or "").encode()


def read_record(
    source: Source, path: bytes, entry: SourceStat, name: str, *, most_bytes: int | None = None
) -> FileRecord | None:
    """What the header of the weight file at `path`, which was `entry` a moment ago, says; without numbers (`base` 0).

    A header with a fault gives a record that holds the fault. None for one of more than `most_bytes` bytes.

    Raises:
        ShortReadError, StaleError: the file changed while it was read.
        OSError: the source failed.
    """
    fd, opened = source.open(path)
    try:
        if opened.identity != entry.identity:
            raise StaleError("changed while its header was read", path=os.fsdecode(path))
        try:
            layout = parse_header(name, opened.size, _up_to(read_exactly(fd), most_bytes))
        except FormatError as e:
            e.path = os.fsdecode(path)
            log.debug("no tensor views: %s", e)
            return FileRecord(0, format_of(name) or "", [], {}, False, (e.reason, e.message, e.offset))
        except _TooLargeError:
            return None
        if source.fstat(fd).identity != entry.identity:
            raise StaleError("changed while its header was read", path=os.fsdecode(path))
    finally:
        os.close(fd)
    return FileRecord.of(0, layout)


class _TooLargeError(Exception):
    pass


def _up_to(read: ReadAt, most_bytes: int | None) -> ReadAt:
    if most_bytes is None:
        return read
    left = most_bytes

    def counted(offset: int, length: int) -> bytes:
        nonlocal left
        left -= length
        if left < 0:
            raise _TooLargeError
        return read(offset, length)

    return counted
