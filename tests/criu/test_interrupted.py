"""CRIU that takes too long, or is killed, leaves the process as it was, and nothing of a restore."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoint.criu import DumpOptions, RestoreOptions, dump, options_for, restore
from checkpoint.errors import CriuError, RetryError
from checkpoint.processes import tree_of
from tests.helpers.mounting import wait_until
from tests.helpers.targets import needs_criu, target, the_criu

pytestmark = needs_criu

LARGE_BYTES = 200 << 20
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


def is_traced(pid: int) -> bool:
    """Whether a process stands still because another one traces it."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] == "t"


def written_bytes(images: str) -> int:
    try:
        return os.stat(f"{images}/pages-1.img").st_size
    except FileNotFoundError:
        return -1


STAGES: dict[str, Callable[[int, str], bool]] = {
    "begun": lambda pid, images: True,
    "the process stands still": lambda pid, images: is_traced(pid),
    "memory is to be written": lambda pid, images: written_bytes(images) >= 0,
    "half is written": lambda pid, images: written_bytes(images) > LARGE_BYTES // 2,
}


def disturb(images: str, number: signal.Signals, is_reached: Callable[[], bool], over: threading.Event) -> None:
    """Send CRIU a signal at a stage, unless it ends before."""
    while not over.is_set():
        if (pid := criu_of(images)) is not None:
            while not over.is_set():
                if is_reached():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
                    return


def dump_disturbed(pid: int, images: str, number: signal.Signals, stage: str) -> None:
    """Dump with a CRIU that gets a signal; again where it was done too soon for that."""
    for _ in range(50):
        over = threading.Event()
        arguments = (images, number, functools.partial(STAGES[stage], pid, images), over)
        disturbing = threading.Thread(target=disturb, args=arguments)
        disturbing.start()
        try:
            dump(the_criu(), pid, emptied(images), DumpOptions(leave_running=True), 2)
        finally:
            over.set()
            disturbing.join()


@pytest.mark.parametrize("stage", STAGES)
def test_a_dump_that_takes_too_long(tmp_path: Path, images: str, stage: str) -> None:
    with target(LARGE, tmp_path) as one:
        one.said()
        with pytest.raises(RetryError, match="did not dump"):
            dump_disturbed(one.pid, images, signal.SIGSTOP, stage)
        emptied(images)
        assert one.ask() == "2"
        wait_until(lambda: criu_of(images) is None, "what CRIU had forked is gone")
        dump(the_criu(), one.pid, images, DumpOptions(leave_running=True), 60)
        assert one.ask() == "3", "it can be dumped afterwards"


def test_a_dump_whose_criu_is_killed(tmp_path: Path, images: str) -> None:
    with target(LARGE, tmp_path) as one:
        one.said()
        with pytest.raises(CriuError):
            dump_disturbed(one.pid, images, signal.SIGKILL, "half is written")
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
        over = threading.Event()

        def look() -> None:
            while not seen and not over.is_set():
                if (pid := criu_of(images)) is not None:
                    with contextlib.suppress(ProcessLookupError):
                        seen.append(os.getsid(pid))

        looker = threading.Thread(target=look)
        looker.start()
        dump(the_criu(), one.pid, images, DumpOptions(), 60)
        over.set()
        looker.join()
        assert seen
        assert seen[0] != os.getsid(0)
        one.process.wait(30)
