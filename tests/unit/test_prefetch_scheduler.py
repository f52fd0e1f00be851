"""The scheduler over a shelf of real files: what a source that fails or stands still may cost."""

from __future__ import annotations

import errno
import functools
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from prefetch.anticipation import Target
from prefetch.occupancy import Key, Occupancy, Wanted
from prefetch.pressure import Reason
from prefetch.scheduler import Scheduler, SchedulerConfig
from prefetch.standing import Standing
from prefetch.wishes import Wish, is_trigger
from tests.unit.test_prefetch_foresight import FakePast
from weightfs import linux
from weightfs.formats.layout import Role, TensorExtent, WeightLayout

SIZE = 1 << 20
SOON_S = 10.0


@dataclass
class Model:
    folder: bytes
    name: str
    layout: WeightLayout
    fds: dict[str, int]
    sizes: dict[str, int]
    keys: set[tuple[int, int]]

    def close(self) -> None:
        for fd in self.fds.values():
            os.close(fd)
        self.fds.clear()


@dataclass
class FakeShelf:
    """Every path is a model of one file but those that are gone; `before` is called by each opening."""

    place: Path
    before: Callable[[], None] = lambda: None
    nbytes: int = SIZE
    parts: int = 1
    gone: set[bytes] = field(default_factory=set)
    keys: dict[bytes, set[tuple[int, int]]] = field(default_factory=dict)
    made: list[Model] = field(default_factory=list)

    def names(self, path: bytes) -> list[Key]:
        return [(path, "model")]

    def open(self, folder: bytes, name: str) -> Model | None:
        self.before()
        if folder in self.gone:
            return None
        path, size = self.place / os.fsdecode(folder), self.nbytes
        if not path.exists():
            path.write_bytes(bytes(size))
        part = size // self.parts
        tensors = (
            TensorExtent(f"model.layers.{n}.a", "U8", (part,), "f", n * part, part, n, Role.BLOCK)
            for n in range(self.parts)
        )
        fd = os.open(path, os.O_RDONLY)
        layout = WeightLayout("safetensors", ("f",), tuple(tensors))
        made = Model(folder, name, layout, {"f": fd}, {"f": size}, self.keys.get(folder, set()))
        self.made.append(made)
        return made


def all_closed(shelf: FakeShelf) -> bool:
    return not any(model.fds for model in shelf.made)


def wait_for(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


async def until(condition: Callable[[], bool]) -> None:
    """Wait in trio for what threads do."""
    with trio.fail_after(SOON_S):
        while not condition():  # noqa: ASYNC110 - no event tells of it
            await trio.sleep(0.01)


def test_names_that_begin_a_plan() -> None:
    for name in ("config.json", "tokenizer.json", "vocab.txt", "model.safetensors", "a.gguf", "x.index.json"):
        assert is_trigger(b"folder/" + name.encode())
    for name in ("README.md", "model.bin", ".gitattributes", "my_config.json.bak"):
        assert not is_trigger(b"folder/" + name.encode())


def test_descriptors_are_given_back_when_a_plan_fails(tmp_path: Path) -> None:
    def broken(folder: bytes, files: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    shelf = FakeShelf(tmp_path)
    scheduler = Scheduler(shelf, SchedulerConfig(learned=broken))
    assert scheduler.warm(b"a", None) == []
    assert all_closed(shelf)
    assert scheduler.status()["wanted"] == 0


def test_a_loader_that_opens_weights_finds_first_pages_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("prefetch.underway.glance", lambda tensors, fds: asked.append(len(list(tensors))))
    scheduler = Scheduler(FakeShelf(tmp_path, parts=4), SchedulerConfig())
    scheduler._filler.halt(True)
    for trigger, times in (("config.json", 0), ("model.safetensors", 1), ("model.safetensors", 1)):
        standing = scheduler._begin((b"a", "model"), Wish(trigger=trigger))
        assert standing is not None
        assert asked == [4] * times
        assert standing.fill is not None
        assert standing.fill.awaited is bool(times)
    scheduler._begin((b"b", "model"), Wish(trigger="model.safetensors"))
    assert asked == [4, 4]
    scheduler._filler.close()


def test_the_filler_is_led_where_a_loader_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbytes = 64 * SIZE
    scheduler = Scheduler(FakeShelf(tmp_path, nbytes=nbytes, parts=4), SchedulerConfig())
    scheduler._filler.halt(True)
    held: dict[int, int] = {}  # bytes in memory from an offset on
    monkeypatch.setattr("prefetch.underway.resident_bytes", lambda fd, offset, size: min(size, held.get(offset, 0)))
    standing = scheduler._begin((b"a", "model"), Wish(trigger="model.safetensors"))
    assert standing is not None
    assert standing.fill is not None
    assert scheduler._underway.elsewhere() == []
    third = nbytes // 4 * 3
    held.update({third: 8 * SIZE, third + 4 * SIZE: 4 * SIZE})
    [(fill, place)] = scheduler._underway.elsewhere()
    assert (fill, place.offset) == (standing.fill, third + 8 * SIZE)
    scheduler._filler.lead(fill, place)
    assert next(fill.chunks).offset == third + 8 * SIZE
    scheduler._filler.close()


def test_a_model_is_read_and_its_descriptors_given_back(tmp_path: Path) -> None:
    shelf = FakeShelf(tmp_path)
    scheduler = Scheduler(shelf, SchedulerConfig())
    assert [one["bytes"] for one in scheduler.warm(b"a", None)] == [SIZE]
    wait_for(lambda: not scheduler.progress(["a/model"])[0]["active"])
    assert scheduler.progress(["a/model"])[0]["failure"] is None
    assert all_closed(shelf)


def test_the_state_is_told_while_the_source_stands_still(tmp_path: Path) -> None:
    shelf, let_go = FakeShelf(tmp_path), threading.Event()
    scheduler = Scheduler(shelf, SchedulerConfig())
    scheduler.warm(b"a", None)
    wait_for(lambda: not scheduler.progress(["a/model"])[0]["active"])

    def stand_still() -> None:
        let_go.wait(SOON_S)

    shelf.before = stand_still
    started = time.monotonic()
    for _ in range(5):
        assert scheduler.status()["models"] == []
    assert time.monotonic() - started < 0.8 * SOON_S, "one of them waits, and not for long"
    shelf.before = lambda: None
    let_go.set()
    wait_for(lambda: [one["bytes"] for one in scheduler.status()["models"]] == [SIZE])
    wait_for(lambda: all_closed(shelf))


@pytest.mark.parametrize("reserved", [0, SIZE])
def test_what_is_being_read_keeps_its_room(tmp_path: Path, reserved: int) -> None:
    shelf = FakeShelf(tmp_path)
    model = shelf.open(b"a", "model")
    assert model is not None
    os.fsync(model.fds["f"])
    os.pread(model.fds["f"], SIZE, 0)
    model.close()
    occupancy = Occupancy(shelf, SIZE + SIZE // 2, ())
    left = occupancy.make_room(SIZE, [Wanted((b"a", "model"), 1.0, reserved)])
    assert left == (SIZE // 2 if reserved else SIZE)
    assert (occupancy.evicted_bytes > 0) is (reserved == 0)
    assert all_closed(shelf)


# What nobody asked for


def cool(shelf: FakeShelf, *names: str) -> None:
    """Make models' files, on the disk and not in memory."""
    for name in names:
        model = shelf.open(name.encode(), "model")
        assert model is not None
        os.fsync(model.fds["f"])
        os.posix_fadvise(model.fds["f"], 0, 0, os.POSIX_FADV_DONTNEED)
        model.close()


class Gate:
    """Stands before whatever the filler reads with: reads wait while it is shut."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        for where, name in ((os, "sendfile"), (linux, "populate_huge")):
            monkeypatch.setattr(where, name, functools.partial(self._read, getattr(where, name)))

    def _read(self, read: Callable[..., Any], *arguments: int) -> Any:
        self.open.wait(SOON_S)
        return read(*arguments)


def target(name: str, *kept: str) -> Target:
    keys = frozenset((one.encode(), "model") for one in kept)
    return Target(key=(name.encode(), "model"), probability=0.5, wanted_s=1.0, kept=keys)


def ended(standing: Standing | None) -> Standing:
    assert standing is not None
    assert standing.fill is not None
    assert standing.fill.ended.wait(SOON_S)
    return standing


def predicting(shelf: FakeShelf, **settings: Any) -> Scheduler:
    return Scheduler(shelf, SchedulerConfig(**settings), past=FakePast())


def counted(scheduler: Scheduler) -> tuple[int, int, int]:
    said = scheduler.status()["predicted"]
    return said["read_bytes"], said["used_bytes"], said["wasted_bytes"]


def test_what_was_foretold_is_used(tmp_path: Path) -> None:
    shelf = FakeShelf(tmp_path)
    cool(shelf, "a")
    scheduler = predicting(shelf)
    done = ended(scheduler.read_predicted(target("a")))
    assert counted(scheduler) == (SIZE, 0, 0)
    assert done.wanted_s == 1.0, "to be read is not to be wanted"
    assert scheduler.timeline()["loads"][0]["trigger"] == "predicted"
    scheduler.warm(b"a", None)
    wait_for(lambda: counted(scheduler) == (SIZE, SIZE, 0))
    wait_for(lambda: all_closed(shelf))


def test_what_is_evicted_before_it_is_used_was_in_vain(tmp_path: Path) -> None:
    shelf = FakeShelf(tmp_path)
    cool(shelf, "a", "b")
    scheduler = predicting(shelf, budget_bytes=SIZE)
    ended(scheduler.read_predicted(target("a")))
    scheduler.warm(b"b", None)
    wait_for(lambda: counted(scheduler) == (SIZE, 0, SIZE))


def test_what_is_kept_does_not_leave_for_what_is_foretold(tmp_path: Path) -> None:
    shelf = FakeShelf(tmp_path)
    cool(shelf, "a", "b")
    scheduler = predicting(shelf, budget_bytes=SIZE)
    scheduler.warm(b"a", None)
    wait_for(lambda: not scheduler.status()["active"])
    done = ended(scheduler.read_predicted(target("b", "a")))
    assert "has room for 0" in str(done.document()["failure"])
    assert counted(scheduler) == (0, 0, 0)
    ended(scheduler.read_predicted(target("b")))
    assert counted(scheduler) == (SIZE, 0, 0)


def test_who_asks_does_not_wait_for_what_is_foretold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf, gate = FakeShelf(tmp_path), Gate(monkeypatch)
    cool(shelf, "a")
    scheduler = predicting(shelf)
    foretold = scheduler.read_predicted(target("a"))
    assert [one["trigger"] for one in scheduler.status()["active"]] == ["predicted"]
    assert scheduler.read_predicted(target("a")) is foretold
    (said,) = scheduler.warm(b"a", None)
    assert said["trigger"] == "warm"
    gate.open.set()
    wait_for(lambda: not scheduler.status()["active"])
    assert scheduler.progress(["a/model"])[0]["failure"] is None


def test_what_is_asked_for_is_not_foretold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf, gate = FakeShelf(tmp_path), Gate(monkeypatch)
    cool(shelf, "a")
    scheduler = predicting(shelf)
    scheduler.warm(b"a", None)
    known = scheduler.read_predicted(target("a"))
    assert known is not None
    assert known.trigger == "warm"
    gate.open.set()
    ended(known)


def test_what_is_foretold_is_not_locked(tmp_path: Path) -> None:
    shelf = FakeShelf(tmp_path)
    cool(shelf, "a")
    scheduler = predicting(shelf, pinned=frozenset({"0"}))
    ended(scheduler.read_predicted(target("a")))
    assert scheduler.status()["locked_bytes"] == 0
    scheduler.warm(b"a", None)
    wait_for(lambda: scheduler.status()["locked_bytes"] > 0)
    scheduler.evict(b"a")
    assert scheduler.status()["locked_bytes"] == 0


def test_off_remembers_and_foretells_nothing(tmp_path: Path) -> None:
    scheduler = Scheduler(FakeShelf(tmp_path), SchedulerConfig(mode="off"), past=FakePast())
    assert scheduler.status()["predicted"] is None
    assert Scheduler(FakeShelf(tmp_path), SchedulerConfig()).status()["predicted"] is None


def test_an_open_is_remembered_and_a_warming_is_not(tmp_path: Path) -> None:
    past = FakePast()
    scheduler = Scheduler(FakeShelf(tmp_path), SchedulerConfig(), past=past)

    async def live() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scheduler.run)
            scheduler.opened(b"m/config.json", os.getpid())
            scheduler.opened(b"m/README.md", os.getpid())
            await scheduler.in_thread(lambda: scheduler.warm(b"w", None))
            await until(lambda: len(scheduler.standings()) == 2)
            nursery.cancel_scope.cancel()

    (tmp_path / "m").mkdir()
    trio.run(live)
    assert [model for model, _ in past.opens] == ["m/config.json/model"], "at the end at the latest"


# Parts


def test_whoever_wants_all_of_it_does_not_wait_for_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf, gate = FakeShelf(tmp_path), Gate(monkeypatch)
    shelf.parts = 2
    cool(shelf, "a")
    scheduler = Scheduler(shelf, SchedulerConfig())
    scheduler.warm(b"a", ["0"])
    assert scheduler.standings()[0].in_part
    (said,) = scheduler.warm(b"a", None)
    assert not scheduler.standings()[0].in_part
    gate.open.set()
    wait_for(lambda: scheduler.progress(["a/model"])[0]["active"] is False)
    (said,) = scheduler.progress(["a/model"])
    assert said["failure"] is None
    assert said["filled_bytes"] + said["found_bytes"] == SIZE
    wait_for(lambda: all_closed(shelf))


def test_evicting_ends_every_read_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf, gate = FakeShelf(tmp_path), Gate(monkeypatch)
    shelf.parts = 2
    cool(shelf, "a")
    scheduler = Scheduler(shelf, SchedulerConfig())
    scheduler.warm(b"a", None)
    scheduler.warm(b"a", ["0"])
    gate.open.set()
    scheduler.evict(b"a")
    assert {load["outcome"] for load in scheduler.timeline()["loads"]} <= {"it was evicted", "complete"}
    wait_for(lambda: all_closed(shelf))


# Memory that is short


def test_locked_layers_stay_within_the_budget(tmp_path: Path) -> None:
    shelf = FakeShelf(tmp_path)
    scheduler = Scheduler(shelf, SchedulerConfig(pinned=frozenset({"0"}), budget_bytes=SIZE + SIZE // 2))
    for name in (b"a", b"b"):
        scheduler.warm(name, None)
        wait_for(lambda: not scheduler.status()["active"])
    said = scheduler.status()
    assert said["locked_bytes"] == SIZE
    assert "b/model: " in said["lock_failure"]
    assert "the budget" in said["lock_failure"]
    scheduler.evict(b"a")


def test_no_more_is_given_back_than_it_takes(tmp_path: Path) -> None:
    shelf = FakeShelf(tmp_path)
    for name in ("a", "b", "c"):
        (model,) = [shelf.open(name.encode(), "model")]
        assert model is not None
        os.fsync(model.fds["f"])
        os.pread(model.fds["f"], SIZE, 0)
        model.close()
    occupancy = Occupancy(shelf, 10 * SIZE, ())
    told: list[Key] = []
    occupancy.on_evicted = told.append
    models = [Wanted((name, "model"), at_s, 0) for name, at_s in ((b"a", 2.0), (b"b", 1.0), (b"c", 3.0))]
    assert occupancy.give_back(0, models) == SIZE
    assert told == [(b"b", "model")], "of one it is not known how much is missing: the first to go"
    assert occupancy.give_back(SIZE + 1, models) == 2 * SIZE
    assert told[1:] == [(b"a", "model"), (b"c", "model")]
    assert occupancy.give_back(0, models) == 0
    assert all_closed(shelf)


class FakePressure:
    """Tells what a test says; a sign is seen at each check while there is one."""

    reason: Reason | None = None
    told_s = 0.0

    def __enter__(self) -> FakePressure:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def check(self) -> Reason | None:
        if self.reason is not None:
            self.told_s = time.monotonic()
        return self.reason


def test_pressure_takes_one_model_at_a_time_until_it_falls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pressure, shelf = FakePressure(), FakeShelf(tmp_path)
    monkeypatch.setattr("prefetch.scheduler.Pressure", lambda: pressure)
    scheduler = predicting(shelf)
    cool(shelf, "a", "b", "c")

    def evicted() -> int:
        return int(scheduler.status()["evicted_bytes"])

    async def live() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scheduler.run)
            for name in (b"a", b"b", b"c"):
                await scheduler.in_thread(functools.partial(scheduler.warm, name, None))
            await until(lambda: not scheduler.status()["active"])
            assert scheduler.busy() is None
            pressure.reason = Reason("stall", "tasks wait")
            await until(lambda: evicted() >= SIZE)
            pressure.reason = None
            await until(lambda: scheduler.status()["halted"] is None)
            taken = evicted()
            assert SIZE <= taken < 3 * SIZE, "it fell before all had left"
            assert "memory was short" in str(scheduler.busy())
            pressure.reason = Reason("stall", "tasks wait")
            await until(lambda: evicted() == 3 * SIZE)
            assert "memory is short" in str(scheduler.busy())
            nursery.cancel_scope.cancel()

    trio.run(live)


# A source that fails


def test_what_no_byte_comes_of_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf, gate = FakeShelf(tmp_path), Gate(monkeypatch)
    monkeypatch.setattr("prefetch.underway.STALLED_S", 0.2)
    cool(shelf, "a")
    scheduler = Scheduler(shelf, SchedulerConfig())

    async def live() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scheduler.run)
            await scheduler.in_thread(lambda: scheduler.warm(b"a", None))
            await until(lambda: bool(scheduler.status()["failed"]))
            (said,) = scheduler.status()["failed"]
            assert "no byte came for 0.2 s" in said["failure"]
            assert said["active"] is False
            assert scheduler.status()["active"] == []
            assert len(scheduler.warm(b"a", None)) == 1
            assert len(scheduler.timeline()["loads"]) == 1, "the read that stands still is not joined by others"
            gate.open.set()
            await until(lambda: all_closed(shelf))
            nursery.cancel_scope.cancel()

    trio.run(live)
