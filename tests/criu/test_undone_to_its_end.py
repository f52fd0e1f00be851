"""A signal that ends a command while it undoes what has failed: it is undone all the same."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from checkpoint import control, creation, criu, launch, restoration, runtime
from checkpoint.digest_cache import DigestCache
from checkpoint.errors import CriuError
from checkpoint.processes import start_ticks
from checkpoint.readiness import Readiness
from checkpoint.store import Store
from checkpoint.tools import Tools
from tests.helpers.mounting import wait_until
from tests.helpers.stopped import counter, require_as_before
from tests.helpers.targets import Target, needs_criu, the_criu

pytestmark = needs_criu


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tools]:
    monkeypatch.setenv(runtime.VARIABLE, str(tmp_path / "run"))
    with DigestCache(str(tmp_path / "digests")) as cache:
        yield Tools(criu=the_criu(), cuda=None, cache=cache, state=str(tmp_path))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def interrupted_once(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """A signal comes when `control`'s function is called first; gives its calls."""
    call = getattr(control, name)
    calls: list[str] = []

    def interrupted(who: control.Tree) -> None:
        calls.append(name)
        if len(calls) == 1:
            raise SystemExit(128 + signal.SIGTERM)
        call(who)

    monkeypatch.setattr(control, name, interrupted)
    return calls


def failing_dump(one: Target) -> Callable[..., None]:
    def dump(*_: object, **__: object) -> None:
        os.kill(one.pid, signal.SIGSTOP)
        raise CriuError("was made to fail")

    return dump


@contextmanager
def ended_by_the_signal() -> Iterator[None]:
    with pytest.raises(SystemExit) as ended:
        yield
    assert ended.value.code == 143


def test_a_create(tmp_path: Path, weights: str, store: Store, tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    with counter(tmp_path, weights) as one:
        monkeypatch.setattr(criu, "dump", failing_dump(one))
        calls = interrupted_once(monkeypatch, "resume")
        with ended_by_the_signal():
            creation.create("warm", one.pid, store, tools, creation.CreateOptions())
        assert len(calls) == 2
        require_as_before(one)
    assert not os.listdir(tmp_path / "run/checkpoint")


def test_a_create_of_a_command(store: Store, tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was started for it ends."""
    started: list[int] = []
    start = launch.start

    def noted(*arguments: object) -> object:
        child = start(*arguments)  # type: ignore[arg-type]
        started.append(child.pid)
        return child

    monkeypatch.setattr(launch, "start", noted)
    calls = interrupted_once(monkeypatch, "end_all")
    never = Readiness(file=str(tmp_path / "never"))
    with ended_by_the_signal():
        launch.create_of_command(
            "warm", ["sleep", "1000"], store, tools, creation.CreateOptions(), never, 0.1, log=str(tmp_path / "log")
        )
    assert len(calls) == 2
    wait_until(lambda: start_ticks(started[0]) is None, "it is gone")


def test_a_restore(tmp_path: Path, weights: str, store: Store, tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    with counter(tmp_path, weights) as one:
        creation.create("warm", one.pid, store, tools, creation.CreateOptions())
        one.process.wait(30)
    wait_until(lambda: start_ticks(one.pid) is None, "its pid is free")
    calls = interrupted_once(monkeypatch, "end_all")
    never = Readiness(file=str(tmp_path / "never"))
    with ended_by_the_signal():
        restoration.restore(
            "warm", store, tools, restoration.RestoreOptions(ready=never, timeout_s=5, log=str(tmp_path / "log"))
        )
    assert len(calls) == 2
    wait_until(lambda: start_ticks(one.pid) is None, "it is gone")
