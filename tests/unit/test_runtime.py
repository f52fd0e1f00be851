"""The folder for what is true until the machine is switched off, which a variable names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from checkpoint import points, runtime
from checkpoint.errors import CheckpointError, CorruptError
from checkpoint.journal import Entry, Journal, left_over


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(runtime.VARIABLE, str(tmp_path / "run"))
    return tmp_path / "run"


def begin(name: str) -> Journal:
    return Journal(Entry(kind="create", name=name, store="/nowhere"))


def test_without_the_variable_it_is_below_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(runtime.VARIABLE, "")
    assert runtime.path_of("checkpoint") == "/run/weightfs/checkpoint"
    monkeypatch.delenv(runtime.VARIABLE)
    assert runtime.path_of("checkpoint") == "/run/weightfs/checkpoint"


def test_all_is_made_there_for_its_owner_alone(base: Path) -> None:
    with begin("warm"):
        (journal,) = base.glob("checkpoint/*.json")
        assert journal.stat().st_mode & 0o777 == 0o600
    point = points.make()
    assert os.path.dirname(point) == str(base / "points")
    for folder in (base / "checkpoint", base / "points", Path(point)):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_each_sees_what_died_in_its_own(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = begin("warm")
    os.close(dead._fd)
    monkeypatch.setenv(runtime.VARIABLE, str(base) + "-of-another")
    assert list(left_over()) == []
    monkeypatch.setenv(runtime.VARIABLE, str(base))
    assert [entry.name for _, entry in left_over()] == ["warm"]


def test_a_relative_path_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(runtime.VARIABLE, "run")
    with pytest.raises(CheckpointError, match=f"run: {runtime.VARIABLE} is no absolute path"):
        begin("warm")


@pytest.mark.parametrize("which", ["", "checkpoint"])
def test_where_others_may_write_nothing_is_believed(base: Path, which: str) -> None:
    """Whoever writes a journal chooses which processes the next command ends."""
    with begin("warm"):
        (base / which).chmod(0o777)
        with pytest.raises(CorruptError, match="may be written by others"):
            list(left_over())
        with pytest.raises(CorruptError, match="may be written by others"):
            begin("another")


def test_a_folder_that_can_not_be_made(base: Path) -> None:
    base.write_text("")
    with pytest.raises(CheckpointError, match="can't be written"):
        begin("warm")
