"""The folder for what is true until the machine is switched off, which a variable names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from checkpoint import locking, points, runtime
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


def test_what_was_being_written_when_it_died_does_not_count(base: Path) -> None:
    """A signal may cut a write of more than a page short."""
    dead = begin("warm")
    dead.at("dumping", tree=[(pid, 1) for pid in range(1000)])
    (path,) = base.glob("checkpoint/*.json")
    whole = path.read_bytes()
    dead.at("committing", id="anything")
    os.close(dead._fd)
    for cut in (len(whole) + 1, len(path.read_bytes()) - 1):
        os.truncate(path, cut)
        entry = next(left_over())[1]
        assert (entry.step, entry.id, len(entry.tree)) == ("dumping", "", 1000)


def test_a_journal_that_died_before_its_first_line(base: Path) -> None:
    dead = begin("warm")
    os.close(dead._fd)
    (path,) = base.glob("checkpoint/*.json")
    os.truncate(path, 7)
    assert list(left_over()) == []
    assert not path.exists()


def test_one_that_is_taken_for_left_over_before_it_is_locked(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another command looks just after the file was made, and removes it."""
    lock = locking.flock
    looked: list[list[tuple[str, Entry]]] = []

    def after_another(fd: int, how: int, until: float) -> bool:
        if not looked:
            looked.append(list(left_over()))
        return lock(fd, how, until)

    monkeypatch.setattr(locking, "flock", after_another)
    with begin("warm") as journal:
        assert looked == [[]]
        (path,) = base.glob("checkpoint/*.json")
        assert os.path.samestat(path.stat(), os.fstat(journal._fd))


def test_a_disk_without_room(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with begin("warm") as journal:
        (path,) = base.glob("checkpoint/*.json")
        before = path.read_bytes()
        with monkeypatch.context() as full:
            full.setattr(os, "pwrite", lambda fd, content, at: 3)
            with pytest.raises(CheckpointError, match=f"{path}: can't be written: No space left"):
                journal.at("dumping")
        journal.at("locking")
        assert path.read_bytes().startswith(before)
        assert b'"step":"locking"' in path.read_bytes()


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


def test_a_folder_that_can_not_be_read(base: Path) -> None:
    base.write_text("")
    with pytest.raises(CheckpointError, match=f"{base}/checkpoint: can't be read: Not a directory"):
        list(left_over())


def test_a_folder_that_can_not_be_made(base: Path) -> None:
    base.write_text("")
    with pytest.raises(CheckpointError, match="can't be written"):
        begin("warm")
