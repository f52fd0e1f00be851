"""`snapshot restore` is killed, told to end, or fails, at every step: it is undone."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from checkpoint.errors import TargetError
from checkpoint.processes import start_ticks, tree_of
from tests.helpers.mounting import wait_until
from tests.helpers.stopped import Stopped, counter, require_gone
from tests.helpers.targets import Target, end, needs_criu

pytestmark = needs_criu

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


def test_weights_that_change_during_the_restore(tmp_path: Path, weights: str, commands: Stopped) -> None:
    with counter(tmp_path, weights) as one:
        commands.told("create", "warm", "--pid", str(one.pid))
        require_gone(one)
        change = f"run:printf x | dd of={weights} conv=notrunc status=none"
        done = commands.stop("checkpoint.criu:restore@after", change, "restore", "warm")
        assert done.returncode == 4, done.stderr
        wait_until(lambda: start_ticks(one.pid) is None, "what was restored is gone")
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
    wait_until(lambda: start_ticks(one.pid) is None, "what was restored is gone")
    commands.require_consistent("warm")
    commands.told("restore", "warm")
    assert one.ask().split()[0] == "2"


def test_a_restore_told_to_end_when_it_is_too_late(dumped: tuple[Stopped, Target]) -> None:
    """Whoever has asked for it learns the pid of what runs now."""
    commands, one = dumped
    done = commands.stop("weightfs.cli.snapshotting:_say_restored@before", "term", "restore", "warm")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pid"] == one.pid
    assert one.ask().split()[0] == "2"


@pytest.mark.parametrize("pattern", ["restore.log", "restored.pid"])
def test_criu_is_killed_while_it_restores(pattern: str, dumped: tuple[Stopped, Target]) -> None:
    commands, one = dumped
    done = commands.stop(f"criu@{pattern}", "criu", "restore", "warm")
    assert done.returncode == 1, done.stderr
    assert not commands.left()
    wait_until(lambda: start_ticks(one.pid) is None, "what was restored is gone")
    commands.require_consistent("warm")
