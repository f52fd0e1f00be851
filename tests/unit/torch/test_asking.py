"""The daemon of a mount is asked for what is loaded from there, and nothing depends on its answer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.models import write
from tests.unit.support import within
from weightfs import mounts
from weightfs.errors import BusyError
from weightfs.torch import asking


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []
    monkeypatch.setattr(asking, "ask", lambda socket, request, timeout_s: found.append((socket, request["path"])))
    return found


def mount(monkeypatch: pytest.MonkeyPatch, path: Path, status: dict[str, Any]) -> str:
    write(str(path / ".weightfs" / "status.json"), json.dumps(status).encode())
    known = [*mounts.mounted(), mounts.Mounted(str(path), "/source", "0:1")]
    monkeypatch.setattr(mounts, "mounted", lambda: known)
    return str(path)


def ask_for(paths: list[str]) -> None:
    thread = asking.ask_for(paths)
    assert thread is not None
    within(20, thread.join)


def test_one_shard_of_each_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[Any]) -> None:
    outer = mount(monkeypatch, tmp_path / "m", {"control_socket": "/outer"})
    inner = mount(monkeypatch, tmp_path / "m" / "in", {"control_socket": "/inner"})
    os.symlink(f"{outer}/a", tmp_path / "link")
    os.mkdir(f"{outer}/a")
    shards = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    ask_for([*(f"{tmp_path}/link/{name}" for name in shards), f"{outer}/b.gguf", f"{inner}/c.safetensors", "/x/d.gguf"])
    assert sorted(asked) == [("/inner", "c.safetensors"), ("/outer", f"a/{shards[0]}"), ("/outer", "b.gguf")]


@pytest.mark.parametrize("fault", ["no socket", "no status", "busy"])
def test_what_can_not_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[Any], fault: str) -> None:
    path = mount(monkeypatch, tmp_path / "m", {"control_socket": None if fault == "no socket" else "/socket"})
    if fault == "no status":
        write(f"{path}/.weightfs/status.json", b"{")
    if fault == "busy":

        def refuse(*_: Any) -> None:
            raise BusyError("somebody else")

        monkeypatch.setattr(asking, "ask", refuse)
    ask_for([f"{path}/a.safetensors"])
    assert asked == []


def test_nothing_on_a_mount(monkeypatch: pytest.MonkeyPatch, asked: list[Any]) -> None:
    assert asking.ask_for(["/nowhere/a.safetensors"]) is None

    def fail() -> list[mounts.Mounted]:
        raise PermissionError(13, "no")

    monkeypatch.setattr(mounts, "mounted", fail)
    assert asking.ask_for(["/nowhere/a.safetensors"]) is None
    assert asked == []
