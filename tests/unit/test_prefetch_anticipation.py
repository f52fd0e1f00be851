"""What is read while nobody reads: the likelier first, never in anybody's way. On trio's mock clock."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from prefetch import anticipation
from prefetch.anticipation import AGAIN_S, PERIOD_S, SOON_S, Anticipation, Score, Target
from prefetch.course import Course
from prefetch.filler import Fill
from prefetch.foresight import Foresight
from prefetch.occupancy import Key
from prefetch.plan import Plan
from prefetch.standing import GAVE_WAY, PREDICTED, WARM, Standing, key_of, name_of
from prefetch.timeline import Timeline
from tests.unit.test_prefetch_foresight import Clock, FakePast
from tests.unit.test_prefetch_scheduler import FakeShelf

SIZE = 4 << 20
MINUTE = 60.0


@dataclass
class FakeReader:
    """Notes what it is told to read, and has it in memory at once; `holds` leaves reads under way."""

    shelf: FakeShelf
    bandwidth_bytes_s: float = 1e9
    reason: str | None = None
    holds: bool = False
    known: list[Standing] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    fills: list[Fill] = field(default_factory=list)
    asked: list[float] = field(default_factory=list)
    on_read: Callable[[], None] = lambda: None

    def busy(self) -> str | None:
        self.asked.append(trio.current_time())
        return self.reason

    def standings(self) -> list[Standing]:
        return self.known

    def read_predicted(self, target: Target) -> Standing | None:
        self.targets.append(target)
        self.on_read()
        fill = Fill(Course(()), {}, lambda: None)
        self.fills.append(fill)
        if not self.holds:
            make_warm(self.shelf, target.key)
            fill.ended.set()
        return standing(target.key, PREDICTED, target.wanted_s, fill)

    async def in_thread(self, function: Callable[[], Any]) -> Any:
        await trio.lowlevel.checkpoint()
        return function()

    @property
    def read(self) -> list[str]:
        return [name_of(target.key) for target in self.targets]


def standing(key: Key, trigger: str, wanted_s: float, fill: Fill | None = None) -> Standing:
    load = Timeline(0.0).begin(name_of(key), trigger, wanted_s, [])
    return Standing(key, wanted_s, trigger, 0, Plan((), ()), False, fill, load)


@contextmanager
def descriptor(shelf: FakeShelf, key: Key) -> Iterator[int]:
    model = shelf.open(*key)
    assert model is not None
    yield model.fds["f"]
    model.close()


def make_warm(shelf: FakeShelf, key: Key) -> None:
    with descriptor(shelf, key) as fd:
        os.pread(fd, SIZE, 0)


def make_cold(shelf: FakeShelf, *keys: Key) -> None:
    for key in keys:
        with descriptor(shelf, key) as fd:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


@dataclass
class Rig:
    """Three models of one size, on the disk and not in memory; `a` is opened every ten minutes, `b` every two."""

    shelf: FakeShelf
    reader: FakeReader
    past: FakePast
    budget_bytes: int = 10 * SIZE

    def run(self, for_s: float, *steps: tuple[float, Callable[[], None]]) -> Anticipation:
        """Let it live for so long, with steps at times; gives it."""
        ahead = self.make()

        async def live() -> None:
            async with trio.open_nursery() as nursery:
                began = trio.current_time()
                nursery.start_soon(ahead.run)
                for at_s, step in steps:
                    await trio.sleep_until(began + at_s)
                    step()
                await trio.sleep_until(began + for_s)
                nursery.cancel_scope.cancel()

        trio.run(live, clock=trio.testing.MockClock(autojump_threshold=0.001))
        return ahead

    def make(self) -> Anticipation:
        foresight = Foresight(self.past, Clock())
        self.ahead = Anticipation(self.reader, self.shelf, foresight, self.budget_bytes, lambda: False)
        return self.ahead

    def opened_every(self, model: str, minutes: float) -> None:
        now = Clock().now
        self.past.opens += [(model, int(now - (turn - 0.5) * minutes * MINUTE)) for turn in range(30, 0, -1)]


A, B, C = ("a/model", "b/model", "c/model")


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    shelf = FakeShelf(tmp_path, nbytes=SIZE)
    rig = Rig(shelf, FakeReader(shelf), FakePast())
    rig.opened_every(A, 10)
    rig.opened_every(B, 120)
    make_cold(shelf, key_of(A), key_of(B), key_of(C))
    return rig


def test_the_likelier_is_read_first_and_each_once(rig: Rig) -> None:
    ahead = rig.run(10 * PERIOD_S)
    assert rig.reader.read == [A, B]
    said = ahead.status()
    assert [one["model"] for one in said["models"]] == [A, B]
    assert all(one["resident_bytes"] >= 0.9 * SIZE for one in said["models"]), "pages may vanish by themselves"
    assert said["models"][0]["probability"] > 0.9
    assert said["waits_for"] is None
    assert said["known"] == 2


def test_what_is_in_memory_is_not_read(rig: Rig) -> None:
    make_warm(rig.shelf, key_of(A))
    rig.run(PERIOD_S)
    assert rig.reader.read == [B]


def test_it_looks_once_a_minute(rig: Rig) -> None:
    rig.past.opens.clear()
    rig.run(10.5 * PERIOD_S)
    began = rig.reader.asked[0]
    assert {round((at_s - began) / PERIOD_S) for at_s in rig.reader.asked} == set(range(11))


def test_the_budget_is_kept_for_the_best(rig: Rig) -> None:
    rig.budget_bytes = SIZE + SIZE // 2
    rig.run(3 * PERIOD_S)
    assert rig.reader.read == [A]


def test_what_is_wanted_more_does_not_leave(rig: Rig) -> None:
    make_warm(rig.shelf, key_of(A))
    make_warm(rig.shelf, key_of(C))
    rig.reader.known.append(standing(key_of(C), "config.json", 0.0))
    rig.budget_bytes = 2 * SIZE
    rig.run(PERIOD_S)
    (target,) = rig.reader.targets
    assert target.key == key_of(B)
    assert key_of(A) in target.kept
    assert key_of(C) not in target.kept, "never opened before"


def test_what_was_warmed_lately_stays(rig: Rig) -> None:
    make_warm(rig.shelf, key_of(C))
    rig.reader.known.append(standing(key_of(C), WARM, time.monotonic()))
    rig.budget_bytes = 2 * SIZE
    rig.run(PERIOD_S)
    assert rig.reader.read == [A], "there is room for one"
    assert key_of(C) in rig.reader.targets[0].kept


def test_what_is_in_use_stays(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        in_use = frozenset({(1, 2)})

    monkeypatch.setattr(anticipation, "files_in_use", lambda keys: Usage)
    make_warm(rig.shelf, key_of(C))
    rig.shelf.keys = {os.fsencode("c"): {(1, 2)}}
    rig.reader.known.append(standing(key_of(C), "config.json", 0.0))
    rig.budget_bytes = 2 * SIZE
    rig.run(PERIOD_S)
    assert rig.reader.read == [A]
    assert key_of(C) in rig.reader.targets[0].kept


def test_nothing_is_read_while_others_are_busy(rig: Rig) -> None:
    rig.reader.reason = "c/model is being read"

    def rest() -> None:
        assert rig.reader.targets == []
        assert rig.ahead.status()["waits_for"] == "c/model is being read"
        rig.reader.reason = None

    rig.run(10 * PERIOD_S + 2 * SOON_S, (10 * PERIOD_S, rest))
    assert rig.reader.read == [A, B]


def test_it_gives_way_at_once_and_goes_on_soon(rig: Rig) -> None:
    rig.reader.holds = True

    def come() -> None:
        assert rig.reader.read == [A]
        rig.ahead.give_way()
        assert rig.reader.fills[0].cancelled
        assert rig.reader.fills[0].failure == GAVE_WAY
        rig.reader.holds = False
        rig.reader.fills[0].ended.set()

    rig.run(PERIOD_S, (1.0, come))
    assert rig.reader.read == [A, A, B]


def test_who_comes_while_a_read_begins_is_given_way(rig: Rig) -> None:
    rig.reader.holds = True
    rig.reader.on_read = lambda: rig.ahead.give_way()
    rig.run(1.0, (0.5, lambda: rig.reader.fills[0].ended.set()))
    assert rig.reader.read == [A]
    assert rig.reader.fills[0].cancelled


def test_what_was_evicted_is_not_read_until_it_is_wanted(rig: Rig) -> None:
    def evict() -> None:
        rig.ahead.unwanted(key_of(A))
        make_cold(rig.shelf, key_of(A))

    def want() -> None:
        assert rig.reader.read == [A, B]
        rig.ahead.wanted(key_of(A))

    rig.run(4 * AGAIN_S, (1.0, evict), (3 * AGAIN_S, want))
    assert rig.reader.read == [A, B, A]


def test_what_the_kernel_drops_again_is_left_alone_for_a_while(rig: Rig) -> None:
    def drop() -> None:
        make_cold(rig.shelf, key_of(A))

    def look() -> None:
        assert rig.reader.read == [A, B]

    rig.run(AGAIN_S + 2 * PERIOD_S, (1.0, drop), (AGAIN_S - 1, look))
    assert rig.reader.read == [A, B, A]


def test_models_that_are_gone_cost_nothing(rig: Rig) -> None:
    rig.shelf.gone = {os.fsencode("a")}
    rig.run(PERIOD_S)
    assert rig.reader.read == [B]


def test_what_others_left_in_memory_is_held(rig: Rig) -> None:
    make_warm(rig.shelf, key_of(A))
    make_warm(rig.shelf, key_of(B))
    rig.reader.known.append(standing(key_of(B), "config.json", 0.0))
    ahead = rig.run(1.0)
    assert [(one.key, one.reserved_bytes) for one in ahead.held()] == [(key_of(A), SIZE)]


def test_a_wait_ends_with_the_daemon(rig: Rig) -> None:
    rig.reader.holds = True
    threads = threading.active_count()
    rig.run(10.0)
    rig.reader.fills[0].ended.set()
    assert threading.active_count() <= threads + 2


# What became of it


def test_what_is_used_and_what_is_wasted() -> None:
    score, key, other = Score(), key_of(A), key_of(B)
    score.read(key, 100)
    score.read(key, 50)
    assert score.is_open(key)
    score.wanted(key, 120)
    assert not score.is_open(key)
    assert (score.read_bytes, score.used_bytes, score.wasted_bytes) == (150, 120, 30)
    score.wanted(key, 120)
    assert score.used_bytes == 120, "counted once"
    score.read(other, 40)
    score.lost(other)
    score.lost(other)
    score.read(other, -5)  # pages vanished meanwhile
    assert not score.is_open(other)
    assert score.wasted_bytes == 70
