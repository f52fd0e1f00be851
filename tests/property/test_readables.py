"""Any (offset, length) of a file or a tensor equals the reference bytes, however the source's reads are cut."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightfs import readables
from weightfs.readables import Extent, WholeFile
from weightfs.source.local import LocalSource

DATA = random.Random(1).randbytes(9000)
OFFSETS = st.integers(0, len(DATA) + 100) | st.integers(0, 1 << 62)
LENGTHS = st.integers(0, 10_000)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSource]:
    folder: Path = tmp_path_factory.mktemp("source")
    (folder / "file").write_bytes(DATA)
    opened = LocalSource(str(folder))
    yield opened
    opened.close()


def read(readable: WholeFile | Extent, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    return bytes(buffer[: readable.read_into(1, memoryview(buffer), offset)])


@settings(max_examples=200, deadline=None)
@given(offset=OFFSETS, length=LENGTHS, piece=st.integers(1, 9000))
def test_a_whole_file(source: LocalSource, offset: int, length: int, piece: int) -> None:
    fd, entry = source.open(b"file")
    file = WholeFile(source, b"file", fd, (entry.size, entry.mtime_ns))
    with pytest.MonkeyPatch.context() as patch:
        preadv = os.preadv
        patch.setattr(readables.os, "preadv", lambda fd, parts, at: preadv(fd, [parts[0][:piece]], at))  # type: ignore[attr-defined]
        found = read(file, offset, length)
    file.close()
    assert found == DATA[offset : offset + length]


@settings(max_examples=300, deadline=None)
@given(
    place=st.tuples(st.integers(0, len(DATA)), st.integers(0, len(DATA))).map(sorted),
    prefix=st.binary(max_size=200),
    offset=OFFSETS,
    length=LENGTHS,
)
def test_a_tensor(source: LocalSource, place: list[int], prefix: bytes, offset: int, length: int) -> None:
    begin, end = place
    fd, entry = source.open(b"file")
    view = Extent(source, fd, entry.identity, prefix, begin, end - begin)
    found = read(view, offset, length)
    view.close()
    assert found == (prefix + DATA[begin:end])[offset : offset + length]
