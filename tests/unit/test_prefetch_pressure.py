"""Pressure on memory, on a machine made of files and with a clock of our own; and how quick it is on the real one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefetch import pressure
from prefetch.pressure import HOLD_S, Pressure
from tests.helpers.fake_memory import GIB, MIB, MOUNTED_V1, MOUNTED_V2, V1, V2, FakeMachine


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Scene:
    """A fake machine that is asked every 250 ms."""

    def __init__(self, machine: FakeMachine) -> None:
        self.machine = machine
        self.clock = Clock()
        self.pressure = Pressure(machine.root, triggers=False, clock=self.clock)

    def kind(self, after_s: float = 0.25) -> str | None:
        self.clock.now_s += after_s
        reason = self.pressure.check()
        assert reason is None or reason.detail
        return None if reason is None else reason.kind

    def calm(self) -> None:
        """Until the last sign no longer counts."""
        for _ in range(int(HOLD_S / 0.25)):
            last = self.kind()
        assert last is None


def waited(total_us: int) -> str:
    averages = "avg10=0.00 avg60=0.00 avg300=0.00"
    return f"some {averages} total={total_us}\nfull {averages} total=9999999\n"


def events(**counts: int) -> str:
    named = {"low": 0, "high": 0, "max": 0, "oom": 0, "oom_kill": 0, "oom_group_kill": 0} | counts
    return "".join(f"{name} {count}\n" for name, count in named.items())


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    fake = FakeMachine(tmp_path)
    fake.meminfo(64 * GIB, 40 * GIB)
    fake.say("/proc/pressure/memory", waited(5_000_000))
    return fake


@pytest.fixture
def with_group(machine: FakeMachine) -> FakeMachine:
    machine.groups(V2, MOUNTED_V2)
    for place in ("/a", "/a/b"):
        machine.version_2(place, used=1 * GIB)
        machine.say(f"/sys/fs/cgroup{place}/memory.events", events(max=7, low=1))
        machine.say(f"/sys/fs/cgroup{place}/memory.pressure", waited(0))
    return machine


@pytest.fixture
def open_scenes() -> Iterator[list[Scene]]:
    scenes: list[Scene] = []
    yield scenes
    for scene in scenes:
        scene.pressure.close()


def start(machine: FakeMachine, open_scenes: list[Scene]) -> Scene:
    scene = Scene(machine)
    open_scenes.append(scene)
    assert scene.kind() is None, "what happened before does not count"
    return scene


def test_little_available(machine: FakeMachine, open_scenes: list[Scene]) -> None:
    scene = start(machine, open_scenes)
    machine.meminfo(64 * GIB, 64 * GIB // 20 + MIB)
    assert scene.kind() is None
    machine.meminfo(64 * GIB, 64 * GIB // 20 - MIB)
    assert scene.kind() == "available"
    assert scene.kind(60) == "available", "however long nobody asked"
    machine.meminfo(64 * GIB, 40 * GIB)
    assert scene.kind() == "available", "for a while after"
    scene.calm()


def test_on_a_small_machine_the_floor_is_256_mib(machine: FakeMachine, open_scenes: list[Scene]) -> None:
    machine.meminfo(1 * GIB, 257 * MIB)
    scene = start(machine, open_scenes)
    machine.meminfo(1 * GIB, 255 * MIB)
    assert scene.kind() == "available"


@pytest.mark.parametrize("place", ["/a", "/a/b"])
@pytest.mark.parametrize("name", ["high", "max", "oom"])
def test_a_group_meets_its_limit(with_group: FakeMachine, open_scenes: list[Scene], place: str, name: str) -> None:
    scene = start(with_group, open_scenes)
    path = f"/sys/fs/cgroup{place}/memory.events"
    with_group.say(path, events(**{"max": 7, "low": 1, name: 8}))
    assert scene.kind() == "limit"
    scene.calm()
    with_group.say(path, events(**{"max": 7, "low": 2, name: 8}))
    assert scene.kind() is None, "`low` is no limit met"


def test_a_group_of_version_1_meets_its_limit(machine: FakeMachine, open_scenes: list[Scene]) -> None:
    machine.groups(V1, MOUNTED_V1)
    machine.version_1("/a/b", used=1 * GIB)
    machine.say("/sys/fs/cgroup/memory/a/b/memory.failcnt", 3)
    scene = start(machine, open_scenes)
    machine.say("/sys/fs/cgroup/memory/a/b/memory.failcnt", 4)
    assert scene.kind() == "limit"
    scene.calm()


@pytest.mark.parametrize("path", ["/proc/pressure/memory", "/sys/fs/cgroup/a/b/memory.pressure"])
def test_tasks_wait(with_group: FakeMachine, open_scenes: list[Scene], path: str) -> None:
    before = 5_000_000 if path.startswith("/proc") else 0
    scene = start(with_group, open_scenes)
    assert scene.pressure.sources[with_group.path(path)] == "sampled"
    with_group.say(path, waited(before + 40_000))
    assert scene.kind() is None
    with_group.say(path, waited(before + 80_000))
    assert scene.kind() is None
    with_group.say(path, waited(before + 120_000))
    assert scene.kind() == "stall", "a tenth of a second in all"
    for _ in range(16):
        last = scene.kind()
    assert last is None


def test_a_little_waiting_for_long_is_no_stall(machine: FakeMachine, open_scenes: list[Scene]) -> None:
    scene = start(machine, open_scenes)
    for step in range(1, 100):
        machine.say("/proc/pressure/memory", waited(5_000_000 + step * 20_000))
        assert scene.kind() is None, "80 ms in each second"


def test_what_happened_while_nobody_asked_does_not_count(with_group: FakeMachine, open_scenes: list[Scene]) -> None:
    scene = start(with_group, open_scenes)
    with_group.say("/proc/pressure/memory", waited(9_000_000))
    with_group.say("/sys/fs/cgroup/a/memory.events", events(max=90, oom=1))
    assert scene.kind(3600) is None
    assert scene.kind() is None
    assert scene.kind() is None


def test_files_that_vanish_or_hold_nonsense(with_group: FakeMachine, open_scenes: list[Scene]) -> None:
    scene = start(with_group, open_scenes)
    for path in (
        "/proc/meminfo", "/proc/pressure/memory", "/sys/fs/cgroup/a/memory.events", "/sys/fs/cgroup/a/b/memory.pressure"
    ):  # fmt: skip
        with_group.say(path, "\xff high x\nsome total=\n")
    assert scene.kind() is None
    scene.pressure.close()
    assert scene.kind() is None


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    with Pressure(str(tmp_path), triggers=False) as pressure:
        assert pressure.check() is None
        assert set(pressure.sources.values()) == {"absent"}


def test_the_real_one_is_quick_and_leaves_nothing_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with Pressure() as pressure:
        took = []
        for _ in range(200):
            began = time.perf_counter()
            pressure.check()
            took.append(time.perf_counter() - began)
        assert sorted(took)[20] < 200e-6, "where nothing came between"
        print(f"median {sorted(took)[100] * 1e6:.0f} us, {pressure.sources}")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_trigger_whose_group_is_gone_is_given_up(
    with_group: FakeMachine, open_scenes: list[Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe without a reader says POLLERR, as such a trigger does."""
    ends: list[int] = []

    def trigger(_: str) -> int:
        reader, writer = os.pipe()
        os.close(reader)
        ends.append(writer)
        return writer

    monkeypatch.setattr(pressure, "_trigger", trigger)
    with Pressure(with_group.root) as watched:
        assert list(watched.sources.values()) == ["trigger", "trigger"]
        assert watched.check() is None
        assert watched.sources == {}
        for fd in ends:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)
        assert watched.check() is None
