"""CRIU that takes too long, or is killed, leaves the process as it was, and nothing of a restore."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from checkpoint.criu import DumpOptions, RestoreOptions, dump, options_for, restore
from checkpoint.errors import CheckpointError, RetryError
from checkpoint.processes import tree_of
from tests.helpers.mounting import wait_until
from tests.helpers.targets import needs_criu, target, the_criu

pytestmark = needs_criu

LARGE = """
ballast = bytearray(os.urandom(1 << 20)) * 200
count = 0
while True:
    count += 1
    tell(count)
    wait()
"""


def criu_of(images: str) -> int | None:
    """The CRIU that works on these images."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    arguments = file.read().split(b"\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if images.encode() in arguments and b"--images-dir" in arguments:
                return int(name)
    return None


def emptied(folder: str) -> str:
    for name in os.listdir(folder):
        os.unlink(os.path.join(folder, name))
    return folder


def dump_ever_faster(pid: int, images: str, limit_s: float) -> None:
    for _ in range(20):
        dump(the_criu(), pid, emptied(images), DumpOptions(leave_running=True), limit_s)
        limit_s /= 2


@pytest.mark.parametrize("part", [0.1, 0.2, 0.3, 0.4])
def test_a_dump_that_takes_too_long(tmp_path: Path, images: str, part: float) -> None:
    """It is given up after a part of what it takes on this machine; after less where that was enough."""
    with target(LARGE, tmp_path) as one:
        one.said()
        started = time.monotonic()
        dump(the_criu(), one.pid, emptied(images), DumpOptions(leave_running=True), 60)
        limit_s = part * (time.monotonic() - started)
        with pytest.raises(RetryError, match="did not dump"):
            dump_ever_faster(one.pid, images, limit_s)
        emptied(images)
        assert one.ask() == "2"
        wait_until(lambda: criu_of(images) is None, "what CRIU had forked is gone")
        dump(the_criu(), one.pid, images, DumpOptions(leave_running=True), 60)
        assert one.ask() == "3", "it can be dumped afterwards"


def test_a_dump_whose_criu_is_killed(tmp_path: Path, images: str) -> None:
    with target(LARGE, tmp_path) as one:
        one.said()

        def kill() -> None:
            pid = wait_until(lambda: os.path.exists(f"{images}/pages-1.img") and criu_of(images), "memory is written")
            assert isinstance(pid, int)
            os.kill(pid, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(CheckpointError):
            dump(the_criu(), one.pid, images, DumpOptions(), 60)
        killer.join()
        assert one.ask() == "2"


@pytest.mark.parametrize("sibling", [False, True])
def test_a_restore_that_never_ends(tmp_path: Path, images: str, sibling: bool) -> None:
    """CRIU waits for ever for pages that a shortened image does not hold; nothing of the tree is left."""
    with target(LARGE, tmp_path) as one:
        one.said()
        options = options_for(tree_of(one.pid))
        dump(the_criu(), one.pid, images, options, 60)
        one.process.wait(30)
        os.truncate(f"{images}/pages-1.img", 4096)
        with pytest.raises(RetryError, match="did not restore"):
            restore(the_criu(), images, RestoreOptions(sibling=sibling), 2)
        assert criu_of(images) is None
        wait_until(lambda: not one.lives(), "what was restored so far has ended")
        if sibling:
            assert os.WTERMSIG(os.waitpid(one.pid, 0)[1]) == signal.SIGKILL


def test_a_signal_for_the_callers_terminal_does_not_reach_criu(tmp_path: Path, images: str) -> None:
    with target(LARGE, tmp_path) as one:
        one.said()
        seen: list[int] = []

        def look() -> None:
            pid = wait_until(lambda: criu_of(images), "CRIU runs")
            assert isinstance(pid, int)
            seen.append(os.getsid(pid))

        looker = threading.Thread(target=look)
        looker.start()
        dump(the_criu(), one.pid, images, DumpOptions(), 60)
        looker.join()
        assert seen
        assert seen[0] != os.getsid(0)
        one.process.wait(30)
