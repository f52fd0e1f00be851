"""`weightfs snapshot restore` and the page server: what it says, and what is left when memory can't be filled in."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from checkpoint.processes import family, process, start_ticks
from tests.helpers.mounting import wait_until
from tests.helpers.paged import needs_userfaultfd
from tests.helpers.served import Commands
from tests.helpers.targets import Target, needs_criu, target

pytestmark = [needs_criu, needs_userfaultfd]

HASHES = """
import hashlib
ballast = bytearray(os.urandom(1 << 20)) * 16
while True:
    tell(hashlib.sha256(ballast).hexdigest())
    wait()
"""
HOLDS = """
import os, time
if os.path.exists(os.environ["HELD"]):
    from checkpoint.filling import Filling
    def hold(self, piece, buffer, stopping):
        open(os.environ["HELD"] + ".begun", "w").close()
        while not stopping.wait(1):
            pass
    Filling.fill = hold
"""
CUTS = """
import os
if os.path.exists(os.environ["HELD"]):
    from checkpoint.pages import PlainPages
    parts = PlainPages.parts
    def cut(self, offset, nbytes):
        if nbytes > 1 << 19:
            os.truncate(self.path, 1 << 19)
        yield from parts(self, offset, nbytes)
    PlainPages.parts = cut
"""


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Commands]:
    commands = Commands(tmp_path)
    commands.env["HELD"] = str(tmp_path / "held")
    commands.env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    try:
        yield commands
    finally:
        commands.close()


@pytest.fixture
def hasher(tmp_path: Path, it: Commands) -> Iterator[tuple[Target, str]]:
    """A process that is in the snapshot `warm` and has ended, and what it told."""
    with target(HASHES, tmp_path) as one:
        before = one.said()
        it.told("create", "warm", "--pid", str(one.pid))
        one.process.wait(30)
        yield one, before


def is_gone(pid: int) -> bool:
    return start_ticks(pid) is None or process(pid).has_ended


@contextmanager
def filling(it: Commands, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A restore that has begun to copy memory and does not get on with it."""
    with it.start("restore", "warm") as command:
        try:
            wait_until(lambda: (tmp_path / "held.begun").exists(), "memory is being filled in", timeout_s=30)
            yield command
        finally:
            command.kill()


def test_memory_is_filled_in(it: Commands, hasher: tuple[Target, str]) -> None:
    one, before = hasher
    back = it.told("restore", "warm")
    assert "memory" in back["phases"], back
    assert one.ask() == before
    assert back["memory"]["bytes_copied"] > 16 << 20, back
    assert back["memory"]["given_up_bytes"] == 0
    assert back["memory"].keys() == {"bytes_copied", "zero_bytes", "given_up_bytes", "seconds", "faults"}
    assert one.ask() == before


def test_plain(it: Commands, hasher: tuple[Target, str]) -> None:
    one, before = hasher
    back = it.told("restore", "warm", "--plain")
    assert back["memory"] is None
    assert "memory" not in back["phases"]
    assert one.ask() == before


def test_an_image_is_damaged_meanwhile(tmp_path: Path, it: Commands) -> None:
    with target(HASHES, tmp_path) as one:
        one.said()
        it.told("create", "warm", "--plain", "--pid", str(one.pid))
        one.process.wait(10)
        (tmp_path / "sitecustomize.py").write_text(CUTS)
        (tmp_path / "held").touch()
        error = it.refused("restore", "warm", code=4)
        assert error["path"].endswith(".img")
        wait_until(lambda: is_gone(one.pid), "nothing half filled is left")


def test_the_command_is_killed_meanwhile(tmp_path: Path, it: Commands, hasher: tuple[Target, str]) -> None:
    one, before = hasher
    (tmp_path / "sitecustomize.py").write_text(HOLDS)
    (tmp_path / "held").touch()
    with filling(it, tmp_path) as command:
        command.kill()
        command.communicate(timeout=30)
    (found,) = it.told("recover")["recovered"]
    assert (found["kind"], found["outcome"]) == ("restore", "undone")
    wait_until(lambda: start_ticks(one.pid) is None, "its pid is free")
    os.unlink(tmp_path / "held")
    it.told("restore", "warm")
    assert one.ask() == before


def test_the_command_is_told_to_end_meanwhile(tmp_path: Path, it: Commands, hasher: tuple[Target, str]) -> None:
    one, _ = hasher
    (tmp_path / "sitecustomize.py").write_text(HOLDS)
    (tmp_path / "held").touch()
    with filling(it, tmp_path) as command:
        command.send_signal(signal.SIGTERM)
        command.communicate(timeout=30)
    assert command.returncode == 128 + signal.SIGTERM
    wait_until(lambda: is_gone(one.pid), "nothing half filled is left")


FORKED = """
ballast = bytearray(os.urandom(1 << 20)) * 64
for _ in range(2):
    if os.fork() == 0:
        while True:
            time.sleep(100)
tell("forked")
wait()
tell("again")
wait()
"""


def shared_kib(pid: int) -> int:
    """The memory of a process and its descendants, each shared page once."""
    found = 0
    for one, _ in family(pid):
        with open(f"/proc/{one}/smaps_rollup") as file:
            found += next(int(line.split()[1]) for line in file if line.startswith("Pss:"))
    return found


def test_what_a_fork_shares_stays_shared(tmp_path: Path, it: Commands) -> None:
    with target(FORKED, tmp_path) as one:
        assert one.said() == "forked"
        before = shared_kib(one.pid)
        it.told("create", "warm", "--pid", str(one.pid))
        one.process.wait(30)
        back = it.told("restore", "warm")
        assert back["memory"] is None
        assert shared_kib(one.pid) < before * 1.2
        assert one.ask() == "again"


WAITS = """
import os, time
if os.path.exists(os.environ["HELD"]):
    from checkpoint.snapshots import Snapshot
    verify = Snapshot.verify
    def slow(self, names=None, stopping=None):
        while stopping is not None and os.path.exists(os.environ["HELD"]) and not stopping.wait(0.01):
            pass
        return verify(self, names, stopping)
    Snapshot.verify = slow
"""
"""What is verified while the restore goes on is not before the file is gone."""


def flip(it: Commands) -> str:
    """Change one byte in the middle of the largest image; gives its path."""
    images = os.path.join(it.store, "warm", "images")
    path = max((entry.path for entry in os.scandir(images)), key=os.path.getsize)
    with open(path, "r+b") as file:
        file.seek(os.path.getsize(path) // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    return path


@pytest.fixture
def plain_hasher(tmp_path: Path, it: Commands) -> Iterator[tuple[Target, str]]:
    """As `hasher`, of which CRIU's images are kept."""
    with target(HASHES, tmp_path) as one:
        before = one.said()
        it.told("create", "warm", "--plain", "--pid", str(one.pid))
        one.process.wait(10)
        yield one, before


@pytest.mark.parametrize("options", [[], ["--plain"]], ids=["page server", "plain"])
def test_a_flipped_byte_in_memory_is_never_run(
    options: list[str], it: Commands, plain_hasher: tuple[Target, str]
) -> None:
    one, _ = plain_hasher
    path = flip(it)
    assert os.path.basename(path).startswith("pages-")
    error = it.refused("restore", "warm", *options, code=4)
    assert error["path"] == path
    wait_until(lambda: is_gone(one.pid), "nothing that was restored is left")
    assert it.told("recover")["recovered"] == []


def test_unverified_it_is_run(it: Commands, plain_hasher: tuple[Target, str]) -> None:
    one, _ = plain_hasher
    flip(it)
    assert it.told("restore", "warm", "--no-verify")["verified"] is None
    assert start_ticks(one.pid) is not None


@pytest.mark.parametrize("is_damaged", [False, True], ids=["sound", "damaged"])
def test_nothing_is_let_go_before_all_is_verified(
    is_damaged: bool, tmp_path: Path, it: Commands, plain_hasher: tuple[Target, str]
) -> None:
    one, before = plain_hasher
    (tmp_path / "sitecustomize.py").write_text(WAITS)
    (tmp_path / "held").touch()
    if is_damaged:
        flip(it)
    with it.start("restore", "warm") as command:
        wait_until(lambda: start_ticks(one.pid) is not None and process(one.pid).state == "T", "it is there, stopped")
        assert command.poll() is None
        assert process(one.pid).state == "T"
        os.unlink(tmp_path / "held")
        command.communicate(timeout=30)
    assert command.returncode == (4 if is_damaged else 0)
    if is_damaged:
        wait_until(lambda: is_gone(one.pid), "nothing that was restored is left")
    else:
        assert one.ask() == before


def test_a_command_that_is_told_to_end_does_not_wait_for_the_verification(
    tmp_path: Path, it: Commands, plain_hasher: tuple[Target, str]
) -> None:
    one, _ = plain_hasher
    (tmp_path / "sitecustomize.py").write_text(WAITS)
    (tmp_path / "held").touch()
    with it.start("restore", "warm") as command:
        wait_until(lambda: start_ticks(one.pid) is not None and process(one.pid).state == "T", "it is there, stopped")
        command.send_signal(signal.SIGTERM)
        command.communicate(timeout=30)
    assert command.returncode == 128 + signal.SIGTERM
    wait_until(lambda: is_gone(one.pid), "nothing that was restored is left")


def test_phases_are_all_of_the_time(it: Commands, plain_hasher: tuple[Target, str]) -> None:
    _, _ = plain_hasher
    started = time.monotonic()
    back = it.told("restore", "warm")
    took = time.monotonic() - started
    spent = back["phases"]
    assert next(iter(spent)) == "start"
    assert list(spent)[-1] == "other"
    assert took - 0.5 < sum(spent.values()) < took + 0.02
    assert back["verified"]["nbytes"] == back["bytes"]["logical"]
