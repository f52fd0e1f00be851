"""Snapshot commands that are stopped, and a driver that fails: no process keeps a GPU state that it did not have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from checkpoint.processes import start_ticks, tree_of
from checkpoint.states import State
from tests.helpers.cuda_double import FILE_VARIABLE, World
from tests.helpers.mounting import wait_until
from tests.helpers.served import is_running
from tests.helpers.stopped import Stopped, counter, require_as_before, require_gone
from tests.helpers.targets import Target, needs_criu, target

pytestmark = needs_criu

WITH_CUDA: Final = (
    "locking@",
    "checkpoint.cuda_helper:Cuda.lock_all@after",
    "checkpointing@",
    "checkpoint.cuda_helper:Cuda.checkpoint_all@before",
    "checkpoint.cuda_helper:Cuda.checkpoint_all@after",
    "dumping@",
    "criu@pages-*.img",
    "committing@",
)


@contextmanager
def cuda(commands: Stopped, one: Target, tmp_path: Path) -> Iterator[World]:
    """The target, and its child, are CUDA processes; a test must end helpers that it kills the owner of."""
    world = World.new(tmp_path / "world.json")
    for each in tree_of(one.pid):
        world.add(each.pid)
    commands.env[FILE_VARIABLE] = str(world.path)
    yield world
    wait_until(lambda: not [pid for pid in world.helpers() if is_running(pid)], "no helper outlives its command")


@pytest.mark.parametrize("point", WITH_CUDA)
@pytest.mark.parametrize("how", ["kill", "term"])
def test_a_create_stopped_with_a_gpu(point: str, how: str, tmp_path: Path, weights: str, commands: Stopped) -> None:
    with counter(tmp_path, weights) as one, cuda(commands, one, tmp_path) as world:
        commands.stop(point, how, "create", "warm", "--pid", str(one.pid))
        if how == "kill":
            assert commands.recovered()["outcome"] == "undone"
        assert not commands.left()
        assert set(world.states().values()) == {State.RUNNING}
        require_as_before(one)
        commands.require_consistent()


def test_the_order_of_steps_with_a_gpu(tmp_path: Path, weights: str, commands: Stopped) -> None:
    with counter(tmp_path, weights) as one, cuda(commands, one, tmp_path) as world:
        pids = [each.pid for each in tree_of(one.pid)]
        seen = tmp_path / "seen.json"
        note = f"run:cp {world.path} {seen}"
        commands.stop("checkpoint.criu:dump@before", note, "create", "warm", "--pid", str(one.pid))
        asleep = [(call, pid) for call in ("lock", "checkpoint") for pid in pids]
        assert World(seen).calls() == world.calls() == asleep
        require_gone(one)
        done = commands.stop("checkpoint.criu:restore@after", note, "restore", "warm")
        assert done.returncode == 0, done.stderr
        assert World(seen).calls() == asleep, "nothing is asked before memory is filled"
        assert world.calls() == asleep + [(call, pid) for call in ("restore", "unlock") for pid in pids]
        assert set(world.states().values()) == {State.RUNNING}
        require_as_before(one)


@pytest.mark.parametrize("call", ["lock", "checkpoint"])
@pytest.mark.parametrize("deed", ["refuse", "die", "die_after"])
def test_the_driver_fails_during_a_create(
    call: str, deed: Any, tmp_path: Path, weights: str, commands: Stopped
) -> None:
    with counter(tmp_path, weights) as one, cuda(commands, one, tmp_path) as world:
        world.fail(call, deed, pid=tree_of(one.pid)[1].pid)
        commands.refused("create", "warm", "--pid", str(one.pid), code=1)
        assert not commands.left()
        assert set(world.states().values()) == {State.RUNNING}
        require_as_before(one)
        commands.require_consistent()


@pytest.mark.parametrize("call", ["restore", "unlock"])
def test_the_driver_fails_during_a_restore(call: str, tmp_path: Path, weights: str, commands: Stopped) -> None:
    with counter(tmp_path, weights) as one, cuda(commands, one, tmp_path) as world:
        commands.told("create", "warm", "--pid", str(one.pid))
        require_gone(one)
        world.fail(call, "refuse", pid=one.pid, times=5)
        commands.refused("restore", "warm", code=1)
        assert not commands.left()
        wait_until(lambda: start_ticks(one.pid) is None, "what was restored is gone")
        commands.require_consistent("warm")


def test_a_gpu_without_room(tmp_path: Path, weights: str, commands: Stopped) -> None:
    with counter(tmp_path, weights) as one, cuda(commands, one, tmp_path) as world:
        commands.told("create", "warm", "--pid", str(one.pid))
        require_gone(one)
        (tmp_path / "other").mkdir()
        with target("tell(1); wait()", tmp_path / "other") as other:
            other.said()
            world.add(other.pid, 79_990)
            error = commands.refused("restore", "warm", code=75)
            assert "MiB free" in error["message"]
            assert start_ticks(one.pid) is None
