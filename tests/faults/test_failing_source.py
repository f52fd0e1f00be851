"""Prefetch on real mounts of a source that fails, stands still or takes its time: a FUSE filesystem of our own."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefetch.residency import resident_bytes
from tests.helpers.failing_source import FailingSource, failing
from tests.helpers.models import model_tensors, write, write_safetensors
from tests.helpers.mounting import Mount, Mounter, errno_from, wait_until, weightfs, within
from tests.helpers.versions import make_version
from weightfs.index.history import History
from weightfs.index.store import IndexStore

MIB = 1 << 20
WEIGHTS = "model.safetensors"
WHOLE = 0.98


@pytest.fixture
def source(tmp_path: Path) -> Iterator[FailingSource]:
    """Two models of 46 MB, `a` and `b`."""
    folder = str(tmp_path / "folder")
    for name in ("a", "b"):
        write_safetensors(os.path.join(folder, name, WEIGHTS), model_tensors(4, rows=1 << 15))
        write(os.path.join(folder, name, "config.json"), b"{}")
    with failing(folder, str(tmp_path / "failing")) as made:
        yield made


def in_memory(source: FailingSource, name: str) -> float:
    """The part of a model that is in memory, or on its way there."""
    with open(os.path.join(source.folder, name, WEIGHTS), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        return resident_bytes(file.fileno(), 0, size) / size


def begin(mount: Mount, name: str) -> None:
    """Open a model as a loader does."""
    with open(mount.path(name, "config.json"), "rb") as file:
        file.read()


def prefetch(mount: Mount) -> dict[str, Any]:
    return dict(within(20, mount.live)["prefetch"])


def progress(mount: Mount) -> dict[str, float]:
    """The part of each model that was read, of those being read."""
    active = prefetch(mount)["active"]
    return {one["model"]: (one["filled_bytes"] + one["found_bytes"]) / one["bytes"] for one in active}


def warm(mount: Mount, name: str) -> tuple[int, dict[str, Any]]:
    done = weightfs("warm", mount.path(name), "--json")
    return done.returncode, dict(json.loads(done.stdout)["models"][0])


def test_a_device_that_fails_ends_one_prefetch(source: FailingSource, mounter: Mounter) -> None:
    mount = mounter(source.folder)
    source.order({f"a/{WEIGHTS}": [(20 * MIB, 20 * MIB + 4096, "EIO")]})
    status, said = warm(mount, "a")
    assert status == 1
    assert said["failure"] == f"{WEIGHTS}: Input/output error"
    (failed,) = prefetch(mount)["failed"]
    assert (failed["model"], failed["failure"]) == ("a/model", said["failure"])
    assert f"failed     a/model: {said['failure']}" in weightfs("status", mount.mountpoint).stdout
    assert warm(mount, "b")[1]["failure"] is None
    with open(mount.path("a", WEIGHTS), "rb") as file:
        assert errno_from(lambda: os.pread(file.fileno(), 4096, 20 * MIB)) == errno.EIO
        assert len(os.pread(file.fileno(), 4096, 0)) == 4096
    source.order()
    status, said = warm(mount, "a")
    assert (status, said["failure"]) == (0, None)
    assert said["filled_bytes"] + said["found_bytes"] == said["bytes"]
    assert prefetch(mount)["failed"] == []


STALLED_S = 8.0
IMPATIENT = {
    "service.py": [
        (
            "from prefetch.budget import",
            f"import prefetch.underway as _\n_.STALLED_S = {STALLED_S}\nfrom prefetch.budget import",
        )
    ]
}
"""Edits that have a daemon give up sooner than after 30 s."""


def test_a_device_that_stands_still_ends_one_prefetch(
    source: FailingSource, mounter: Mounter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as during:
        during.setenv("PYTHONPATH", make_version(f"{tmp_path}/impatient", IMPATIENT))
        mount = mounter(source.folder)
    source.order({f"a/{WEIGHTS}": [(20 * MIB, 20 * MIB + 4096, "hang")]})
    began = time.monotonic()
    begin(mount, "a")
    wait_until(lambda: progress(mount).get("a/model", 0) > 0.5, "what can be read is read")
    assert warm(mount, "b")[1]["failure"] is None, "while the other stands still"
    (failed,) = wait_until(lambda: prefetch(mount)["failed"], "it is given up", timeout_s=40)
    assert time.monotonic() - began >= STALLED_S - 0.5
    assert f"no byte came for {STALLED_S:g} s: the source does not answer" in failed["failure"]
    assert prefetch(mount)["active"] == []
    assert within(20, lambda: sorted(os.listdir(mount.mountpoint))) == ["a", "b"]
    status, said = warm(mount, "a")
    assert status == 1, "nobody waits for it"
    assert "the source does not answer" in said["failure"]
    source.order()
    wait_until(lambda: warm(mount, "a")[0] == 0, "it goes on when the source does")


def write_large(path: str, layers: int, layer_bytes: int) -> None:
    """Weights that are zeros and take no room: a model of which the filler has many reads to make."""
    tensors = {
        f"model.layers.{n}.a": {
            "dtype": "U8",
            "shape": [layer_bytes],
            "data_offsets": [n * layer_bytes, (n + 1) * layer_bytes],
        }
        for n in range(layers)
    }
    header = json.dumps(tensors).encode()
    write(path, len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + layers * layer_bytes)


def test_two_models_that_are_opened_at_once_share(tmp_path: Path) -> None:
    folder = str(tmp_path / "folder")
    for name in ("a", "b"):
        write_large(os.path.join(folder, name, WEIGHTS), 8, 32 * MIB)
        write(os.path.join(folder, name, "config.json"), b"{}")
    with failing(folder, str(tmp_path / "failing")) as source, Mounter(str(tmp_path)) as mounts:
        mount = mounts(source.folder)
        source.order(delay_s=0.02)
        begin(mount, "a")
        begin(mount, "b")
        wait_until(lambda: len(progress(mount)) == 2, "both are being read")
        seen = [progress(mount)]
        while len(seen[-1]) == 2:
            seen.append(progress(mount))
    together = [(one["a/model"], one["b/model"]) for one in seen[:-1]]
    # Who came first has all threads for a moment; from when the other's first reads are back they take turns.
    first = next(number for number, one in enumerate(together) if min(one) > 0.1)
    gained = [last - begun for begun, last in zip(together[first], together[-1], strict=True)]
    assert len(together) - first >= 10
    assert min(gained) >= 0.3, "they were seen at work together"
    assert min(gained) / max(gained) >= 0.75, together


def opened_every(state: str, source: str, name: str, every_s: float) -> None:
    index = IndexStore(state, source)
    for turn in range(50, 0, -1):
        History(index.database).note(name, time.time() - turn * every_s)
    index.close()


def test_what_is_foretold_gives_way_and_goes_on(source: FailingSource, mounter: Mounter, tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    opened_every(state, source.folder, "a/model", 600)
    source.order(delay_s=0.1)
    mount = mounter(source.folder, state_dir=state)
    wait_until(lambda: 0 < progress(mount).get("a/model", 0) < 0.5, "a is being read")
    begin(mount, "b")
    wait_until(lambda: "b/model" in progress(mount), "b is being read")
    wait_until(lambda: progress(mount).keys() <= {"b/model"}, "a has given way")

    def outcome() -> str | None:
        (load,) = [one for one in mount.control("timeline")["loads"] if one["model"] == "a/model"]
        assert load["trigger"] == "predicted"
        return str(load["outcome"]) if load["outcome"] else None

    assert wait_until(outcome, "its last reads end") == "memory was short, or somebody wanted a model"
    source.order()
    wait_until(lambda: not progress(mount), "b has been read")

    wait_until(lambda: in_memory(source, "a") >= WHOLE, "a goes on", timeout_s=60)
    assert prefetch(mount)["failed"] == []


def test_a_successor_foretells_the_same(source: FailingSource, mounter: Mounter, tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    opened_every(state, source.folder, "a/model", 600)
    source.order(delay_s=0.2)
    mount = mounter(source.folder, state_dir=state)
    wait_until(lambda: progress(mount).get("a/model", 0) > 0, "a is being read")
    dead = mount.kill_daemon()
    wait_until(lambda: mount.daemon_pid() != dead, "a successor serves")
    wait_until(lambda: progress(mount).get("a/model", 0) > 0, "it reads a")
    source.order()
    wait_until(lambda: in_memory(source, "a") >= WHOLE, "it has read a", timeout_s=60)
