"""CRIU's images give the runs that were written to them; any other bytes give CorruptError, and nothing else."""

from __future__ import annotations

import itertools
import os
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.errors import CorruptError
from checkpoint.page_plan import Run
from checkpoint.pagemap import Memory, decode, memory_of, shared_bytes
from checkpoint.userfaultfd import PAGE_BYTES

COMMON, PSTREE, MM, PAGEMAP = 0x54564319, 0x50273030, 0x57492820, 0x56084025
PRESENT, LAZY, PARENT = 4, 2, 1
PID = 7


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def message(*fields: tuple[int, int | bytes]) -> bytes:
    """A message of protocol buffers."""
    out = b""
    for number, value in fields:
        if isinstance(value, bytes):
            out += varint(number << 3 | 2) + varint(len(value)) + value
        else:
            out += varint(number << 3) + varint(value)
    return out


def image(magic: int, *messages: bytes) -> bytes:
    return struct.pack("<II", COMMON, magic) + b"".join(struct.pack("<I", len(one)) + one for one in messages)


def vma(start: int, end: int, flags: int = 0x22) -> bytes:
    return message((1, start), (2, end), (3, 0), (4, 0), (5, 3), (6, flags), (7, 1), (8, 1))


def mm(vmas: Sequence[bytes], heap: tuple[int, int] = (0, 0), stack: int = 0) -> bytes:
    fields = [(number, 0) for number in (1, 2, 3, 4)]
    fields += [(5, stack), (6, heap[0]), (7, heap[1]), *((number, 0) for number in (8, 9, 10, 11, 12))]
    return image(MM, message(*fields, *((14, one) for one in vmas)))


def entry(start: int, pages: int, flags: int = PRESENT | LAZY) -> bytes:
    return message((1, start), (2, pages & 0xFFFFFFFF), (4, flags), (5, pages))


@contextmanager
def folder(**images: bytes) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as path:
        for name, content in images.items():
            (Path(path) / f"{name.replace('_', '-')}.img").write_bytes(content)
        yield path


def one_process(mapped: bytes, pagemap: Sequence[bytes], pages: int) -> dict[str, bytes]:
    return {
        "pstree": image(PSTREE, message((1, PID), (2, 0), (3, PID), (4, PID), (5, PID))),
        "mm_7": mapped,
        "pagemap_7": image(PAGEMAP, message((1, 1)), *pagemap),
        "pages_1": bytes(pages * PAGE_BYTES),
    }


layouts = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.tuples(st.booleans(), st.integers(1, 4)), min_size=1, max_size=4)),
    min_size=1,
    max_size=6,
)
"""Mappings: pages of nothing before it, then runs: whether they are lazy, and how many pages."""


@given(layout=layouts, joined=st.booleans())
def test_what_was_written_is_read(layout: list[tuple[int, list[tuple[bool, int]]]], joined: bool) -> None:
    at, offset = 0x10000, 0
    vmas, starts, want = [], [], []
    written: list[tuple[int, int, int]] = []
    for gap, runs in layout:
        start = at = at + gap * PAGE_BYTES
        for lazy, pages in runs:
            flags = PRESENT | LAZY if lazy else PRESENT
            if joined and written and written[-1][2] == flags and written[-1][1] == at:
                written[-1] = (written[-1][0], at + pages * PAGE_BYTES, flags)  # over the end of a mapping, perhaps
            else:
                written.append((at, at + pages * PAGE_BYTES, flags))
            if lazy:
                want.append((at, at + pages * PAGE_BYTES, offset))
            at += pages * PAGE_BYTES
            offset += pages * PAGE_BYTES
        vmas.append(vma(start, at))
        starts.append(start)
    entries = [entry(start, (end - start) // PAGE_BYTES, flags) for start, end, flags in written]
    with folder(**one_process(mm(vmas), entries, offset // PAGE_BYTES)) as path:
        (memory,) = memory_of(path)
    assert memory.pid == PID
    assert memory.pages == os.path.join(path, "pages-1.img")
    assert _pages(memory.runs) == _pages([Run(*one) for one in want])
    for run in memory.runs:
        assert not any(run.start < start < run.end for start in starts), "it reaches over two mappings"
    for run, after in itertools.pairwise(memory.runs):
        goes_on = run.end == after.start and run.offset + run.end - run.start == after.offset
        assert not goes_on or after.start in starts, "what is copied at once would be small"


def _pages(runs: Sequence[Run]) -> list[tuple[int, int]]:
    return [(a, run.offset + a - run.start) for run in runs for a in range(run.start, run.end, PAGE_BYTES)]


GOOD = one_process(mm([vma(0x10000, 0x20000)], heap=(0x10000, 0x11000)), [entry(0x10000, 2), entry(0x14000, 1)], 3)


def test_the_heap_and_stacks_come_first() -> None:
    mapped = mm(
        [vma(0x10000, 0x20000), vma(0x20000, 0x30000), vma(0x30000, 0x40000), vma(0x50000, 0x60000, 0x122)],
        heap=(0x10000, 0x11000),
        stack=0x30008,
    )
    with folder(**one_process(mapped, [entry(0x10000, 1)], 1)) as path:
        (memory,) = memory_of(path)
    assert memory.early == ((0x10000, 0x20000), (0x30000, 0x40000), (0x50000, 0x60000))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("pstree", None, "can't be used"),
        ("pstree", image(PSTREE), "holds no process"),
        ("pstree", image(MM), "magic"),
        ("pstree", image(PSTREE, message((1, 0))), "pid 0"),
        ("pstree", image(PSTREE, message((2, 0))), "lacks the field 1"),
        ("pstree", image(PSTREE, message((1, b"seven"))), "should be a number"),
        ("mm_7", None, "can't be used"),
        ("mm_7", image(MM), "is empty"),
        ("mm_7", mm([vma(0x20000, 0x10000)]), "has a mapping"),
        ("mm_7", mm([vma(0x10000, 0x20000), vma(0x18000, 0x28000)]), "has a mapping"),
        ("mm_7", mm([vma(0x11000, 0x20000)]), "nothing is mapped"),
        ("mm_7", mm([vma(0x10000, 0x11000)]), "nothing is mapped"),
        ("pagemap_7", image(PAGEMAP), "is empty"),
        ("pagemap_7", image(PAGEMAP, message((1, 1)), entry(0x10001, 3)), "3 pages at 0x10001"),
        ("pagemap_7", image(PAGEMAP, message((1, 1)), entry(0x10000, 0)), "0 pages"),
        ("pagemap_7", image(PAGEMAP, message((1, 1)), entry(0x12000, 1), entry(0x10000, 2)), "after others"),
        ("pagemap_7", image(PAGEMAP, message((1, 1)), entry(0x10000, 1 << 52)), "pages at"),
        ("pagemap_7", image(PAGEMAP, message((1, 1)), entry(0x10000, 3, PRESENT | PARENT)), "earlier dump"),
        ("pagemap_7", image(PAGEMAP, message((1, 1)), entry(0x10000, 3, LAZY)), "nowhere"),
        ("pagemap_7", image(PAGEMAP, message((1, 2)), entry(0x10000, 3)), "can't be used"),
        ("pages_1", bytes(2 * PAGE_BYTES), "has 8192 bytes"),
    ],
)
def test_what_is_refused(name: str, content: bytes | None, said: str) -> None:
    images = {key: value for key, value in (GOOD | {name: content}).items() if value is not None}
    with folder(**images) as path, pytest.raises(CorruptError, match=said) as refused:
        memory_of(path)
    assert refused.value.path is not None
    assert refused.value.path.startswith(path)


def test_what_a_fork_left_shared() -> None:
    runs = (Run(0x1000, 0x5000, 0), Run(0x9000, 0xA000, 0x4000))
    parent = Memory(pid=7, parent=0, pages="", runs=runs, early=())
    child = Memory(pid=8, parent=7, pages="", runs=(Run(0x2000, 0xC000, 0),), early=())
    other = Memory(pid=9, parent=8, pages="", runs=(Run(0x100000, 0x200000, 0),), early=())
    assert shared_bytes([parent, child, other]) == 0x3000 + 0x1000
    assert shared_bytes([child, other]) == 0
    within = Memory(pid=8, parent=7, pages="", runs=(Run(0x2000, 0x3000, 0), Run(0x9000, 0xA000, 0)), early=())
    assert shared_bytes([parent, within]) == 0x1000 + 0x1000


@given(raw=st.binary(max_size=200), magic=st.sampled_from([PSTREE, MM, PAGEMAP]))
def test_any_bytes(raw: bytes, magic: int) -> None:
    for content in (raw, struct.pack("<II", COMMON, magic) + raw):
        try:
            list(decode(content, magic, "image"))
        except CorruptError:
            continue


@given(name=st.sampled_from(sorted(GOOD)), data=st.data())
def test_any_damage(name: str, data: st.DataObject) -> None:
    content = bytearray(GOOD[name])
    kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
    at = data.draw(st.integers(0, len(content) - 1))
    if kind == "flip":
        content[at] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del content[at:]
    else:
        content[at:at] = data.draw(st.binary(min_size=1, max_size=12))
    with folder(**(GOOD | {name: bytes(content)})) as path:
        try:
            memories = memory_of(path)
        except CorruptError:
            return
        for memory in memories:
            size = os.path.getsize(memory.pages)
            assert all(run.start < run.end and run.offset + run.end - run.start <= size for run in memory.runs)
