from __future__ import annotations

import threading

import pytest

from weightfs.handles import HandleTable, OpenInode, Place


class Text:
    """A readable that tells what becomes of it."""

    def __init__(self, said: list[str] | None = None) -> None:
        self.said = said if said is not None else []

    def in_page_cache(self, offset: int, nbytes: int) -> Place | None:
        return None

    def read_into(self, handle: int, buffer: memoryview, offset: int) -> int:
        return 0

    fd: int | None = None
    promise = (0, 0)

    def forget(self, handle: int) -> None:
        self.said.append(f"forget {handle}")

    def close(self) -> None:
        self.said.append("close")


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def table(said: list[str]) -> HandleTable:
    def closing(entry: OpenInode) -> None:
        said.append(f"closing {entry.backing_id}")

    return HandleTable(closing)


def test_adding_a_handle_twice_changes_nothing(table: HandleTable, said: list[str]) -> None:
    table.add(5, 1)
    entry = table.get(5)
    table.add(5, 1)
    assert table.get(5) is entry
    assert entry is not None
    assert entry.handles == {1}
    assert (len(table), list(table)) == (1, [5])
    table.discard(5, 1)
    assert table.get(5) is None
    assert said == ["closing None"]


def test_discarding_what_is_not_there_changes_nothing(table: HandleTable, said: list[str]) -> None:
    table.discard(5, 1)
    table.add(5, 1)
    table.attach(5, lambda: (Text(said), None))
    table.discard(5, 2)
    table.discard(6, 1)
    assert table.get(5) is not None
    assert "close" not in said


def test_an_inode_ends_with_its_last_handle_the_backing_first(table: HandleTable, said: list[str]) -> None:
    table.add(5, 1)
    table.add(5, 2)
    assert table.attach(5, lambda: (Text(said), 9))
    entry = table.get(5)
    assert entry is not None
    assert entry.backing_fd == 9
    entry.backing_id = 77
    table.discard(5, 1)
    assert said == ["forget 1"]
    table.discard(5, 2)
    assert said == ["forget 1", "forget 2", "closing 77", "close"]
    table.discard(5, 2)
    assert said[-1] == "close"
    assert said.count("close") == 1


def test_what_serves_an_inode_is_made_once(table: HandleTable) -> None:
    made = []

    def make() -> tuple[Text, int | None]:
        made.append(Text())
        return made[-1], None

    table.add(5, 1)
    assert table.attach(5, make)
    table.add(5, 2)
    assert table.attach(5, make)
    assert len(made) == 1
    entry = table.get(5)
    assert entry is not None
    assert entry.readable is made[0]


def test_nothing_is_made_for_an_inode_that_was_given_up(table: HandleTable) -> None:
    table.add(5, 1)
    table.discard(5, 1)

    def make() -> tuple[Text, int | None]:
        raise AssertionError("nobody would close it")

    assert not table.attach(5, make)
    assert len(table) == 0


def test_what_can_not_be_made_may_be_tried_again(table: HandleTable) -> None:
    def fail() -> tuple[Text, int | None]:
        raise OSError(5, "no")

    table.add(5, 1)
    with pytest.raises(OSError, match="no"):
        table.attach(5, fail)
    assert table.attach(5, lambda: (Text(), None))


def test_close_ends_everything_once(table: HandleTable, said: list[str]) -> None:
    for inode in (5, 6):
        table.add(inode, inode)
        table.attach(inode, lambda: (Text(said), None))
    table.add(7, 7)  # its OPEN was never answered
    table.close()
    assert sorted(said) == ["close", "close", "closing None", "closing None", "closing None"]
    assert len(table) == 0
    table.close()
    table.discard(5, 5)
    assert len(said) == 5


def test_a_table_of_its_own_needs_nobody_to_tell() -> None:
    table = HandleTable()
    table.add(5, 1)
    table.discard(5, 1)
    assert len(table) == 0


def test_threads_make_once_and_close_once() -> None:
    counts = {"made": 0, "closed": 0}
    lock = threading.Lock()

    class Counted(Text):
        def __init__(self) -> None:
            super().__init__()
            with lock:
                counts["made"] += 1

        def close(self) -> None:
            with lock:
                counts["closed"] += 1

    table = HandleTable()
    barrier = threading.Barrier(4)
    failures: list[str] = []

    def work(number: int) -> None:
        for turn in range(300):
            handle = turn * 4 + number
            barrier.wait()
            table.add(5, handle)
            if not table.attach(5, lambda: (Counted(), None)):
                failures.append("given up while it had a handle")
            entry = table.get(5)
            if entry is None or entry.readable is None:
                failures.append("open, and nothing serves it")
            table.discard(5, handle)

    threads = [threading.Thread(target=work, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(table) == 0
    assert counts["made"] == counts["closed"] >= 300
