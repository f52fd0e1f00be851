"""What counts as an open, when it is written down, and what is learned from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from prefetch.foresight import COMPACT_AT, KEPT, SAME_PROCESS_S, SAME_S, SETTLES_S, Foresight
from prefetch.predictor import Predictor
from weightfs.errors import IndexStoreError
from weightfs.index.history import History
from weightfs.index.store import IndexStore

NOW = 1_700_000_000.0
HOUR = 3600.0


@dataclass
class Clock:
    now: float = NOW

    def __call__(self) -> float:
        return self.now


@dataclass
class FakePast:
    """A history in memory; `fault` is raised by whoever writes."""

    opens: list[tuple[str, int]] = field(default_factory=list)
    state: bytes = b""
    fault: Exception | None = None

    def note(self, model: str, at_s: float) -> int:
        if self.fault is not None:
            raise self.fault
        self.opens.append((model, int(at_s)))
        return len(self.opens)

    def since(self, position: int) -> tuple[bytes | None, list[tuple[str, int]], int]:
        return (None if position else self.state), self.opens[position:], len(self.opens)

    def compact(self, fold: Callable[[bytes, list[tuple[str, int]]], bytes], *, keep: int) -> int:
        old, self.opens = self.opens[:-keep], self.opens[-keep:]
        self.state = fold(self.state, old)
        return len(old)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def past() -> FakePast:
    return FakePast()


@pytest.fixture
def foresight(past: FakePast, clock: Clock) -> Foresight:
    return Foresight(past, clock)


def test_an_open_is_written_down_once_it_has_stood(foresight: Foresight, past: FakePast, clock: Clock) -> None:
    foresight.opened("a", 1)
    foresight.settle()
    assert past.opens == []
    clock.now += SETTLES_S
    foresight.settle()
    foresight.settle()
    assert past.opens == [("a", int(NOW))]
    assert not foresight.has_news


def test_at_the_end_all_are_written_down(foresight: Foresight, past: FakePast) -> None:
    foresight.opened("a", 1)
    foresight.settle(everything=True)
    assert past.opens == [("a", int(NOW))]


def test_a_load_is_one_open(foresight: Foresight, past: FakePast, clock: Clock) -> None:
    for second in range(0, int(2 * SAME_PROCESS_S), 10):  # a process that opens a file after the other
        clock.now = NOW + second
        foresight.opened("a", 1)
    foresight.settle(everything=True)
    assert len(past.opens) == 1


def test_other_processes_of_a_load_are_the_same_open_for_a_minute(
    foresight: Foresight, past: FakePast, clock: Clock
) -> None:
    for process in range(8):
        foresight.opened("a", process)
        clock.now += 1
    clock.now = NOW + SAME_S
    foresight.opened("a", 9)
    foresight.settle(everything=True)
    assert past.opens == [("a", int(NOW)), ("a", int(NOW + SAME_S))]


def test_who_goes_through_the_library_opened_nothing(foresight: Foresight, past: FakePast, clock: Clock) -> None:
    for model in ("a", "b", "c"):
        foresight.opened(model, 1)
    foresight.opened("d", 2)
    foresight.walked(1)
    clock.now += 1
    foresight.opened("a", 3)
    foresight.settle(everything=True)
    assert past.opens == [("d", int(NOW)), ("a", int(NOW) + 1)]


def test_a_clock_set_back_loses_nothing(foresight: Foresight, past: FakePast, clock: Clock) -> None:
    foresight.opened("a", 1)
    clock.now -= HOUR
    foresight.opened("a", 1)
    foresight.settle()
    clock.now += SETTLES_S
    foresight.settle()
    assert past.opens == [("a", int(NOW)), ("a", int(NOW - HOUR))]


def test_a_history_that_can_not_be_written_is_no_error(
    foresight: Foresight, past: FakePast, caplog: pytest.LogCaptureFixture
) -> None:
    past.fault = IndexStoreError("can't be written: the disk is full", path="index")
    foresight.opened("a", 1)
    foresight.settle(everything=True)
    assert "opens are not remembered" in caplog.text


def test_it_learns_what_is_new(foresight: Foresight, past: FakePast, clock: Clock) -> None:
    assert foresight.likely(HOUR, 10) == {}
    for turn in range(40):
        past.note("often", NOW - (40 - turn) * 600)
    past.note("once", NOW - 30 * HOUR)
    foresight.refresh()
    likely = foresight.likely(HOUR, 10)
    assert next(iter(likely)) == "often"
    assert likely["often"] > 0.9 > likely.get("once", 0)
    assert foresight.likely(HOUR, 1).keys() == {"often"}
    assert foresight.last_open_s("often") == NOW - 600
    assert foresight.last_open_s("never") is None
    past.note("late", NOW - 5)
    foresight.refresh()
    assert len(foresight) == 3


def test_old_opens_are_folded_and_still_known(index: IndexStore, clock: Clock) -> None:
    past = History(index.database)
    every = 60.0
    for turn in range(COMPACT_AT - 1):
        past.note(f"m{turn % 7}", NOW - (COMPACT_AT - turn) * every)
    before, late = Foresight(past, clock), Foresight(past, clock)
    before.refresh()
    before.opened("m0", 1)
    before.settle(everything=True)
    assert len(past.opens()) == KEPT
    before.refresh()
    late.refresh()
    assert before.likely(HOUR, 10) == pytest.approx(late.likely(HOUR, 10)), "a successor foretells the same"
    assert len(late) == 7


def test_a_state_of_another_version_is_dropped(past: FakePast, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    past.state = b"\x93\x02\xc0\x90"
    past.note("a", NOW - 5)
    foresight = Foresight(past, clock)
    foresight.refresh()
    assert len(foresight) == 1
    assert "is dropped" in caplog.text
    past.state = Predictor().state()
    foresight = Foresight(past, clock)
    foresight.refresh()
    assert len(foresight) == 1
