"""The point at which a process says that it is warm, from inside the process."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from checkpoint import client, points, runtime
from checkpoint.client import on_restore, on_snapshot, snapshot_point
from tests.helpers.mounting import wait_until


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in ("_before", "_after"):
        monkeypatch.setattr(client, name, [])
    monkeypatch.setattr(client, "_passed", set())
    monkeypatch.setenv(runtime.VARIABLE, str(tmp_path))
    made = points.make()
    monkeypatch.setenv(points.VARIABLE, made)
    return made


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


def test_nobody_watches(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(points.VARIABLE)
    assert snapshot_point() == "unwatched"
    monkeypatch.setenv(points.VARIABLE, f"{folder}/gone")
    assert snapshot_point() == "unwatched"


@pytest.mark.parametrize("state", ["continued", "restored"])
def test_it_waits_until_it_is_let_go(folder: str, pool: ThreadPoolExecutor, state: str) -> None:
    called: list[str] = []
    on_snapshot(lambda: called.append("first registered"))
    on_snapshot(lambda: called.append("last registered"))
    on_restore(lambda: called.append("after"))
    waits = pool.submit(snapshot_point, "warm")
    wait_until(lambda: points.reached(folder), "it says that it is warm")
    assert points.reached(folder) == "warm"
    assert not waits.done()
    points.let_go(folder, state)
    assert waits.result(10) == state
    assert called == ["last registered", "first registered"] + ["after"] * (state == "restored")


def test_a_later_point_is_passed(folder: str, pool: ThreadPoolExecutor) -> None:
    """Nobody would let it go."""
    waits = pool.submit(snapshot_point)
    wait_until(lambda: points.reached(folder), "it says that it is warm")
    points.let_go(folder, "continued")
    waits.result(10)
    later: list[str] = []
    thread = threading.Thread(target=lambda: later.append(snapshot_point("another")), daemon=True)
    thread.start()
    thread.join(10)
    assert later == ["unwatched"]


def test_who_watched_gives_up(folder: str, pool: ThreadPoolExecutor) -> None:
    waits = pool.submit(snapshot_point)
    wait_until(lambda: points.reached(folder), "it says that it is warm")
    points.dismiss(folder)
    assert waits.result(10) == "continued"


def test_the_folder_of_a_process_that_was_let_go_goes_after_it(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(points.VARIABLE)

    def swept(age_s: float) -> bool:
        then = time.time() - age_s
        os.utime(os.path.join(folder, "go"), (then, then))
        points.sweep()
        return not os.path.exists(folder)

    points.sweep()
    assert os.path.exists(folder), "its process may be yet to start"
    points.let_go(folder, "restored")
    environment = os.environ | {points.VARIABLE: folder}
    with subprocess.Popen(["sleep", "infinity"], env=environment) as process:
        wait_until(lambda: points.users(folder) == [process.pid], "its environment shows")
        assert not swept(3600)
        process.kill()
    assert not swept(1), "it may not have read that it may go on"
    assert swept(3600)
    points.sweep()


def test_points_that_were_never_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(runtime.VARIABLE, str(tmp_path / "absent"))
    points.sweep()


def test_without_room_for_a_word_the_process_goes_on_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(runtime.VARIABLE, str(tmp_path / "run"))
    folder = points.make()
    Path(folder, "ready").write_text('{"name": "warm", "pid": 1}')

    def full(folder: str, state: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(points, "let_go", full)
    points.dismiss(folder)
    assert not os.path.exists(folder), "which a process that waits there takes for an end of it"
