"""A snapshot with GPU state goes onto other GPUs of the same model, by the driver double, and onto no others."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoint.processes import start_ticks
from checkpoint.states import State
from tests.helpers.cuda_double import FILE_VARIABLE, MODEL, UUID, World
from tests.helpers.served import Commands
from tests.helpers.targets import Target, needs_criu, target

pytestmark = needs_criu

OTHER = "GPU-22222222-2222-3333-4444-555555555555"
THIRD = "GPU-33333333-2222-3333-4444-555555555555"
COUNTER = """
count = 0
while True:
    count += 1
    tell(count)
    wait()
"""


class Snapshot:
    """One of a counter that held 64 MiB of the only GPU, and is gone."""

    def __init__(self, commands: Commands, world: World, one: Target) -> None:
        self.commands, self.world, self.one = commands, world, one

    def refused(self, code: int) -> str:
        """Why a restore is; nothing was touched."""
        before = self.world.calls()
        error = self.commands.refused("restore", "warm", code=code)
        assert start_ticks(self.one.pid) is None
        assert self.world.calls() == before
        return str(error["message"])


@pytest.fixture
def snapshot(tmp_path: Path) -> Iterator[Snapshot]:
    world = World.new(tmp_path / "world.json")
    commands = Commands(tmp_path)
    commands.env |= {"PYTHONPATH": os.getcwd(), FILE_VARIABLE: str(world.path)}
    commands.program = [sys.executable, "-m", "tests.helpers.stopping", "none", "kill"]
    try:
        with target(COUNTER, tmp_path) as one:
            one.said()
            world.add(one.pid)
            commands.told("create", "warm", "--pid", str(one.pid))
            one.process.wait(10)
            yield Snapshot(commands, world, one)
    finally:
        commands.close()


def test_onto_another_gpu_of_the_same_model(snapshot: Snapshot) -> None:
    snapshot.world.become({OTHER: MODEL})
    document = snapshot.commands.told("restore", "warm")
    assert snapshot.one.ask() == "2"
    assert snapshot.world.states() == {snapshot.one.pid: State.RUNNING}
    with snapshot.world.change() as world:
        assert world["processes"][str(snapshot.one.pid)]["memory"] == {OTHER: 64}
    (moved,) = [one for one in document["differences"] if one["snapshot"] == UUID]
    assert (moved["here"], moved["matters"]) == (OTHER, False)


def test_its_own_gpu_is_kept_among_others(snapshot: Snapshot) -> None:
    snapshot.world.become({OTHER: MODEL, UUID: MODEL})
    assert not [one for one in snapshot.commands.told("restore", "warm")["differences"] if one["here"] == OTHER]
    with snapshot.world.change() as world:
        assert world["processes"][str(snapshot.one.pid)]["memory"] == {UUID: 64}


def test_a_driver_that_moves_nothing(snapshot: Snapshot) -> None:
    snapshot.world.become({OTHER: MODEL}, moves=False)
    assert "only onto the very same GPU" in snapshot.refused(3)
    done = snapshot.commands.run("restore", "warm")
    assert f"GPUs: {MODEL} ({UUID}) there, {MODEL} ({OTHER}) here; matters" in done.stderr


def test_gpus_of_another_model(snapshot: Snapshot) -> None:
    snapshot.world.become({OTHER: "Another", THIRD: "Third"})
    message = snapshot.refused(3)
    assert f"no {MODEL} is left for {UUID}" in message
    assert f"Another ({OTHER}), Third ({THIRD})" in message


def test_no_gpu_at_all(snapshot: Snapshot) -> None:
    del snapshot.commands.env[FILE_VARIABLE]
    assert "used a GPU" in snapshot.refused(3)
