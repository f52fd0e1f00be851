"""Logs that a restored process is given: one that the snapshot names is no way into another file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from checkpoint import stdio
from checkpoint.errors import CheckpointError


def test_a_log_that_became_a_symlink_is_not_followed(tmp_path: Path) -> None:
    victim, log = tmp_path / "victim", tmp_path / "log"
    victim.write_text("mine")
    log.symlink_to(victim)
    wanted = [(1, "file:[1]", str(log))]
    with pytest.raises(CheckpointError, match="can't write its log") as raised, stdio.opened(wanted, None, "/nowhere"):
        pass
    assert raised.value.path == str(log)
    # Who names one may name a link.
    with stdio.opened(wanted, str(log), "/nowhere") as ((fd, resource),):
        assert resource == "file:[1]"
        os.write(fd, b" and more")
    assert victim.read_text() == "mine and more"
