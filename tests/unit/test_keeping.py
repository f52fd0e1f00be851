"""What a daemon has open, told before the kernel hears of it, and taken over by the next."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.unit.fake_kernel import Bytes
from tests.unit.support import open_descriptors
from weightfs import ledger
from weightfs.handles import HandleTable
from weightfs.keeping import SupervisedKeeper, adopt
from weightfs.ledger import Ledger, OpenRow
from weightfs.link import Link


@dataclass
class Rig:
    """A daemon's side, and the supervisor's."""

    book: int
    ours: Link
    theirs: Link
    path: str
    held: dict[int, int] = field(default_factory=dict)

    def keeper(self) -> SupervisedKeeper:
        return SupervisedKeeper(Ledger(self.book), self.theirs)

    def file(self) -> int:
        return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)

    def hear(self) -> None:
        """What the supervisor does with holdings."""
        while True:
            try:
                message = self.ours.receive()
            except BlockingIOError:
                return
            assert message is not None
            if message.hold is not None:
                if message.hold in self.held:
                    os.close(self.held[message.hold])
                self.held[message.hold] = message.fds[0]
            elif message.drop is not None and message.drop in self.held:
                os.close(self.held.pop(message.drop))


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    (tmp_path / "file").write_bytes(b"content")
    book = ledger.create()
    ours, theirs = Link.pair()
    made = Rig(book, ours, Link(theirs), str(tmp_path / "file"))
    yield made
    for fd in made.held.values():
        os.close(fd)
    made.ours.close()
    made.theirs.close()
    os.close(book)


def open_file(rig: Rig, table: HandleTable, inode: int, handle: int, backing_id: int | None = None) -> Bytes:
    """What OPEN does, up to the reply."""
    made = Bytes(b"", fd=rig.file(), promise=(7, 5))
    table.add(inode, handle)
    assert table.attach(inode, lambda: (made, made.fd))
    entry = table.get(inode)
    assert entry is not None
    entry.backing_id = backing_id
    assert table.settle(inode, entry)
    assert table.answer(inode, handle)
    return made


def test_the_supervisor_holds_what_is_open(rig: Rig) -> None:
    table = HandleTable(keeper=rig.keeper())
    first = open_file(rig, table, 5, 100, backing_id=3)
    open_file(rig, table, 5, 101)
    rig.hear()
    assert list(rig.held) == [5]
    assert os.path.samestat(os.fstat(rig.held[5]), os.stat(rig.path))
    successor = Ledger(rig.book)
    assert successor.handles() == {5: {100, 101}}
    assert successor.inodes() == [OpenRow(5, 3, 7, 5)]
    table.discard(5, 100)
    table.discard(5, 101)
    rig.hear()
    assert rig.held == {}
    assert (Ledger(rig.book).handles(), Ledger(rig.book).inodes()) == ({}, [])
    assert first.closed == 1


def test_a_successor_takes_over_what_is_open(rig: Rig) -> None:
    open_file(rig, HandleTable(keeper=rig.keeper()), 5, 100, backing_id=3)
    rig.hear()
    closed: list[int | None] = []
    keeper = rig.keeper()
    table = HandleTable(lambda entry: closed.append(entry.backing_id), keeper)
    assert adopt(table, Ledger(rig.book), keeper, {5: os.dup(rig.held[5])}) == []
    entry = table.get(5)
    assert entry is not None
    assert (entry.handles, entry.backing_id, entry.settled, entry.readable) == ({100}, 3, True, None)
    kept = entry.kept
    assert kept is not None
    assert kept[1] == (7, 5)
    made = Bytes(b"", fd=rig.file())
    assert table.attach(5, lambda: (made, made.fd))
    with pytest.raises(OSError, match="Bad file descriptor"):  # the new one has taken its place
        os.fstat(kept[0])
    table.discard(5, 100)
    assert closed == [3]
    rig.hear()
    assert rig.held == {}


def test_closing_an_adopted_inode_closes_its_descriptor(rig: Rig) -> None:
    before = open_descriptors()
    table = HandleTable()
    table.adopt(5, {100}, rig.file(), None, (0, 0))
    table.discard(5, 100)
    table.adopt(6, {100}, rig.file(), None, (0, 0))
    table.close()
    assert open_descriptors() == before


def test_what_nobody_has_open_any_more_is_given_back(rig: Rig) -> None:
    """Its daemon died after the last handle was taken from the ledger, and before the rest was."""
    open_file(rig, HandleTable(keeper=rig.keeper()), 5, 100, backing_id=3)
    Ledger(rig.book).discard_handle(5, 100)
    rig.hear()
    keeper, before = rig.keeper(), open_descriptors()
    table = HandleTable(keeper=keeper)
    assert adopt(table, Ledger(rig.book), keeper, {5: os.dup(rig.held[5])}) == [3]
    assert open_descriptors() == before
    assert len(table) == 0
    rig.hear()
    assert rig.held == {}
    assert Ledger(rig.book).inodes() == []


def test_what_was_opened_and_never_answered_is_given_back(rig: Rig) -> None:
    """The OPEN comes again and opens it anew."""
    keeper = rig.keeper()
    fd = rig.file()
    keeper.hold(9, fd)
    os.close(fd)
    rig.hear()
    before = open_descriptors()
    assert adopt(HandleTable(keeper=keeper), Ledger(rig.book), keeper, {9: os.dup(rig.held[9])}) == []
    assert open_descriptors() == before
    rig.hear()
    assert rig.held == {}


def test_no_room_to_note_it(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_ROWS", 1)
    keeper = rig.keeper()
    table = HandleTable(keeper=keeper)
    open_file(rig, table, 5, 100)
    table.add(6, 101)
    made = Bytes(b"", fd=rig.file())
    assert table.attach(6, lambda: (made, made.fd))
    entry = table.get(6)
    assert entry is not None
    assert not table.settle(6, entry)
    assert not entry.settled
    assert not table.answer(5, 102)
