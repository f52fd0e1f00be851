"""Which memory lies where in CRIU's images: its pstree, mm and pagemap images, as far as lazy pages need them.

An image is two magic numbers, then messages of protocol buffers (proto2), each after its length (32 bits). The fields
are those of `pstree.proto`, `mm.proto`, `vma.proto` and `pagemap.proto` of CRIU 4. Nothing read here is believed:
whatever is not as CRIU writes it is a CorruptError.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from checkpoint.errors import CorruptError
from checkpoint.page_plan import Plan, Run
from checkpoint.userfaultfd import PAGE_BYTES

_COMMON: Final = 0x54564319
_PSTREE: Final = 0x50273030
_MM: Final = 0x57492820
_PAGEMAP: Final = 0x56084025
_OWN: Final = re.compile(r"pagemap-\d+\.img", re.ASCII)
_IN_PARENT: Final = 1
_LAZY: Final = 2
_PRESENT: Final = 4
_GROWS_DOWN: Final = 0x100
_HIGHEST: Final = 1 << 64
_MOST_BYTES: Final = 1 << 30
"""Of one of these images; a pagemap takes about 10 bytes a run of pages."""
_ANEW: Final = "weightfs snapshot verify tells what is damaged; make the snapshot anew"

Fields = dict[int, list[int | bytes]]
"""The values of a message by field number, in their order: numbers, and bytes of what has a length."""


class Mapping(msgspec.Struct, frozen=True, kw_only=True):
    """A mapping of a process.

    Attributes:
        start, end: addresses, half-open.
        is_early: it is the heap or a stack, which a process needs before all else.
    """

    start: int
    end: int
    is_early: bool


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """The memory of a process that `criu restore --lazy-pages` leaves to a page server.

    Attributes:
        pid, parent: in the process's own pid namespace; 0 is the parent of the root.
        pages: path of the image that holds it.
        runs: in ascending order, none overlapping, each inside one mapping; `offset` is in `pages`.
        early: those addresses (start, end) of mappings that are needed first.
    """

    pid: int
    parent: int
    pages: str
    runs: tuple[Run, ...]
    early: tuple[tuple[int, int], ...]


def memory_of(images: str) -> list[Memory]:
    """What a page server must fill in of every process in a folder of images.

    Raises:
        CorruptError: an image is missing, or not as CRIU writes it.
    """
    found = []
    for pid, parent in _pids(images):
        if os.path.exists(os.path.join(images, f"pagemap-{pid}.img")):  # one that had ended has none
            found.append(_memory(images, pid, parent))
    if not found:
        raise CorruptError("holds no process with memory", path=images, mend=_ANEW)
    return found


def private_pages(images: str) -> set[str]:
    """Names of the images that hold processes' own memory, which a page server may read instead of CRIU.

    Raises:
        CorruptError: an image is not as CRIU writes it.
    """
    found = set()
    for name in os.listdir(images):
        if _OWN.fullmatch(name):
            path = os.path.join(images, name)
            found.add(_pages_name(next(_messages(path, _PAGEMAP), {}), path))
    return found


def shared_bytes(memories: Sequence[Memory]) -> int:
    """How much a process and its parent have at the same addresses: what a fork may have left shared between them.

    A program that was started has its memory elsewhere (address space layout randomization).
    """
    plans = {memory.pid: Plan(memory.runs) for memory in memories}
    found = 0
    for memory in memories:
        if (parents := plans.get(memory.parent)) is not None:
            for run in memory.runs:
                start = run.start
                while start < run.end and (part := parents.first(start, run.end)) is not None:
                    found += part.end - part.start
                    start = part.end
    return found


def _pids(images: str) -> Iterator[tuple[int, int]]:
    path = os.path.join(images, "pstree.img")
    for fields in _messages(path, _PSTREE):
        pid = _number(fields, 1, path)
        if not 0 < pid < 1 << 31:
            raise _damaged(path, f"has the pid {pid}")
        yield pid, _number(fields, 2, path)


def _memory(images: str, pid: int, parent: int) -> Memory:
    mappings = _mappings(os.path.join(images, f"mm-{pid}.img"))
    path = os.path.join(images, f"pagemap-{pid}.img")
    messages = _messages(path, _PAGEMAP)
    head = next(messages, None)
    if head is None:
        raise _damaged(path, "is empty")
    pages = os.path.join(images, _pages_name(head, path))
    runs, nbytes = _runs(messages, path)
    try:
        found = os.stat(pages).st_size
    except OSError as e:
        raise CorruptError(f"can't be used: {e.strerror}", path=pages, mend=_ANEW) from e
    if found != nbytes:
        raise _damaged(pages, f"has {found} bytes, and {os.path.basename(path)} tells of {nbytes}")
    cut = tuple(_cut(runs, mappings, path))
    early = tuple((one.start, one.end) for one in mappings if one.is_early)
    return Memory(pid=pid, parent=parent, pages=pages, runs=cut, early=early)


def _pages_name(head: Fields, path: str) -> str:
    return f"pages-{_number(head, 1, path)}.img"


def _runs(messages: Iterator[Fields], path: str) -> tuple[list[Run], int]:
    """The lazy runs, ascending, and how many bytes of pages there are, lazy or not."""
    runs: list[Run] = []
    offset = reached = 0
    for fields in messages:
        start = _number(fields, 1, path)
        count = _number(fields, 5, path, default=_number(fields, 2, path))
        flags = _number(fields, 4, path, default=_PRESENT)
        end = start + count * PAGE_BYTES
        if start % PAGE_BYTES or not count or not reached <= start < end <= _HIGHEST:
            raise _damaged(path, f"has {count} pages at {start:#x}, after others up to {reached:#x}")
        reached = end
        if flags & _IN_PARENT or _number(fields, 3, path, default=0):
            raise _damaged(path, "refers to the images of an earlier dump, which a snapshot has none of")
        if flags & _PRESENT:
            if flags & _LAZY:
                if runs and runs[-1].end == start and runs[-1].offset + start - runs[-1].start == offset:
                    start_of, _, at = runs.pop()  # CRIU tells of a MiB at a time, wherever it ends
                    runs.append(Run(start_of, end, at))
                else:
                    runs.append(Run(start, end, offset))
            offset += end - start
        elif flags & _LAZY:
            raise _damaged(path, f"has lazy pages at {start:#x} that are nowhere")
    return runs, offset


def _cut(runs: list[Run], mappings: list[Mapping], path: str) -> Iterator[Run]:
    """Runs cut where one mapping ends and the next begins: a copy must stay inside of one."""
    following = iter(mappings)
    mapping = next(following, None)
    for run in runs:
        start = run.start
        while start < run.end:
            while mapping is not None and mapping.end <= start:
                mapping = next(following, None)
            if mapping is None or mapping.start > start:
                raise _damaged(path, f"has pages at {start:#x}, where nothing is mapped")
            end = min(run.end, mapping.end)
            yield Run(start, end, run.offset + start - run.start)
            start = end


def _mappings(path: str) -> list[Mapping]:
    fields = next(_messages(path, _MM), None)
    if fields is None:
        raise _damaged(path, "is empty")
    heap = _number(fields, 6, path), _number(fields, 7, path)
    stack = _number(fields, 5, path)
    found = []
    reached = 0
    for raw in fields.get(14, []):
        if not isinstance(raw, bytes):
            raise _damaged(path, "has a number where a mapping should be")
        mapping = _message(raw, path)
        start, end = _number(mapping, 1, path), _number(mapping, 2, path)
        if start % PAGE_BYTES or end % PAGE_BYTES or not reached <= start < end <= _HIGHEST:
            raise _damaged(path, f"has a mapping from {start:#x} to {end:#x}, after others up to {reached:#x}")
        reached = end
        is_heap = start < heap[1] and heap[0] < end
        is_stack = bool(_number(mapping, 6, path) & _GROWS_DOWN) or start <= stack < end
        found.append(Mapping(start=start, end=end, is_early=is_heap or is_stack))
    return found


def _messages(path: str, magic: int) -> Iterator[Fields]:
    try:
        with open(path, "rb") as file:
            raw = file.read(_MOST_BYTES + 1)
    except OSError as e:
        raise CorruptError(f"can't be used: {e.strerror}", path=path, mend=_ANEW) from e
    if len(raw) > _MOST_BYTES:
        raise _damaged(path, f"is larger than {_MOST_BYTES} bytes")
    return decode(raw, magic, path)


def decode(raw: bytes, magic: int, path: str) -> Iterator[Fields]:
    """The messages of an image.

    Args:
        raw: the whole image.
        magic: its second number.
        path: named in errors.

    Raises:
        CorruptError: it is none.
    """
    if len(raw) < 8 or struct.unpack_from("<II", raw) != (_COMMON, magic):
        raise _damaged(path, "is no such image: its magic numbers are others")
    at = 8
    while at < len(raw):
        if at + 4 > len(raw):
            raise _damaged(path, "ends inside of a length")
        (length,) = struct.unpack_from("<I", raw, at)
        at += 4
        if at + length > len(raw):
            raise _damaged(path, "ends inside of a message")
        yield _message(raw[at : at + length], path)
        at += length


def _message(raw: bytes, path: str) -> Fields:
    fields: Fields = {}
    at, ends = 0, len(raw)
    while at < ends:
        key = raw[at]
        at += 1
        if key > 127:
            key, at = _varint(raw, at - 1, path)
        value: int | bytes
        kind = key & 7
        if kind == 0:
            if at < ends and raw[at] < 128:  # a process may have thousands of runs, whose numbers are mostly small
                value = raw[at]
                at += 1
            else:
                value, at = _varint(raw, at, path)
        elif kind in (1, 2, 5):
            length = 8 if kind == 1 else 4
            if kind == 2:
                length, at = _varint(raw, at, path)
            value = raw[at : at + length]
            at += length
            if at > ends:
                raise _damaged(path, "has a field that ends behind its message")
        else:
            raise _damaged(path, f"has a field of the unknown kind {kind}")
        fields.setdefault(key >> 3, []).append(value)
    return fields


def _varint(raw: bytes, at: int, path: str) -> tuple[int, int]:
    """A number of 64 bits at most, and where it ends."""
    value = shift = 0
    for byte in raw[at : at + 10]:
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            if value >= _HIGHEST:
                break
            return value, at
        shift += 7
    raise _damaged(path, "has a number that does not end, or is too large")


def _number(fields: Fields, field: int, path: str, *, default: int | None = None) -> int:
    """The last value of a field, as protocol buffers have it."""
    values = fields.get(field)
    if not values:
        if default is None:
            raise _damaged(path, f"lacks the field {field}")
        return default
    value = values[-1]
    if not isinstance(value, int):
        raise _damaged(path, f"has bytes where the field {field} should be a number")
    return value


def _damaged(path: str, what: str) -> CorruptError:
    return CorruptError(what, path=path, mend=_ANEW)
