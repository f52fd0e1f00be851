"""A process that forks after it was looked at, and before CRIU freezes it: its child is in the snapshot as well."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from checkpoint.creation import undo
from checkpoint.digest_cache import DigestCache
from checkpoint.journal import Entry
from checkpoint.processes import process, start_ticks
from checkpoint.tools import Tools
from tests.helpers.mounting import wait_until
from tests.helpers.served import is_running
from tests.helpers.stopped import Stopped
from tests.helpers.targets import Target, end, needs_criu, target, the_criu

pytestmark = needs_criu

FORKER: Final = """
tell("warm")
wait()
if not (child := os.fork()):
    while True:
        signal.pause()
while True:
    tell(child)
    wait()
"""


@contextmanager
def forker(tmp_path: Path) -> Iterator[Target]:
    with target(FORKER, tmp_path) as one:
        assert one.said() == "warm"
        try:
            yield one
        finally:
            if (said := one.said()).isdigit():
                end(int(said))


def forks(one: Target) -> str:
    """What has it fork."""
    return f"run:kill -USR1 {one.pid}; until grep -q '^[0-9]' {one.told}; do sleep 0.01; done"


def test_the_child_ends_with_its_parent(tmp_path: Path, commands: Stopped) -> None:
    with forker(tmp_path) as one:
        assert commands.stop("dumping@", forks(one), "create", "warm", "--pid", str(one.pid)).returncode == 0
        child = int(one.said())
        one.process.wait(30)
        wait_until(lambda: start_ticks(child) is None, "its child is gone, too")
        assert commands.told("show", "warm")["manifest"]["pids"] == [one.pid, child]
        commands.told("restore", "warm")
        assert process(child).ppid == one.pid
        assert one.ask() == str(child)


def test_the_child_goes_on_with_its_parent(tmp_path: Path, commands: Stopped) -> None:
    with forker(tmp_path) as one:
        done = commands.stop("dumping@", forks(one), "create", "warm", "--pid", str(one.pid), "--leave-running")
        assert done.returncode == 0, done.stderr
        child = int(one.said())
        wait_until(lambda: is_running(one.pid) and is_running(child), "both run")
        assert one.ask() == str(child)


def test_the_child_goes_on_after_a_create_that_died_in_the_dump(tmp_path: Path) -> None:
    """Its journal does not tell of the child."""
    with forker(tmp_path) as one:
        known = (one.pid, start_ticks(one.pid) or 0)
        child = int(one.ask())
        for pid in (child, one.pid):  # as a dump leaves them
            os.kill(pid, signal.SIGSTOP)
            wait_until(lambda pid=pid: process(pid).state == "T", "it is stopped")  # type: ignore[misc]
        entry = Entry(kind="create", step="dumping", name="warm", store="/nowhere", root=one.pid, tree=[known])
        with DigestCache(str(tmp_path / "digests")) as cache:
            undo(entry, Tools(criu=the_criu(), cuda=None, cache=cache, state=str(tmp_path)))
        wait_until(lambda: is_running(one.pid) and is_running(child), "both run")
