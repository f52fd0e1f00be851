"""GPU memory is brought back while host memory is filled in: of the tree nothing runs but the driver's own thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from checkpoint.processes import start_ticks, tree_of
from checkpoint.states import State
from tests.helpers.cuda_double import FILE_VARIABLE, World
from tests.helpers.mounting import wait_until
from tests.helpers.paged import needs_userfaultfd
from tests.helpers.stopped import Stopped, require_gone
from tests.helpers.targets import Target, end, needs_criu, target

pytestmark = [needs_criu, needs_userfaultfd]

READS = """
import hashlib
if not (child := os.fork()):  # before there is much memory that they would share
    while True:
        signal.pause()
ballast = bytearray(os.urandom(1 << 20)) * 64
want = hashlib.sha256(ballast).hexdigest()
thread = threading.Thread(target=lambda: [(sum(ballast[::4096]), time.sleep(0.001)) for _ in iter(int, 1)], daemon=True)
thread.start()
while True:
    tell(f"{thread.native_id} {child} {hashlib.sha256(ballast).hexdigest() == want}")
    wait()
"""


@dataclass(frozen=True)
class Reader:
    """A process that reads its memory in a thread that stands for the driver's; and what it does next."""

    one: Target
    thread: int
    child: int
    world: World

    def require_as_before(self) -> None:
        assert self.one.ask() == f"{self.thread} {self.child} True"

    def require_gone(self) -> None:
        wait_until(lambda: start_ticks(self.one.pid) is None, "it dies with what filled its memory")
        wait_until(lambda: start_ticks(self.child) is None, "so does the tree")

    def seen(self) -> dict[int, str]:
        """Its threads when the driver was asked to restore it."""
        with self.world.change() as world:
            return {int(thread): state for thread, state in world["processes"][str(self.one.pid)]["seen"].items()}


@contextmanager
def reader(tmp_path: Path, commands: Stopped) -> Iterator[Reader]:
    """Snapshotted, and gone."""
    with target(READS, tmp_path) as one:
        thread, child = (int(word) for word in one.said().split()[:2])
        world = World.new(tmp_path / "world.json")
        world.add(one.pid)
        world.set(one.pid, thread=thread)
        commands.env[FILE_VARIABLE] = str(world.path)
        try:
            commands.told("create", "warm", "--pid", str(one.pid))
            require_gone(one)
            yield Reader(one, thread, child, world)
        finally:
            end(child)


def test_only_that_thread_runs_meanwhile(tmp_path: Path, commands: Stopped) -> None:
    with reader(tmp_path, commands) as it:
        back = commands.told("restore", "warm")
        it.require_as_before()
        assert it.world.states() == {it.one.pid: State.RUNNING}
        states = it.seen()
        assert states.pop(it.thread) in "RSD"
        assert set(states.values()) == {"t"}, "the others are held"
        assert len(tree_of(it.one.pid)) == 2
        spans = {one["name"]: one for one in back["timeline"]}
        assert spans["driver opens"]["start_s"] <= spans["open"]["end_s"], "the driver is opened beside everything else"
        assert spans["filling"]["beside"]
        assert spans["filling"]["start_s"] < spans["cuda restore"]["end_s"]
        assert spans["cuda restore"]["start_s"] < spans["memory"]["start_s"]


@pytest.mark.parametrize("point", ["checkpoint.cuda_helper:Cuda.restore_all@before", "letting go@"])
@pytest.mark.parametrize("how", ["kill", "term"])
def test_stopped_meanwhile(point: str, how: str, tmp_path: Path, commands: Stopped) -> None:
    with reader(tmp_path, commands) as it:
        commands.stop(point, how, "restore", "warm")
        it.require_gone()
        if how == "kill":
            commands.recovered()
        assert not commands.left()
        it.world.set(it.one.pid, state=int(State.CHECKPOINTED))  # which the driver has in the process itself
        commands.told("restore", "warm")
        it.require_as_before()


@pytest.mark.parametrize("deed", ["refuse", "die"])
def test_the_driver_fails_meanwhile(deed: Any, tmp_path: Path, commands: Stopped) -> None:
    with reader(tmp_path, commands) as it:
        it.world.fail("restore", deed, pid=it.one.pid, times=5)
        commands.refused("restore", "warm", code=1)
        it.require_gone()
        assert not commands.left()


def test_damage_is_found_meanwhile(tmp_path: Path, commands: Stopped) -> None:
    with reader(tmp_path, commands) as it:
        for path in Path(commands.store).glob(".chunks*/*.pack"):
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        commands.refused("restore", "warm", code=4)
        it.require_gone()
        assert not commands.left()
