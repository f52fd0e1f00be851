"""The mark of a clean end: an index is walked when it lacks it."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.unit.support import python
from tests.unit.test_index_store import ENTRY
from weightfs.index import opening
from weightfs.index.store import IndexStore

# The mark of a clean end


def walks(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Collects the commands that walk an index, and lets them run."""
    commands: list[object] = []
    run = subprocess.run

    def recorded(command: object, **options: object) -> object:
        commands.append(command)
        return run(command, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(opening.subprocess, "run", recorded)  # type: ignore[attr-defined]
    return commands


def test_a_clean_index_is_not_walked(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = walks(monkeypatch)
    for _ in range(3):
        index = IndexStore(state, "source")
        index.put_entry(index.take(), ENTRY)
        index.close()
    assert not commands


def test_an_index_that_was_killed_is_walked_once_and_kept(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import os, sys
from weightfs.index.store import IndexStore
index = IndexStore(sys.argv[1], "source")
index.put_number(b"key", index.take())
index.flush()
print(index.number_of(b"key"), flush=True)
os.kill(os.getpid(), 9)
"""
    IndexStore(state, "source").close()
    number = int(python(code, state).stdout)
    commands = walks(monkeypatch)
    for _ in range(2):
        index = IndexStore(state, "source")
        assert index.set_aside is None
        assert index.number_of(b"key") == number
        index.close()
    assert len(commands) == 1


def test_a_file_put_in_place_of_the_clean_one_is_walked(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    IndexStore(state, "source").close()
    path = os.path.join(state, "index.lmdb")
    with open(path, "rb") as file:
        data = file.read()
    os.unlink(path)
    with open(path, "wb") as file:
        file.write(data)
    commands = walks(monkeypatch)
    index = IndexStore(state, "source")
    index.close()
    assert len(commands) == 1
    assert index.set_aside is None


def test_walk_counts_the_records(state: str) -> None:
    index = IndexStore(state, "source")
    for number in range(10):
        index.put_entry(number, ENTRY)
    index.close()
    assert opening.walk(os.path.join(state, "index.lmdb")) == 10 + 2  # and meta's own two
