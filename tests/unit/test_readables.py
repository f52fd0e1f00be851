"""Reads of files, tensors and live state: the right bytes, or a named error."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.support import OddSource, open_descriptors
from weightfs.errors import ShortReadError, StaleError
from weightfs.readables import Extent, LiveText, WholeFile

DATA = bytes(range(256)) * 40


@pytest.fixture
def source(tmp_path: Path) -> Iterator[OddSource]:
    (tmp_path / "file").write_bytes(DATA)
    opened = OddSource(str(tmp_path))
    yield opened
    opened.close()


def read(readable: WholeFile | Extent | LiveText, offset: int, length: int, handle: int = 1) -> bytes:
    buffer = bytearray(b"\xaa" * (length + 8))
    filled = readable.read_into(handle, memoryview(buffer)[:length], offset)
    assert buffer[length:] == b"\xaa" * 8, "wrote behind what it was given"
    assert 0 <= filled <= length
    return bytes(buffer[:filled])


def whole(source: OddSource) -> WholeFile:
    fd, entry = source.open(b"file")
    return WholeFile(source, b"file", fd, (entry.size, entry.mtime_ns))


def extent(source: OddSource, prefix: bytes, offset: int, nbytes: int) -> Extent:
    fd, entry = source.open(b"file")
    return Extent(source, fd, entry.identity, prefix, offset, nbytes)


RANGES = [(0, 0), (0, 1), (0, 10240), (0, 20000), (10239, 1), (10240, 5), (10241, 5), (1 << 40, 7), (4095, 4098)]


@pytest.mark.parametrize(("offset", "length"), RANGES)
def test_a_whole_file_is_its_bytes(source: OddSource, offset: int, length: int) -> None:
    file = whole(source)
    assert read(file, offset, length) == DATA[offset : offset + length]
    file.forget(1)
    file.close()


def test_a_whole_file_may_be_taken_from_the_cache_but_for_its_end(source: OddSource) -> None:
    file = whole(source)
    place = file.in_page_cache(100, 200)
    assert place is not None
    assert os.pread(place.fd, place.nbytes, place.offset) == DATA[100:300]
    assert file.in_page_cache(len(DATA) - 200, 200) is not None
    assert file.in_page_cache(len(DATA) - 199, 200) is None
    file.close()


def test_a_file_cut_while_it_is_open_is_stale_where_it_is_gone(source: OddSource, tmp_path: Path) -> None:
    file = whole(source)
    os.truncate(tmp_path / "file", 1000)
    assert read(file, 0, 1000) == DATA[:1000]
    for offset, length in ((0, 1001), (999, 2), (1000, 1), (5000, 100)):
        with pytest.raises(StaleError, match="was cut from 10240 to 1000 bytes"):
            read(file, offset, length)
    assert read(file, 10240, 10) == b"", "behind the end that it had"
    file.close()


def test_a_file_cut_and_opened_anew_ends_where_it_ends(source: OddSource, tmp_path: Path) -> None:
    file = whole(source)
    os.truncate(tmp_path / "file", 1000)
    now = source.lstat(b"file")
    file.renew((now.size, now.mtime_ns))
    assert read(file, 0, 4096) == DATA[:1000]
    assert read(file, 1000, 1) == b""
    assert file.in_page_cache(0, 1001) is None
    assert file.has_changed(), "since the first open, which may last"
    os.truncate(tmp_path / "file", 10)
    with pytest.raises(StaleError, match="was cut from 1000 to 10 bytes"):
        read(file, 0, 1000)
    file.close()


def test_a_file_that_grows_gives_what_is_there_now(source: OddSource, tmp_path: Path) -> None:
    file = whole(source)
    assert not file.has_changed()
    with open(tmp_path / "file", "ab") as writer:
        writer.write(b"more")
    assert read(file, 10230, 100) == DATA[10230:] + b"more"
    assert file.has_changed()
    file.close()


def test_a_file_written_in_place_shows_it(source: OddSource, tmp_path: Path) -> None:
    file = whole(source)
    with open(tmp_path / "file", "r+b") as writer:
        writer.write(b"new!")
    os.utime(tmp_path / "file", ns=(1, 1))
    assert read(file, 0, 6) == b"new!" + DATA[4:6]
    assert file.has_changed()
    file.close()


def short(monkeypatch: pytest.MonkeyPatch, most: int, until: int) -> None:
    """A source whose reads give at most so much, and nothing behind `until`."""
    preadv = os.preadv

    def cut(fd: int, buffers: list[memoryview], offset: int) -> int:
        return preadv(fd, [buffers[0][: max(0, min(most, until - offset))]], offset)

    monkeypatch.setattr(os, "preadv", cut)


def test_reads_in_pieces_are_put_together(source: OddSource, monkeypatch: pytest.MonkeyPatch) -> None:
    file, view = whole(source), extent(source, b"head", 100, 5000)
    short(monkeypatch, 7, 1 << 30)
    assert read(file, 3, 5000) == DATA[3:5003]
    assert read(view, 2, 5000) == b"ad" + DATA[100 : 100 + 4998]
    file.close()
    view.close()


def test_a_short_read_is_an_error_never_zeros(source: OddSource, monkeypatch: pytest.MonkeyPatch) -> None:
    file, view = whole(source), extent(source, b"head", 100, 5000)
    short(monkeypatch, 4096, 2000)
    assert read(file, 0, 2000) == DATA[:2000]
    with pytest.raises(ShortReadError, match="gave 1000 of 1001 bytes at 1000"):
        read(file, 1000, 1001)
    assert read(view, 0, 1904) == b"head" + DATA[100:2000]
    with pytest.raises(ShortReadError, match="bytes of a tensor"):
        read(view, 0, 1905)
    file.close()
    view.close()


def test_a_file_cut_and_grown_again_meanwhile_is_stale(
    source: OddSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who rewrites a file in place cuts it first: the reader that came in between was not failed by the source."""
    file = whole(source)
    os.utime(tmp_path / "file", (1, 1))
    short(monkeypatch, 4096, 2000)
    with pytest.raises(StaleError, match="has grown again"):
        read(file, 1000, 1001)
    file.close()


def test_a_failing_source_says_so(source: OddSource, monkeypatch: pytest.MonkeyPatch) -> None:
    file, view = whole(source), extent(source, b"", 0, 100)

    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    for readable in (file, view):
        with pytest.raises(OSError, match="Input/output"):
            read(readable, 0, 10)
        readable.close()


@pytest.mark.parametrize("prefix", [b"", b"x", b"\x93NUMPY" + b" " * 122])
@pytest.mark.parametrize("nbytes", [0, 1, 5000])
def test_a_tensor_is_its_prefix_and_its_range(source: OddSource, prefix: bytes, nbytes: int) -> None:
    view = extent(source, prefix, 77, nbytes)
    expected = prefix + DATA[77 : 77 + nbytes]
    edges = {0, 1, 5, len(prefix), len(prefix) + 1, len(expected) - 1, len(expected), len(expected) + 1, 1 << 50}
    for offset, length in itertools.product(sorted(edge for edge in edges if edge >= 0), (0, 1, 127, 129, 8192)):
        assert read(view, offset, length) == expected[offset : offset + length], (offset, length)
    assert view.in_page_cache(0, 10) is None
    view.forget(1)
    view.close()


def rewrite(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(DATA[::-1])


@pytest.mark.parametrize(
    "change", [rewrite, lambda path: os.truncate(path, 100), lambda path: os.utime(path, ns=(1, 1))]
)
def test_a_changed_file_makes_its_tensors_stale(source: OddSource, tmp_path: Path, change: object) -> None:
    view = extent(source, b"head", 100, 5000)
    assert read(view, 0, 10)
    assert callable(change)
    change(tmp_path / "file")
    for offset, length in ((0, 10), (4, 5000), (100, 1)):
        with pytest.raises(StaleError):
            read(view, offset, length)
    view.close()


def test_a_file_changed_while_it_is_read_gives_nothing(
    source: OddSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view, preadv = extent(source, b"", 0, 5000), os.preadv

    def overtaken(fd: int, buffers: list[memoryview], offset: int) -> int:
        got = preadv(fd, buffers, offset)
        rewrite(tmp_path / "file")
        return got

    monkeypatch.setattr(os, "preadv", overtaken)
    with pytest.raises(StaleError):
        read(view, 0, 5000)
    view.close()


def test_descriptors_are_given_back(source: OddSource) -> None:
    before = open_descriptors()
    file, view = whole(source), extent(source, b"", 0, 10)
    assert len(open_descriptors()) == len(before) + 2
    file.close()
    view.close()
    assert open_descriptors() == before


# Live state


def test_a_reader_of_live_text_sees_one_state() -> None:
    states = iter([b"first state", b"second", b"third"])
    text = LiveText(lambda: next(states))
    assert read(text, 0, 5, handle=1) == b"first"
    assert read(text, 0, 100, handle=2) == b"second"
    assert read(text, 5, 100, handle=1) == b" state"
    assert read(text, 11, 100, handle=1) == read(text, 1000, 5, handle=1) == b""
    text.forget(1)
    text.forget(1)
    assert read(text, 0, 100, handle=1) == b"third"
    assert text.in_page_cache(0, 1) is None
    text.close()


def test_reads_of_one_handle_at_once_see_one_state() -> None:
    barrier = threading.Barrier(2)
    states = iter([b"aaaa", b"bbbb"])
    lock = threading.Lock()

    def make() -> bytes:
        try:
            barrier.wait(0.2)
        except threading.BrokenBarrierError:
            pass  # nobody else makes one: right
        with lock:
            return next(states)

    text, seen = LiveText(make), []
    threads = [threading.Thread(target=lambda: seen.append(read(text, 0, 4))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(seen)) == 1, seen
