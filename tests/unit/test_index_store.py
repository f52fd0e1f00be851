"""Records and numbers of a healthy index. Damage is the business of test_index_damage.py."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterable

import pytest

from weightfs.formats.layout import Role
from weightfs.index import numbers
from weightfs.index.schema import EntryRecord, FileRecord, Kind
from weightfs.index.store import IndexStore

ENTRY = EntryRecord(Kind.SOURCE, 1, b"model.safetensors", b"k" * 16)


def record(base: int, tensors: int = 1) -> FileRecord:
    rows: list[tuple[str, str, tuple[int, ...], int, int, int | None, Role]] = [
        (f"t{n}", "F32", (2,), 100 + 8 * n, 8, None, Role.OTHER) for n in range(tensors)
    ]
    return FileRecord(base, "safetensors", rows, {"format": "pt"}, False, None)


# Numbers


def test_numbers_carry_the_epoch_and_grow(index: IndexStore) -> None:
    taken = [index.take() for _ in range(1000)]
    assert {number >> 32 for number in taken} == {index.epoch}
    assert taken == list(range(taken[0], taken[0] + 1000))
    assert taken[0] > 1, "0 is no inode, 1 the root"


@pytest.mark.parametrize("counts", [(3, 1, 70_000, 1), (numbers._BLOCK, 2), (numbers._BLOCK - 1, 2, 1)])
def test_a_run_is_contiguous_and_nobody_elses(index: IndexStore, counts: tuple[int, ...]) -> None:
    runs = [range(first := index.take(count), first + count) for count in counts]
    numbers = [number for run in runs for number in run]
    assert len(set(numbers)) == len(numbers)


def test_numbers_are_not_repeated_after_a_reopen(state: str) -> None:
    taken: list[int] = []
    for _ in range(4):
        index = IndexStore(state, "source")
        taken += [index.take() for _ in range(100)]
        index.close()
    assert len(set(taken)) == len(taken)
    assert len({number >> 32 for number in taken}) == 1


TAKER = """
import sys
from weightfs.index.store import IndexStore
index = IndexStore(sys.argv[1], "source")
while True:
    first = index.take(30_000)
    print(first, first + 29_999, flush=True)
"""


def test_numbers_are_not_repeated_after_sigkill(state: str) -> None:
    runs: list[tuple[int, int]] = []
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", TAKER, state], stdout=subprocess.PIPE, text=True) as taker:
            assert taker.stdout is not None
            for _ in range(7):
                first, last = taker.stdout.readline().split()
                runs.append((int(first), int(last)))
            taker.send_signal(signal.SIGKILL)
            # What it had printed by then counts too.
            runs += [(int(line.split()[0]), int(line.split()[1])) for line in taker.stdout if line.endswith("\n")]
    assert_disjoint(runs)
    assert len({first >> 32 for first, _ in runs}) == 1, "the index was set aside"


def assert_disjoint(runs: Iterable[tuple[int, int]]) -> None:
    last_before = 0
    for first, last in sorted(runs):
        assert first > last_before
        last_before = last


def test_threads_never_get_the_same_number(index: IndexStore) -> None:
    runs: list[tuple[int, int]] = []

    def take() -> None:
        for count in (1, 20_000, 7) * 20:
            first = index.take(count)
            runs.append((first, first + count - 1))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_disjoint(runs)


# Records


def test_what_is_put_is_there_at_once_after_a_flush_and_after_a_reopen(state: str) -> None:
    index = IndexStore(state, "source")
    for step in ("overlay", "flushed", "reopened"):
        if step == "overlay":
            number, base = index.take(), index.take(2)
            index.put_number(b"k" * 16, number)
            index.put_entry(number, ENTRY)
            index.put_file(b"i" * 16, record(base))
            index.put_owner(base, b"i" * 16, b"a/m.safetensors", "m.safetensors")
        elif step == "flushed":
            index.flush()
            assert not index._overlay
            assert not index._pending_bases
        else:
            epoch = index.epoch
            index.close()
            index = IndexStore(state, "source")
            assert index.epoch == epoch
            assert index.set_aside is None
        assert index.number_of(b"k" * 16) == number, step
        assert index.entry(number) == ENTRY, step
        assert index.file(b"i" * 16) == record(base), step
        assert index.owner_of_view(base + 1) == (b"i" * 16, b"a/m.safetensors", "m.safetensors"), step
        assert index.number_of(b"other") is None
        assert index.entry(number + 1) is None
        assert index.file(b"j" * 16) is None
    index.close()


def test_a_later_put_wins_also_while_the_earlier_is_being_written(index: IndexStore) -> None:
    for turn in range(200):
        renamed = EntryRecord(Kind.SOURCE, 1, b"%d" % turn, b"k")
        index.put_entry(9, renamed)
        if turn % 7 == 0:
            index.flush()
        assert index.entry(9) == renamed
    index.flush()
    assert index.entry(9) == renamed


def test_the_writer_commits_without_being_asked(state: str) -> None:
    index = IndexStore(state, "source")
    index.put_entry(5, ENTRY)
    # Its thread ends with the store; what it had to write is there whether or not the flush in close found it done.
    index._closing = True
    index._wake.set()
    index._writer.join()
    assert not index._overlay
    index.close()


@pytest.mark.parametrize("flushed", [0, 1, 2, 3], ids=["pending", "one-on-disk", "two-on-disk", "on-disk"])
def test_owner_of_view_is_the_largest_base_not_above(index: IndexStore, flushed: int) -> None:
    bases = [1000, 2000, 3000]
    for number, base in enumerate(bases):
        index.put_owner(base, bytes([number]) * 16, b"path%d" % number, f"name{number}")
        if number + 1 == flushed:
            index.flush()

    def owner(inode: int) -> int | None:
        found = index.owner_of_view(inode)
        if found is None:
            return None
        identity, path, name = found
        assert (path, name) == (b"path%d" % identity[0], f"name{identity[0]}")
        return identity[0]

    expected = {0: None, 999: None, 1000: 0, 1001: 0, 1999: 0, 2000: 1, 2999: 1, 3000: 2, (1 << 63) - 1: 2}
    assert {inode: owner(inode) for inode in expected} == expected


def test_owner_of_view_sees_pending_below_and_above_what_is_on_disk(index: IndexStore) -> None:
    index.put_owner(2000, b"d" * 16, b"disk", "disk")
    index.flush()
    index.put_owner(1000, b"b" * 16, b"below", "below")
    index.put_owner(3000, b"a" * 16, b"above", "above")
    index.put_owner(2000, b"d" * 16, b"moved", "moved")
    owners = {inode: index.owner_of_view(inode) for inode in (500, 1500, 2500, 3500)}
    assert [owner and owner[2] for owner in owners.values()] == [None, "below", "moved", "above"]


def test_owner_of_view_of_an_empty_index(index: IndexStore) -> None:
    assert index.owner_of_view(1 << 40) is None


def test_folder_and_file_are_private(state: str, index: IndexStore) -> None:
    assert stat.S_IMODE(os.stat(state).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(index._files.path).st_mode) == 0o600
