"""CRIU that is given up."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoint import criu
from checkpoint.errors import CheckpointError


class Undying(subprocess.Popen[bytes]):
    """As a process is that waits in the kernel."""

    def kill(self) -> None:
        pass


@pytest.fixture
def undying() -> Iterator[Undying]:
    with Undying(["sleep", "1000"], stderr=subprocess.PIPE) as made:
        yield made
        subprocess.Popen.kill(made)


def test_one_that_does_not_die_is_named(undying: Undying, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criu, "_ENDING_S", 0.01)
    with pytest.raises(CheckpointError, match=rf"process {undying.pid}\) does not die") as caught:
        criu._end(undying, str(tmp_path))
    assert f"/proc/{undying.pid}/stack" in str(caught.value.mend)
