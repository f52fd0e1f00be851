"""Several commands have died, and one of them has left something that can't be put right."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from checkpoint import control, recovery, restoration, runtime
from checkpoint.errors import CheckpointError, CudaError, RetryError
from checkpoint.journal import Entry, Journal, left_over
from checkpoint.processes import start_ticks

NOTHING: Any = None
ME = (os.getpid(), start_ticks(os.getpid()) or 0)


class Machine:
    """Journals of restores that died; those in `stuck` can't be undone."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(runtime.VARIABLE, str(folder / "run"))
        monkeypatch.setattr(restoration, "undo", self._undo)
        self.store = str(folder / "store")
        self.stuck: set[str] = set()
        self.undone: list[str] = []

    def died(self, *names: str) -> None:
        for name in names:
            os.close(Journal(self.entry(name))._fd)

    def entry(self, name: str) -> Entry:
        return Entry(kind="restore", name=name, store=self.store, tree=[ME])

    def prepare(self, name: str) -> dict[str, str]:
        done, unread = recovery.prepare(NOTHING, self.store, name)
        assert unread is None
        return {one.name: one.outcome for one in done}

    def left(self) -> dict[str, str]:
        return {entry.name: entry.stuck for _, entry in left_over()}

    def _undo(self, entry: Entry, **_: Any) -> None:
        self.undone.append(entry.name)
        if entry.name in self.stuck:
            raise CheckpointError("process 7 does not die")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def test_one_that_can_not_be_put_right_keeps_no_other_from_it(machine: Machine) -> None:
    machine.died("a", "stuck", "z")
    machine.stuck = {"stuck"}
    with pytest.raises(CheckpointError, match="process 7 does not die"):
        recovery.recover(NOTHING)
    assert set(machine.undone) == {"a", "stuck", "z"}
    assert machine.left() == {"stuck": "process 7 does not die"}


def test_what_is_stuck_keeps_nobody_from_another_snapshot(machine: Machine) -> None:
    machine.died("a", "stuck")
    machine.stuck = {"stuck"}
    assert machine.prepare("other") == {"a": "undone", "stuck": "stuck"}
    assert machine.prepare("other") == {"stuck": "stuck"}
    assert machine.undone.count("stuck") == 1, "tried anew only when that is asked for"
    with pytest.raises(RetryError, match=r"stuck: process 7 does not die") as raised:
        machine.prepare("stuck")
    assert raised.value.mend
    with pytest.raises(CheckpointError, match="process 7 does not die"):
        recovery.recover(NOTHING)
    assert machine.undone.count("stuck") == 2
    machine.stuck = set()
    (done,) = recovery.recover(NOTHING)
    assert (done.outcome, done.fault) == ("undone", None)
    assert machine.left() == {}


def test_what_was_stuck_is_put_right_when_its_processes_are_gone(machine: Machine) -> None:
    entry = machine.entry("stuck")
    entry.tree, entry.stuck = [(1 << 22, 1)], "process 4194304 does not die"
    os.close(Journal(entry)._fd)
    assert machine.prepare("stuck") == {"stuck": "undone"}


def test_the_journal_stays_where_undoing_failed(machine: Machine) -> None:
    def refuse() -> None:
        raise CudaError("process 7 is stuck: locked", stuck={7: "locked"})

    def fall_over() -> None:
        raise PermissionError(1, "not you")

    for number, do in enumerate((refuse, fall_over)):
        entry = machine.entry(f"left {number}")
        entry.step = "dumping"
        with pytest.raises(CheckpointError, match=r"stuck|not you"), Journal(entry):
            control.to_its_end(do)
    with pytest.raises(CheckpointError, match="failed"), Journal(machine.entry("undone")):
        raise CheckpointError("failed, and was undone")
    left = machine.left()
    assert left.keys() == {"left 0", "left 1"}
    assert left["left 0"] == "process 7 is stuck: locked"
    assert {entry.step for _, entry in left_over()} == {"dumping"}


def test_a_journal_that_can_not_be_read_is_told_of(machine: Machine, tmp_path: Path) -> None:
    machine.died("a", "z")
    broken = tmp_path / "run" / "checkpoint" / "00.json"
    broken.write_bytes(b"{}\n")
    done, unread = recovery.prepare(NOTHING, machine.store, "other")
    assert {one.name for one in done} == {"a", "z"}
    assert str(broken) in str(unread)
    with pytest.raises(CheckpointError, match=r"00\.json: can't be read"):
        recovery.recover(NOTHING)
