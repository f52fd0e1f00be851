"""What was opened before is read before it is opened again, on real mounts."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.fuse.test_prefetch import COLD, WHOLE, make_cold, resident, use
from tests.helpers.models import model_tensors, write, write_safetensors
from tests.helpers.mounting import Mount, Mounter, wait_until, weightfs
from weightfs.index.history import History
from weightfs.index.store import IndexStore

MINUTE = 60.0


@pytest.fixture
def source(tmp_path: Path) -> str:
    """Two models, `a` and `b`."""
    source = str(tmp_path / "source")
    for name in ("a", "b"):
        write_safetensors(os.path.join(source, name, "model.safetensors"), model_tensors(4, rows=2048))
        write(os.path.join(source, name, "config.json"), b"{}")
    return source


def weights(source: str, name: str) -> str:
    return os.path.join(source, name, "model.safetensors")


@contextmanager
def history(state: str, source: str) -> Iterator[History]:
    """The history in a state folder that no mount uses."""
    index = IndexStore(state, source)
    yield History(index.database)
    index.close()


def opened_every(state: str, source: str, name: str, every_s: float, *, times: int = 50) -> None:
    with history(state, source) as past:
        for turn in range(times, 0, -1):
            past.note(name, time.time() - turn * every_s)


def predicted(mount: Mount) -> dict[str, Any]:
    return dict(mount.live()["prefetch"]["predicted"])


def test_a_model_opened_every_ten_minutes_is_there_before_it_is_opened(
    source: str, mounter: Mounter, tmp_path: Path
) -> None:
    state = str(tmp_path / "state")
    opened_every(state, source, "a/model", 10 * MINUTE)
    make_cold(source)
    mount = mounter(source, state_dir=state)
    wait_until(lambda: resident(weights(source, "a")) >= WHOLE, "a is in memory", timeout_s=60)
    wait_until(lambda: not mount.live()["prefetch"]["active"], "it was read")
    assert resident(weights(source, "b")) <= COLD
    said = predicted(mount)
    assert [one["model"] for one in said["models"]] == ["a/model"]
    assert said["models"][0]["probability"] > 0.9
    assert said["read_bytes"] >= 0.9 * os.path.getsize(weights(source, "a"))
    assert (said["used_bytes"], said["wasted_bytes"]) == (0, 0)
    (load,) = mount.control("timeline")["loads"]
    assert (load["model"], load["trigger"], load["outcome"]) == ("a/model", "predicted", "complete")
    assert "foretold   a/model: " in weightfs("status", mount.mountpoint).stdout
    use(mount, "a", "config.json")
    wait_until(lambda: predicted(mount)["used_bytes"] >= 0.9 * said["read_bytes"], "what was foretold is used")


def test_an_open_is_remembered_beyond_the_mount(source: str, mounter: Mounter, tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    mount = mounter(source, state_dir=state)
    use(mount, "a", "config.json")
    use(mount, "a", "model.safetensors")
    assert weightfs("warm", mount.path("b")).returncode == 0
    assert mount.umount().returncode == 0
    assert mount.supervisor.has_ended(20)
    with history(state, source) as past:
        opens = past.opens()
    assert [model for model, _ in opens] == ["a/model"]
    assert abs(opens[0][1] - time.time()) < MINUTE


def test_a_backup_is_not_remembered(source: str, mounter: Mounter, tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    for name in ("c", "d"):
        write_safetensors(os.path.join(source, name, "model.safetensors"), model_tensors(1))
    mount = mounter(source, state_dir=state)
    copied = subprocess.run(["tar", "-C", mount.mountpoint, "-cf", str(tmp_path / "all.tar"), "."], check=False)
    assert copied.returncode == 0
    for name in ("a", "b", "c", "d"):  # one process, no known copier
        use(mount, name, "model.safetensors")
    wait_until(lambda: mount.live()["prefetch"]["walks"] >= 4, "it is known as what it is")
    assert mount.umount().returncode == 0
    assert mount.supervisor.has_ended(20)
    with history(state, source) as past:
        assert past.opens() == []


@pytest.mark.parametrize("options", [("--prefetch", "off"), ("--predict", "off")])
def test_off_foretells_nothing(source: str, mounter: Mounter, tmp_path: Path, options: tuple[str, str]) -> None:
    state = str(tmp_path / "state")
    opened_every(state, source, "a/model", 10 * MINUTE)
    make_cold(source)
    mount = mounter(source, "auto", *options, state_dir=state)
    wait_until(lambda: (mount.live()["indexing"] or {}).get("done"), "it is indexed")
    assert mount.live()["prefetch"]["predicted"] is None
    assert resident(weights(source, "a")) <= COLD


def test_two_mounts_of_a_state_folder_share_the_history(source: str, mounter: Mounter, tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    opened_every(state, source, "a/model", 10 * MINUTE)
    mounts = [mounter(source, state_dir=state) for _ in range(2)]
    for mount in mounts:
        foretold: Callable[[], list[Any]] = functools.partial(lambda one: predicted(one)["models"], mount)
        wait_until(foretold, "it foretells", timeout_s=60)
        assert [one["model"] for one in foretold()] == ["a/model"]
    use(mounts[0], "b", "config.json")
    use(mounts[1], "a", "config.json")
    for mount in mounts:
        assert mount.umount().returncode == 0
        assert mount.supervisor.has_ended(20)
    with history(state, source) as past:
        assert sorted(model for model, _ in past.opens()[-2:]) == ["a/model", "b/model"]


def test_an_open_is_remembered_by_a_daemon_that_hands_over(source: str, mounter: Mounter, tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    mount = mounter(source, state_dir=state)
    use(mount, "a", "config.json")
    wait_until(lambda: mount.live()["prefetch"]["wanted"] == 1, "it is wanted")
    older = mount.daemon_pid()
    os.kill(older, signal.SIGTERM)
    wait_until(lambda: mount.daemon_pid() != older, "another serves")
    wait_until(lambda: predicted(mount)["known"] == 1, "it knows of the open")
    assert mount.umount().returncode == 0
    assert mount.supervisor.has_ended(20)
    with history(state, source) as past:
        assert [model for model, _ in past.opens()] == ["a/model"]
