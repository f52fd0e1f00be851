"""Snapshot commands that are killed, told to end, or fail, at a point; and a process to try them on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from checkpoint.processes import start_ticks, tree_of
from tests.helpers.mounting import wait_until
from tests.helpers.served import Commands, is_running
from tests.helpers.targets import Target, end, target

COUNTER: Final = """
ballast = bytearray(os.urandom(1 << 20)) * 8
if not (child := os.fork()):
    while True:
        signal.pause()
weights = mmap.mmap(os.open(sys.argv[2], os.O_RDONLY), 0, access=mmap.ACCESS_READ)
count = 0
while True:
    count += 1
    tell(f"{count} {child}")
    wait()
"""
"""With a child, and weights: an ordinary file of more than 1 MiB named as such."""


class Stopped(Commands):
    """Commands that are stopped at a point."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.journals = os.path.join(self.runtime, "checkpoint")
        self.env["PYTHONPATH"] = os.getcwd()
        self.at("none", "kill")

    def at(self, point: str, how: str) -> None:
        """Where commands are stopped from now on."""
        self.program = [sys.executable, "-m", "tests.helpers.stopping", point, how]

    def stop(self, point: str, how: str, action: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run one that is stopped; those after it are not."""
        self.at(point, how)
        done = self.run(action, *arguments)
        self.at("none", "kill")
        return done

    def left(self) -> list[str]:
        """What is left of journals."""
        return os.listdir(self.journals) if os.path.exists(self.journals) else []

    def recovered(self) -> dict[str, Any]:
        """Recover the one command that was killed; gives what is said of it."""
        (one,) = self.told("recover")["recovered"]
        assert not self.left()
        return dict(one)


@contextmanager
def counter(tmp_path: Path, weights: str) -> Iterator[Target]:
    with target(COUNTER, tmp_path, weights) as found:
        child = int(found.said().split()[1])
        try:
            yield found
        finally:
            end(child)


def require_as_before(one: Target) -> None:
    """It goes on, and so does its child."""
    tree = tree_of(one.pid)
    assert len(tree) == 2
    wait_until(lambda: all(is_running(each.pid) for each in tree), "the tree runs")
    before = int(Path(one.told).read_text().split()[0])
    assert int(one.ask().split()[0]) == before + 1


def require_gone(one: Target) -> None:
    one.process.wait(30)
    wait_until(lambda: start_ticks(one.pid) is None, "it is gone")


def goes_on(commands: Stopped, one: Target) -> None:
    """The snapshot can be restored: it goes on where it was."""
    commands.told("restore", "warm")
    require_as_before(one)
