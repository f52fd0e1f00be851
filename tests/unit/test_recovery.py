"""Several commands have died, and one of them has left something that can't be put right."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from checkpoint import recovery, restoration, runtime
from checkpoint.errors import CheckpointError
from checkpoint.journal import Entry, Journal, left_over


def test_one_that_can_not_be_put_right_keeps_no_other_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(runtime.VARIABLE, str(tmp_path))
    names = {"a", "stuck", "z"}
    for name in names:
        os.close(Journal(Entry(kind="restore", name=name, store=str(tmp_path / "store")))._fd)
    undone = []

    def undo(entry: Entry, **_: Any) -> None:
        undone.append(entry.name)
        if entry.name == "stuck":
            raise CheckpointError("process 7 does not die")

    monkeypatch.setattr(restoration, "undo", undo)
    nothing: Any = None
    with pytest.raises(CheckpointError, match="process 7 does not die"):
        recovery.recover(nothing)
    assert set(undone) == names
    assert [entry.name for _, entry in left_over()] == ["stuck"]
