"""`snapshot create` and `restore` are killed, told to end, or fail, at every step: it is undone, or completed."""

from __future__ import annotations

import contextlib
import http.server
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from checkpoint.errors import TargetError
from checkpoint.processes import start_ticks, tree_of
from checkpoint.states import State
from tests.helpers.cuda_double import FILE_VARIABLE, World
from tests.helpers.mounting import wait_until
from tests.helpers.served import Commands, is_running
from tests.helpers.targets import Target, end, needs_criu, target

pytestmark = needs_criu

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

BEFORE_COMMIT: Final = (
    "begun@",
    "checkpoint.store:Store.begin@after",
    "checkpoint.creation:identify@after",
    "dumping@",
    "criu@dump.log",
    "criu@pages-*.img",
    "checkpoint.criu:dump@after",
    "committing@",
    "checkpoint.drafts:Draft._finish_images@after",
    "checkpoint.store:Store._publish@before",
)
AFTER_COMMIT: Final = (
    "checkpoint.store:Store._publish@after",
    "finishing@",
    "checkpoint.control:end@before",
    "checkpoint.control:end@after",
)
WHILE_RESTORING: Final = (
    "restoring@",
    "criu@restore.log",
    "criu@restored.pid",
    "checkpoint.criu:restore@before",
    "checkpoint.criu:restore@after",
    "letting go@",
    "checkpoint.control:resume@before",
    "checkpoint.control:resume@after",
    "ready@",
    "checkpoint.readiness:wait@after",
)
WITH_CUDA: Final = (
    "locking@",
    "checkpoint.cuda_helper:Cuda.lock_all@after",
    "checkpointing@",
    "checkpoint.cuda_helper:Cuda.checkpoint_all@before",
    "checkpoint.cuda_helper:Cuda.checkpoint_all@after",
    "dumping@",
    "criu@pages-*.img",
    "committing@",
)


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
        assert self.told("recover")["recovered"] == []
        return dict(one)


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Stopped]:
    made = Stopped(tmp_path)
    yield made
    made.close()


@pytest.fixture
def weights(tmp_path: Path) -> str:
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(2 << 20))
    return str(path)


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
    one.process.wait(10)
    wait_until(lambda: start_ticks(one.pid) is None, "it is gone", timeout_s=10)


def goes_on(commands: Stopped, one: Target) -> None:
    """The snapshot can be restored: it goes on where it was."""
    commands.told("restore", "warm")
    require_as_before(one)


@pytest.mark.parametrize("point", BEFORE_COMMIT)
def test_a_create_killed_before_it_committed(point: str, tmp_path: Path, weights: str, commands: Stopped) -> None:
    with counter(tmp_path, weights) as one:
        done = commands.stop(point, "kill", "create", "warm", "--pid", str(one.pid))
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
        done = commands.stop(point, "term", "create", "warm", "--pid", str(one.pid))
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


def test_a_create_told_to_end_when_it_is_too_late(tmp_path: Path, weights: str, commands: Stopped) -> None:
    with counter(tmp_path, weights) as one:
        done = commands.stop("checkpoint.store:Store._publish@after", "term", "create", "warm", "--pid", str(one.pid))
        assert done.returncode == 0, done.stderr
        assert not commands.left()
        require_gone(one)
        goes_on(commands, one)


@pytest.mark.parametrize(
    ("point", "how", "code"),
    [
        ("checkpoint.creation:identify@after", "fail", 1),
        ("checkpoint.criu:dump@before", "fail", 1),
        ("criu@dump.log", "criu", 1),
        ("criu@pages-*.img", "criu", 1),
        ("checkpoint.criu:dump@after", "fail", 1),
        ("checkpoint.drafts:Draft._finish_images@before", "full", 1),
        ("checkpoint.store:Store._publish@before", "fail", 1),
    ],
)
def test_a_create_that_fails(point: str, how: str, code: int, tmp_path: Path, weights: str, commands: Stopped) -> None:
    with counter(tmp_path, weights) as one:
        done = commands.stop(point, how, "create", "warm", "--pid", str(one.pid))
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


def test_weights_that_change_during_the_restore(tmp_path: Path, weights: str, commands: Stopped) -> None:
    with counter(tmp_path, weights) as one:
        commands.told("create", "warm", "--pid", str(one.pid))
        require_gone(one)
        change = f"run:printf x | dd of={weights} conv=notrunc status=none"
        done = commands.stop("checkpoint.criu:restore@after", change, "restore", "warm")
        assert done.returncode == 4, done.stderr
        wait_until(lambda: start_ticks(one.pid) is None, "what was restored is gone")
        commands.require_consistent("warm")


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


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """An address that answers."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


class Answering(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stopped, Target]]:
    """A snapshot of a counter that is gone."""
    folder = tmp_path_factory.mktemp("restores")
    weights = folder / "model.safetensors"
    weights.write_bytes(os.urandom(2 << 20))
    commands = Stopped(folder)
    with counter(folder, str(weights)) as one:
        commands.told("create", "warm", "--pid", str(one.pid))
        require_gone(one)
        yield commands, one


@pytest.fixture
def dumped(snapshot: tuple[Stopped, Target]) -> Iterator[tuple[Stopped, Target]]:
    """The same, for a test that may leave a counter behind."""
    yield snapshot
    with contextlib.suppress(TargetError):
        for each in tree_of(snapshot[1].pid):
            end(each.pid)


@pytest.mark.parametrize("how", ["kill", "term", "fail"])
@pytest.mark.parametrize("point", WHILE_RESTORING)
def test_a_restore_that_is_stopped(point: str, how: str, dumped: tuple[Stopped, Target], url: str) -> None:
    commands, one = dumped
    done = commands.stop(point, how, "restore", "warm", "--wait-url", url)
    assert done.returncode == {"kill": -signal.SIGKILL, "term": 128 + signal.SIGTERM, "fail": 1}[how], done.stderr
    if how == "kill":
        assert commands.recovered()["outcome"] == "undone"
    else:
        assert not commands.left()
    wait_until(lambda: start_ticks(one.pid) is None, "what was restored is gone", timeout_s=10)
    commands.require_consistent("warm")
    commands.told("restore", "warm")
    assert one.ask().split()[0] == "2"


@pytest.mark.parametrize("pattern", ["restore.log", "restored.pid"])
def test_criu_is_killed_while_it_restores(pattern: str, dumped: tuple[Stopped, Target]) -> None:
    commands, one = dumped
    done = commands.stop(f"criu@{pattern}", "criu", "restore", "warm")
    assert done.returncode == 1, done.stderr
    assert not commands.left()
    wait_until(lambda: start_ticks(one.pid) is None, "what was restored is gone", timeout_s=10)
    commands.require_consistent("warm")


@contextmanager
def cuda(commands: Stopped, one: Target, tmp_path: Path) -> Iterator[World]:
    """The target, and its child, are CUDA processes; a test must end helpers that it kills the owner of."""
    world = World.new(tmp_path / "world.json")
    for each in tree_of(one.pid):
        world.add(each.pid)
    commands.env[FILE_VARIABLE] = str(world.path)
    yield world
    wait_until(lambda: not [pid for pid in world.helpers() if is_running(pid)], "no helper outlives its command")


@pytest.mark.parametrize("point", WITH_CUDA)
@pytest.mark.parametrize("how", ["kill", "term"])
def test_a_create_stopped_with_a_gpu(point: str, how: str, tmp_path: Path, weights: str, commands: Stopped) -> None:
    with counter(tmp_path, weights) as one, cuda(commands, one, tmp_path) as world:
        commands.stop(point, how, "create", "warm", "--pid", str(one.pid))
        if how == "kill":
            assert commands.recovered()["outcome"] == "undone"
        assert not commands.left()
        assert set(world.states().values()) == {State.RUNNING}
        require_as_before(one)
        commands.require_consistent()


def test_the_order_of_steps_with_a_gpu(tmp_path: Path, weights: str, commands: Stopped) -> None:
    with counter(tmp_path, weights) as one, cuda(commands, one, tmp_path) as world:
        pids = [each.pid for each in tree_of(one.pid)]
        seen = tmp_path / "seen.json"
        note = f"run:cp {world.path} {seen}"
        commands.stop("checkpoint.criu:dump@before", note, "create", "warm", "--pid", str(one.pid))
        asleep = [(call, pid) for call in ("lock", "checkpoint") for pid in pids]
        assert World(seen).calls() == world.calls() == asleep
        require_gone(one)
        done = commands.stop("checkpoint.criu:restore@after", note, "restore", "warm")
        assert done.returncode == 0, done.stderr
        assert World(seen).calls() == asleep, "nothing is asked before memory is filled"
        assert world.calls() == asleep + [(call, pid) for call in ("restore", "unlock") for pid in pids]
        assert set(world.states().values()) == {State.RUNNING}
        require_as_before(one)


@pytest.mark.parametrize("call", ["lock", "checkpoint"])
@pytest.mark.parametrize("deed", ["refuse", "die", "die_after"])
def test_the_driver_fails_during_a_create(
    call: str, deed: Any, tmp_path: Path, weights: str, commands: Stopped
) -> None:
    with counter(tmp_path, weights) as one, cuda(commands, one, tmp_path) as world:
        world.fail(call, deed, pid=tree_of(one.pid)[1].pid)
        commands.refused("create", "warm", "--pid", str(one.pid), code=1)
        assert not commands.left()
        assert set(world.states().values()) == {State.RUNNING}
        require_as_before(one)
        commands.require_consistent()


@pytest.mark.parametrize("call", ["restore", "unlock"])
def test_the_driver_fails_during_a_restore(call: str, tmp_path: Path, weights: str, commands: Stopped) -> None:
    with counter(tmp_path, weights) as one, cuda(commands, one, tmp_path) as world:
        commands.told("create", "warm", "--pid", str(one.pid))
        require_gone(one)
        world.fail(call, "refuse", pid=one.pid, times=5)
        commands.refused("restore", "warm", code=1)
        assert not commands.left()
        wait_until(lambda: start_ticks(one.pid) is None, "what was restored is gone")
        commands.require_consistent("warm")


def test_a_gpu_without_room(tmp_path: Path, weights: str, commands: Stopped) -> None:
    with counter(tmp_path, weights) as one, cuda(commands, one, tmp_path) as world:
        commands.told("create", "warm", "--pid", str(one.pid))
        require_gone(one)
        (tmp_path / "other").mkdir()
        with target("tell(1); wait()", tmp_path / "other") as other:
            other.said()
            world.add(other.pid, 79_990)
            error = commands.refused("restore", "warm", code=75)
            assert "MiB free" in error["message"]
            assert start_ticks(one.pid) is None


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
            wait_until(lambda pid=int(pid): start_ticks(pid) is None, f"process {pid} is gone", timeout_s=10)  # type: ignore[misc]
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
        fill = f"run:head -c 250M /dev/zero > {filler}"
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
