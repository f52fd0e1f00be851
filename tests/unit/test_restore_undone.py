"""What a restore whose command has died left behind, when another command comes, maybe much later."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoint.criu_command import PID_FILE
from checkpoint.journal import Entry
from checkpoint.processes import is_stopped
from checkpoint.restoration import undo
from tests.helpers.mounting import wait_until


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "1000"]) as made:
        yield made
        made.kill()


@pytest.fixture
def entry(tmp_path: Path, process: subprocess.Popen[bytes]) -> Entry:
    """Of a restore that died before it told of its tree; CRIU has told of this pid."""
    (tmp_path / PID_FILE).write_text(f"{process.pid}")
    return Entry(
        kind="restore", step="restoring", name="warm", store="/nowhere", images=str(tmp_path), work=str(tmp_path)
    )


def test_a_tree_that_nobody_let_go_ends(entry: Entry, process: subprocess.Popen[bytes]) -> None:
    os.kill(process.pid, signal.SIGSTOP)
    wait_until(lambda: is_stopped(process.pid), "it is stopped")
    undo(entry, later=True)
    assert process.wait(20) == -signal.SIGKILL


def test_a_pid_that_another_process_has_by_now(entry: Entry, process: subprocess.Popen[bytes]) -> None:
    undo(entry, later=True)
    assert process.poll() is None


def test_a_process_that_is_older_than_the_restore(entry: Entry, process: subprocess.Popen[bytes]) -> None:
    entry.since_ticks = 1 << 60
    undo(entry)
    assert process.poll() is None
