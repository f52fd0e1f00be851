"""When prefetch yields its disk, on a clock and counters of the test's own."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from prefetch.pace import Counters, Disks, Pace

MIB = 1 << 20
READ = 4 * MIB


class Machine:
    """A disk that ours and others read from, and memory that it fills."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.counted: Counters | None = Counters(0, 0)
        self.held: int | None = 0
        self.pace = Pace(lambda: self.counted, lambda: self.held, lambda: self.now_s)
        self.pace.restart()

    def ours(self, took_s: float = 0.001) -> None:
        """Wait as long as we are told, then read."""
        self.now_s += self.pace.wait_s(0)
        assert self.pace.wait_s(0) == 0
        self.now_s += took_s
        self.read(READ, READ)
        assert self.held is not None
        self.held += READ
        self.pace.came(READ)
        self.pace.ended(READ)

    def yields(self) -> bool:
        return self.pace.yields

    def read(self, nbytes: int, each: int) -> None:
        """Have the disk read."""
        if self.counted is not None:
            self.counted = Counters(self.counted.nbytes + nbytes, self.counted.reads + nbytes // each)

    def rate(self, seconds: float, *, each: int = 0, own_loader: bool = False) -> float:
        """Bytes a second that prefetch reads beside somebody whose reads are of `each` bytes, 100 MB/s of them."""
        ends, begun, read, at_s = self.now_s + seconds, self.now_s, 0, self.now_s
        while self.now_s < ends:
            self.ours()
            read += READ
            if each:
                passed = max(each, int((self.now_s - at_s) * 100e6) // each * each)
                self.read(passed, each)
                if own_loader and self.held is not None:
                    self.held += passed
            at_s = self.now_s
        return read / (self.now_s - begun)


@pytest.fixture
def machine() -> Machine:
    return Machine()


def test_alone_it_takes_all_of_the_disk(machine: Machine) -> None:
    assert machine.rate(1.0) > 0.99 * READ / 0.001
    assert not machine.yields()


@pytest.mark.parametrize(("each", "share"), [(64 << 10, 1 / 26), (4 * MIB, 1 / 7)])
def test_beside_others_it_leaves_gaps(machine: Machine, each: int, share: float) -> None:
    machine.rate(0.2)
    machine.rate(0.2, each=each)
    assert machine.yields()
    assert machine.rate(1.0, each=each) == pytest.approx(share * READ / 0.001, rel=0.1)


def test_it_takes_all_again_once_they_have_ended(machine: Machine) -> None:
    machine.rate(0.3, each=4096)
    assert machine.yields()
    machine.rate(0.2)
    assert not machine.yields()
    assert machine.rate(0.5) > 0.95 * READ / 0.001


def test_who_pauses_again_and_again_is_yielded_to_for_longer(machine: Machine) -> None:
    lasts = []
    for _ in range(5):
        machine.rate(0.3, each=4096)
        assert machine.yields()
        paused_s = machine.now_s
        while machine.yields():
            machine.ours()
        lasts.append(machine.now_s - paused_s)
    assert lasts[0] < 0.15
    assert lasts[-1] > 0.5


def test_while_others_are_suspected_few_reads_are_under_way(machine: Machine) -> None:
    machine.rate(0.2)
    machine.now_s += 0.06
    machine.read(8 * MIB, 4096)
    assert machine.pace.wait_s(0) == 0
    assert machine.pace.wait_s(1) == 0
    assert 0 < machine.pace.wait_s(2) <= 0.02
    machine.now_s += 0.02
    assert machine.pace.wait_s(0) == 0
    assert machine.pace.wait_s(2) == 0


def test_it_passes_over_who_hardly_reads(machine: Machine) -> None:
    for _ in range(200):
        machine.rate(0.01)
        machine.read(64 << 10, 4096)
    assert not machine.yields()


def test_it_does_not_yield_to_who_reads_once(machine: Machine) -> None:
    for _ in range(20):
        machine.rate(0.2)
        machine.read(8 * MIB, 4096)
    assert not machine.yields()


def test_what_was_read_ahead_is_waited_for_but_not_long(machine: Machine) -> None:
    machine.rate(0.2)
    machine.now_s += 0.06
    assert machine.counted is not None
    machine.read(8 * MIB, 4096)
    machine.counted = replace(machine.counted, under_way=3)
    began_s = machine.now_s
    while (wait_s := machine.pace.wait_s(0)) > 0:
        machine.now_s += wait_s
    assert machine.now_s - began_s == pytest.approx(0.03, abs=0.002)


def test_the_loader_of_what_is_read_is_no_other(machine: Machine) -> None:
    assert machine.rate(1.0, each=64 << 10, own_loader=True) > 0.95 * READ / 0.001
    assert not machine.yields()


@pytest.mark.parametrize("unknown", ["counters", "resident"])
def test_who_cannot_tell_yields_to_nobody(machine: Machine, unknown: str) -> None:
    if unknown == "counters":
        machine.counted = None
        machine.rate(0.1)
    else:
        machine.rate(0.1)
        machine.pace = Pace(lambda: machine.counted, lambda: None, lambda: machine.now_s)
        for _ in range(100):
            machine.now_s += 0.01
            machine.read(MIB, 4096)
            assert machine.pace.wait_s(0) == 0
    assert not machine.yields()


def test_while_the_disk_reads_only_what_we_do_nothing_is_waited_for(machine: Machine) -> None:
    assert machine.pace.wait_s(0) == 0
    looks = 0

    def look() -> int:
        nonlocal looks
        looks += 1
        return 0

    machine.pace = Pace(lambda: machine.counted, look, lambda: machine.now_s)
    assert machine.pace.wait_s(0) == 0
    for _ in range(100):
        machine.now_s += 0.02
        machine.read(READ, READ)
        assert machine.pace.wait_s(3, 3 * READ) == 0  # it may be what is under way
        machine.pace.came(READ)
        machine.pace.ended(READ)
    assert looks == 1


def test_when_it_reads_more_it_is_waited_until_nothing_is_under_way(machine: Machine) -> None:
    assert machine.pace.wait_s(0) == 0
    assert machine.pace.wait_s(3, 3 * READ) == 0
    machine.now_s += 0.06
    machine.read(3 * READ + MIB, 4096)
    assert machine.pace.wait_s(3, 3 * READ) > 0
    assert machine.pace.wait_s(2, 2 * READ) > 0
    assert machine.pace.wait_s(0, READ) == 0


def test_a_loader_of_what_is_read_holds_up_nothing(machine: Machine) -> None:
    assert machine.held is not None
    assert machine.pace.wait_s(0) == 0
    for _ in range(100):
        machine.now_s += 0.02
        machine.read(8 * MIB, 64 << 10)
        machine.held += 8 * MIB
        assert machine.pace.wait_s(3, MIB) == 0
    assert not machine.yields()


def test_a_read_that_never_ends_holds_it_up_once(machine: Machine) -> None:
    assert machine.pace.wait_s(0) == 0
    machine.now_s += 0.06
    machine.read(8 * MIB, 4096)
    assert machine.held is not None
    assert machine.pace.wait_s(1) == pytest.approx(1.0)
    machine.now_s += 1.0
    waits = 0
    for _ in range(1000):
        waits += machine.pace.wait_s(1) > 0
        machine.read(MIB, 4096)
        machine.held += MIB
        machine.now_s += 0.01
    assert waits == 0


def test_other_files_are_compared_with_what_there_was(machine: Machine) -> None:
    machine.rate(0.2)
    machine.held = 100 * MIB
    machine.read(100 * MIB, MIB)
    machine.pace.restart()
    machine.rate(0.2)
    assert not machine.yields()


def test_a_disk_counts_what_is_read_from_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(MIB))
    device, disks = path.stat().st_dev, Disks()
    disks.follow([device])
    before = disks.counters()
    if before is None:
        pytest.skip("this machine lacks statistics of the disk below the folder for temp files")
    with open(path, "rb", buffering=0) as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.read(MIB)
    after = disks.counters()
    assert after is not None
    assert after.nbytes - before.nbytes >= MIB
    assert after.reads > before.reads
    disks.follow([])
    assert disks.counters() is None


def test_a_device_without_statistics_counts_nothing() -> None:
    disks = Disks()
    disks.follow([os.stat("/proc").st_dev])
    assert disks.counters() is None
