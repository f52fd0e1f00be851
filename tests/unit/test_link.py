"""The link: whole messages, descriptors, and nothing that waits."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.support import open_descriptors
from weightfs.link import MOST_DESCRIPTORS, Link, Message


@pytest.fixture
def ends() -> Iterator[tuple[Link, Link]]:
    ours, theirs = Link.pair()
    other = Link(theirs)
    yield ours, other
    ours.close()
    other.close()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    os.write(fd, b"content")
    yield fd
    os.close(fd)


def next_of(link: Link) -> Message:
    assert select.select([link], [], [], 5)[0]
    message = link.receive()
    assert message is not None
    return message


def test_words_and_descriptors_arrive(ends: tuple[Link, Link], file: int) -> None:
    ours, theirs = ends
    ours.say({"held": [1, 2]}, [file, file])
    message = next_of(theirs)
    assert message.words == {"held": [1, 2]}
    assert (message.hold, message.drop) == (None, None)
    assert [os.pread(fd, 10, 0) for fd in message.fds] == [b"content", b"content"]
    assert not any(os.get_inheritable(fd) for fd in message.fds)
    for fd in message.fds:
        os.close(fd)


def test_as_many_descriptors_as_one_message_may_have(ends: tuple[Link, Link], file: int) -> None:
    ours, theirs = ends
    ours.say({}, [file] * MOST_DESCRIPTORS)
    fds = next_of(theirs).fds
    assert len(fds) == MOST_DESCRIPTORS
    for fd in fds:
        os.close(fd)


def test_holdings(ends: tuple[Link, Link], file: int) -> None:
    ours, theirs = ends
    ours.hold(1 << 63, file)
    ours.drop(7)
    held, dropped = next_of(theirs), next_of(theirs)
    assert (held.words, held.hold, held.drop, len(held.fds)) == (None, 1 << 63, None, 1)
    assert (dropped.words, dropped.hold, dropped.drop, dropped.fds) == (None, None, 7, [])
    os.close(held.fds[0])


def test_nothing_has_come(ends: tuple[Link, Link]) -> None:
    with pytest.raises(BlockingIOError):
        ends[0].receive()


def test_the_other_side_has_gone(ends: tuple[Link, Link], file: int) -> None:
    ours, theirs = ends
    theirs.close()
    assert ours.receive() is None
    ours.say({"to": "nobody"})
    ours.hold(1, file)
    assert ours.flush(), "nothing waits for a side that has gone"


def test_what_there_is_no_room_for_comes_later_in_order(ends: tuple[Link, Link], file: int) -> None:
    ours, theirs = ends
    before = open_descriptors()
    for inode in range(5000):
        ours.hold(inode, file)
    assert not ours.flush()
    assert len(open_descriptors()) > len(before), "what waits has descriptors of its own"
    seen = 0
    while seen < 5000:
        message = next_of(theirs)
        assert message.hold == seen
        assert os.pread(message.fds[0], 10, 0) == b"content"
        os.close(message.fds[0])
        seen += 1
        if seen % 100 == 0:
            ours.flush()
    assert ours.flush()
    assert open_descriptors() == before


def test_closing_gives_up_what_waits(file: int) -> None:
    before = open_descriptors()
    ours, theirs = Link.pair()
    for inode in range(5000):
        ours.hold(inode, file)
    ours.close()
    theirs.close()
    assert open_descriptors() == before
