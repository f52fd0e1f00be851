"""`snapshot create` is killed, told to end, or fails, at every step: it is undone, or completed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from checkpoint.processes import is_stopped, start_ticks, tree_of
from tests.helpers.mounting import wait_until
from tests.helpers.stopped import Stopped, counter, goes_on, require_as_before, require_gone
from tests.helpers.targets import Target, needs_criu

pytestmark = needs_criu

BEFORE_COMMIT: Final = (
    "begun@",
    "checkpoint.store:Store.begin@after",
    "checkpoint.creation:candidates@after",
    "dumping@",
    "criu@dump.log",
    "criu@pages-*.img",
    "checkpoint.criu:dump@after",
    "ingesting@",
    "checkpoint.chunks.writing:_PackDraft.write@after",
    "checkpoint.chunks.writing:PackWriter.commit@before",
    "checkpoint.chunks.writing:_PackDraft.publish@before",
    "checkpoint.chunks.writing:PackWriter.commit@after",
    "committing@",
    "checkpoint.contents:Vault.seal@after",
    "checkpoint.drafts:Draft._finish_images@after",
    "checkpoint.store:Store._publish@before",
)
AFTER_COMMIT: Final = (
    "checkpoint.store:Store._publish@after",
    "finishing@",
    "checkpoint.control:end@before",
    "checkpoint.control:end@after",
)


def create(one: Target, point: str) -> list[str]:
    """The arguments of a create that comes to a point."""
    plain = ["--plain"] if "_finish_images" in point else []
    return ["create", "warm", "--pid", str(one.pid), *plain]


@pytest.mark.parametrize("point", BEFORE_COMMIT)
def test_a_create_killed_before_it_committed(point: str, tmp_path: Path, weights: str, commands: Stopped) -> None:
    with counter(tmp_path, weights) as one:
        done = commands.stop(point, "kill", *create(one, point))
        assert done.returncode == -signal.SIGKILL
        assert commands.left()
        found = commands.recovered()
        assert (found["kind"], found["name"], found["outcome"]) == ("create", "warm", "undone")
        require_as_before(one)
        commands.require_consistent()


@pytest.mark.parametrize("point", AFTER_COMMIT)
def test_a_create_killed_after_it_committed(point: str, tmp_path: Path, weights: str, commands: Stopped) -> None:
    with counter(tmp_path, weights) as one:
        done = commands.stop(point, "kill", "create", "warm", "--pid", str(one.pid))
        assert done.returncode == -signal.SIGKILL
        assert commands.recovered()["outcome"] == "completed"
        require_gone(one)
        commands.require_consistent("warm")
        goes_on(commands, one)


def test_a_create_that_leaves_running_killed_after_it_committed(
    tmp_path: Path, weights: str, commands: Stopped
) -> None:
    with counter(tmp_path, weights) as one:
        commands.stop("finishing@", "kill", "create", "warm", "--pid", str(one.pid), "--leave-running")
        assert commands.recovered()["outcome"] == "completed"
        require_as_before(one)
        commands.require_consistent("warm")


@pytest.mark.parametrize("point", [one for one in BEFORE_COMMIT if "begin" not in one])
def test_a_create_told_to_end(point: str, tmp_path: Path, weights: str, commands: Stopped) -> None:
    with counter(tmp_path, weights) as one:
        done = commands.stop(point, "term", *create(one, point))
        assert done.returncode == 128 + signal.SIGTERM, done.stderr
        assert not commands.left()
        require_as_before(one)
        commands.require_consistent()


def test_a_draft_that_was_lost_goes_with_the_next_create(tmp_path: Path, weights: str, commands: Stopped) -> None:
    with counter(tmp_path, weights) as one:
        commands.stop("checkpoint.store:Store.begin@after", "term", "create", "warm", "--pid", str(one.pid))
        assert not commands.left()
        require_as_before(one)
        commands.told("create", "other", "--pid", str(one.pid))
        commands.require_consistent("other")


@pytest.mark.parametrize("point", AFTER_COMMIT)
def test_a_create_told_to_end_when_it_is_too_late(point: str, tmp_path: Path, weights: str, commands: Stopped) -> None:
    with counter(tmp_path, weights) as one:
        done = commands.stop(point, "term", "create", "warm", "--pid", str(one.pid))
        assert done.returncode == 0, done.stderr
        assert not commands.left()
        require_gone(one)
        goes_on(commands, one)


@pytest.mark.parametrize(
    ("point", "how", "code"),
    [
        ("checkpoint.creation:candidates@after", "fail", 1),
        ("checkpoint.criu:dump@before", "fail", 1),
        ("criu@dump.log", "criu", 1),
        ("criu@pages-*.img", "criu", 1),
        ("checkpoint.criu:dump@after", "fail", 1),
        ("checkpoint.ingestion:take_in@before", "fail", 1),
        ("checkpoint.ingest:ingest@after", "fail", 1),
        ("checkpoint.chunks.writing:PackWriter.commit@before", "fail", 1),
        ("checkpoint.contents:Vault.seal@before", "full", 1),
        ("checkpoint.drafts:Draft._finish_images@before", "full", 1),
        ("checkpoint.store:Store._publish@before", "fail", 1),
    ],
)
def test_a_create_that_fails(point: str, how: str, code: int, tmp_path: Path, weights: str, commands: Stopped) -> None:
    with counter(tmp_path, weights) as one:
        done = commands.stop(point, how, *create(one, point))
        assert done.returncode == code, done.stderr
        assert done.stderr.strip().count("\n") == 0, done.stderr
        assert not commands.left()
        require_as_before(one)
        commands.require_consistent()


def test_weights_that_change_during_the_dump(tmp_path: Path, weights: str, commands: Stopped) -> None:
    with counter(tmp_path, weights) as one:
        change = f"run:printf x | dd of={weights} conv=notrunc status=none"
        done = commands.stop("checkpoint.criu:dump@after", change, "create", "warm", "--pid", str(one.pid))
        assert done.returncode == 4, done.stderr
        assert weights in done.stderr
        require_as_before(one)
        commands.require_consistent()


def test_the_next_command_recovers(tmp_path: Path, weights: str, commands: Stopped) -> None:
    with counter(tmp_path, weights) as one:
        commands.stop("checkpoint.criu:dump@after", "kill", "create", "warm", "--pid", str(one.pid))
        assert tree_of(one.pid)[0].state in "Tt"
        done = commands.run("create", "warm", "--pid", str(one.pid))
        assert done.returncode == 0, done.stderr
        assert "create of warm, which died while dumping, is undone" in done.stderr
        require_gone(one)
        goes_on(commands, one)
        commands.require_consistent("warm")
        assert commands.told("recover")["recovered"] == []


@pytest.mark.parametrize("point", ["finishing@", "checkpoint.control:resume@before", "checkpoint.control:resume@after"])
def test_a_create_that_leaves_running_told_to_end_when_it_is_too_late(
    point: str, tmp_path: Path, weights: str, commands: Stopped
) -> None:
    with counter(tmp_path, weights) as one:
        done = commands.stop(point, "term", "create", "warm", "--pid", str(one.pid), "--leave-running")
        assert done.returncode == 0, done.stderr
        assert not commands.left()
        require_as_before(one)
        commands.require_consistent("warm")


def test_a_process_that_is_stopped_stays_so(tmp_path: Path, weights: str, commands: Stopped) -> None:
    """CRIU leaves every process stopped: afterwards nobody could tell which were before."""
    with counter(tmp_path, weights) as one:
        child = tree_of(one.pid)[1].pid
        os.kill(child, signal.SIGSTOP)
        wait_until(lambda: is_stopped(child), "it is stopped")
        error = commands.refused("create", "warm", "--pid", str(one.pid), "--leave-running", code=1)
        assert f"process {child} can't be snapshotted: it is stopped" in error["message"]
        assert error["mend"] == f"let it go on (kill -CONT {child}), or end it"
        assert is_stopped(child)
        assert not commands.left()


LAUNCHED: Final = """
import os, signal, sys
if not (child := os.fork()):
    while True:
        signal.pause()
with open(sys.argv[1] + ".new", "w") as file:
    file.write(f"{os.getpid()} {child}")
os.rename(sys.argv[1] + ".new", sys.argv[1])
while True:
    signal.pause()
"""


@pytest.mark.parametrize("how", ["kill", "term", "fail"])
@pytest.mark.parametrize(
    "point",
    [
        "starting@",
        "checkpoint.launch:start@after",
        "checkpoint.readiness:wait@after",
        "begun@",
        "checkpoint.criu:dump@after",
        "committing@",
    ],
)
def test_what_was_started_for_a_snapshot_ends_with_it(point: str, how: str, tmp_path: Path, commands: Stopped) -> None:
    told = tmp_path / "told"
    commands.at(point, how)
    program = [sys.executable, "-c", LAUNCHED, str(told)]
    done = commands.run("create", "warm", "--ready-file", str(told), command=program)
    commands.at("none", "kill")
    assert done.returncode == {"kill": -signal.SIGKILL, "term": 128 + signal.SIGTERM, "fail": 1}[how], done.stderr
    if how == "kill":
        assert commands.recovered()["outcome"] == "undone"
    assert not commands.left()
    if told.exists():
        for pid in told.read_text().split():
            wait_until(lambda pid=int(pid): start_ticks(pid) is None, f"process {pid} is gone")  # type: ignore[misc]
    commands.require_consistent()


@contextmanager
def filesystem(folder: Path, options: str) -> Iterator[None]:
    """A small filesystem at a folder."""
    folder.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"{options},mode=0700", "weightfs-test", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_store_without_room(tmp_path: Path, weights: str, commands: Stopped) -> None:
    with counter(tmp_path, weights) as one, filesystem(Path(commands.store), "size=64m"):
        filler = Path(commands.store) / "filler"
        filler.write_bytes(bytes(60 << 20))
        error = commands.refused("create", "warm", "--pid", str(one.pid), code=1)
        assert error["mend"]
        assert not commands.left()
        require_as_before(one)
        filler.unlink()
        commands.require_consistent()


def test_room_that_is_used_up_during_the_dump(tmp_path: Path, weights: str, commands: Stopped) -> None:
    with counter(tmp_path, weights) as one, filesystem(Path(commands.store), "size=256m"):
        filler = Path(commands.store) / "filler"
        fill = f"run:head -c 300M /dev/zero > {filler} 2> /dev/null || true"
        done = commands.stop("dumping@", fill, "create", "warm", "--pid", str(one.pid))
        assert done.returncode == 1, done.stderr
        assert done.stderr.strip().count("\n") == 0, done.stderr
        assert "space" in done.stderr, done.stderr
        assert not commands.left()
        require_as_before(one)
        filler.unlink()
        commands.require_consistent()


def test_a_store_that_is_read_only(tmp_path: Path, weights: str, commands: Stopped) -> None:
    with counter(tmp_path, weights) as one, filesystem(Path(commands.store), "ro"):
        error = commands.refused("create", "warm", "--pid", str(one.pid), code=1)
        assert "Read-only" in error["message"]
        assert not commands.left()
        require_as_before(one)
