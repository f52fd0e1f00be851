"""The ledger: what one daemon wrote, another finds, at whatever instruction the first was killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightfs import ledger
from weightfs.errors import UnfitError
from weightfs.ledger import Ledger, OpenRow

HANDLES = st.tuples(st.integers(1, 5), st.integers(1, 9))


@pytest.fixture
def book() -> Iterator[int]:
    fd = ledger.create()
    yield fd
    os.close(fd)


def test_what_is_no_ledger_is_refused(book: int) -> None:
    os.ftruncate(book, 4096)
    with pytest.raises(UnfitError, match="another form"):
        Ledger(book)


@pytest.mark.parametrize("at", [0, 8])
def test_another_version_is_refused(book: int, at: int) -> None:
    os.pwrite(book, (99).to_bytes(8, "little"), at)
    with pytest.raises(UnfitError, match="version"):
        Ledger(book)


def test_a_successor_finds_init(book: int) -> None:
    first = Ledger(book)
    assert (first.init_request, first.init_reply, first.is_answered) == (b"", b"", False)
    first.init_request = b"request" * 10
    first.init_reply = b"reply"
    assert not Ledger(book).is_answered
    first.init_answered()
    second = Ledger(book)
    assert (second.init_request, second.init_reply, second.is_answered) == (b"request" * 10, b"reply", True)


def test_an_init_that_does_not_fit_is_refused(book: int) -> None:
    with pytest.raises(ValueError, match="INIT of 5000 bytes"):
        Ledger(book).init_request = bytes(5000)


def test_deaths_are_counted_and_orderly_ends_are_not(book: int) -> None:
    first = Ledger(book)
    assert not first.begin()
    second = Ledger(book)
    assert second.begin(), "the first never said that it ended"
    second.end()
    third = Ledger(book)
    assert not third.begin()
    assert third.deaths == 1


def test_a_request_has_seen_the_deaths_since_it_first_came(book: int) -> None:
    first = Ledger(book)
    first.begin()
    second = Ledger(book)
    second.begin()
    assert second.deaths_seen(70) == 1
    assert second.deaths_seen(70) == 1, "asking does not count"
    second.end()
    third = Ledger(book)
    third.begin()
    assert third.deaths_seen(70) == 1, "an orderly end is no death"
    assert third.deaths_seen(80) == 0
    fourth = Ledger(book)
    fourth.begin()
    assert fourth.deaths_seen(70) == 2
    assert fourth.deaths_seen(80) == 1
    fourth.resent_answered(70)
    fourth.resent_answered(12345)
    assert Ledger(book).deaths_seen(70) == 0, "its number may be another request's by now"


def test_more_requests_than_there_is_room_for_are_tried_again(book: int) -> None:
    first = Ledger(book)
    first.begin()
    second = Ledger(book)
    second.begin()
    assert {second.deaths_seen(unique) for unique in range(1, 2000)} == {1}
    third = Ledger(book)
    third.begin()
    assert third.deaths_seen(1) == 2
    assert third.deaths_seen(1999) == 1


def test_the_heartbeat_is_read_without_mapping(book: int) -> None:
    mapped = Ledger(book)
    before = ledger.heartbeat(book)
    mapped.beat()
    assert ledger.heartbeat(book) == before + 1


def test_an_open_inode_is_noted_once(book: int) -> None:
    first = Ledger(book)
    assert first.put_inode(OpenRow(7, 3, 100, -5))
    assert first.put_inode(OpenRow(7, 4, 0, 0))
    assert Ledger(book).inodes() == [OpenRow(7, 3, 100, -5)]
    assert Ledger(book).last_backing_id == 3
    first.discard_inode(7)
    first.discard_inode(7)
    assert Ledger(book).inodes() == []
    assert Ledger(book).last_backing_id == 3, "an id that was lost lies above the largest ever noted"


def test_the_tables_can_be_full(book: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_ROWS", 3)
    first = Ledger(book)
    assert [first.add_handle(1, handle) for handle in range(1, 6)] == [True, True, True, False, False]
    assert [first.put_inode(OpenRow(inode, 0, 0, 0)) for inode in range(1, 5)] == [True, True, True, False]
    first.discard_handle(1, 2)
    first.discard_inode(2)
    assert first.add_handle(1, 4)
    assert first.put_inode(OpenRow(4, 0, 0, 0))
    assert Ledger(book).handles() == {1: {1, 3, 4}}


def test_numbers_and_journal(book: int) -> None:
    first = Ledger(book)
    assert first.numbers() == (0, 0, 0)
    first.note_numbers(9, 100, 200)
    first.note_numbers(9, 101, 200)
    assert first.append(b"keys", b"k" * 16, b"v")
    assert first.append(b"files", b"", b"x" * 10_000)
    second = Ledger(book)
    assert second.numbers() == (9, 101, 200)
    assert list(second.records()) == [(b"keys", b"k" * 16, b"v"), (b"files", b"", b"x" * 10_000)]
    second.clear()
    assert list(Ledger(book).records()) == []


def test_the_journal_can_be_full(book: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_JOURNAL_BYTES", 100)
    first = Ledger(book)
    assert first.append(b"keys", b"k", b"v" * 50)
    assert not first.append(b"keys", b"k", b"v" * 50)
    assert len(list(first.records())) == 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["add", "discard", "die"]), HANDLES), max_size=60))
def test_handles_are_those_added_and_not_discarded(steps: list[tuple[str, tuple[int, int]]]) -> None:
    fd = ledger.create()
    try:
        mapped, expected = Ledger(fd), set[tuple[int, int]]()
        for step, (inode, handle) in steps:
            if step == "add":
                assert mapped.add_handle(inode, handle)
                expected.add((inode, handle))
            elif step == "discard":
                mapped.discard_handle(inode, handle)
                expected.discard((inode, handle))
            else:
                mapped = Ledger(fd)
            found = {(inode, handle) for inode, handles in mapped.handles().items() for handle in handles}
            assert found == expected
    finally:
        os.close(fd)


WRITER = """
import random, sys
from weightfs.ledger import Ledger, OpenRow
book, chosen = Ledger(int(sys.argv[1])), random.Random(int(sys.argv[2]))
print("ready", flush=True)
while True:
    inode = chosen.randrange(1, 1 << 62)
    book.add_handle(inode, inode ^ 0x5555)
    book.put_inode(OpenRow(inode, inode % 1000, inode * 3 % (1 << 63), -(inode % 99)))
    book.append(b"keys", inode.to_bytes(8, "big"), inode.to_bytes(8, "little"))
    if chosen.random() < 0.5:
        book.discard_handle(inode, inode ^ 0x5555)
        book.discard_inode(inode)
    if chosen.random() < 0.001:
        book.clear()
"""


@pytest.mark.parametrize("seed", range(5))
def test_killed_at_any_instruction_no_row_is_half_there(book: int, seed: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(book), str(seed)], pass_fds=[book], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        try:
            writer.wait(random.Random(seed).uniform(0.05, 0.3))
        except subprocess.TimeoutExpired:
            writer.send_signal(signal.SIGKILL)
        assert writer.wait(10) == -signal.SIGKILL
    found = Ledger(book)
    handles, inodes = found.handles(), found.inodes()
    assert handles
    assert all(held == {inode ^ 0x5555} for inode, held in handles.items())
    for inode, backing, size, mtime in inodes:
        assert (backing, size, mtime) == (inode % 1000, inode * 3 % (1 << 63), -(inode % 99))
    assert len(handles.keys() ^ {row.inode for row in inodes}) <= 1, "the one it was killed at"
    for room, key, value in found.records():
        assert room == b"keys"
        assert key == value[::-1]


def test_a_standby_sees_what_was_written_while_it_waited(book: int) -> None:
    """It maps the ledger long before it begins."""
    first = Ledger(book)
    first.begin()
    first.put_inode(OpenRow(5, 1, 10, 20))
    first.add_handle(5, 100)
    standby = Ledger(book)
    first.discard_handle(5, 100)
    first.discard_inode(5)
    first.put_inode(OpenRow(6, 2, 10, 20))
    first.add_handle(6, 101)
    assert standby.begin()
    assert standby.handles() == {6: {101}}
    assert [row.inode for row in standby.inodes()] == [6]
    standby.discard_handle(6, 101)
    assert Ledger(book).handles() == {}
