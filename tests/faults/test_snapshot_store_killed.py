"""kill -9 at every call that changes the store: what was under a name is whole, the old one or the new one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint.chunks.keys import MasterKey
from checkpoint.errors import CorruptError
from checkpoint.rotation import rotate
from checkpoint.shelf import CHUNKS, CHUNKS_OPEN
from checkpoint.store import Store
from tests.helpers.dying import MASTER, NEW_MASTER
from tests.helpers.snapshots import add, add_chunked

MOST = 80
"""More calls than any of them makes."""


def copy(stores: list[Store]) -> None:
    """Have all be as the first."""
    for store in stores[1:]:
        shutil.copytree(stores[0].path, store.path)


@pytest.mark.parametrize("action", ["create", "replace", "remove", "chunked create", "chunked replace"])
def test_the_store_is_whole_wherever_it_is_killed(tmp_path: Path, action: str) -> None:
    before, after = (None if "create" in action else 0), (None if action == "remove" else 1)
    add_one = add_chunked if "chunked" in action else add
    stores = [Store(str(tmp_path / str(number))) for number in range(MOST)]
    add_one(stores[0], "bystander", generation=7)
    if before is not None:
        add_one(stores[0], "warm", generation=before)
    copy(stores)
    command = [sys.executable, "-m", "tests.helpers.dying", str(tmp_path), action]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    last = int(done.stdout)
    found = []
    for store in stores[: last + 1]:
        assert [one.fault for one in store.list() if one.fault] == []
        generations = {one.name: store.verify(one.name).manifest.generation for one in store.list()}
        assert generations.pop("bystander") == 7
        found.append(generations.get("warm"))
        assert set(store.recover()) <= {"warm"}
        assert set(os.listdir(store.path)) <= {"bystander", "warm", CHUNKS_OPEN}
        assert store.recover() == ()
        if os.path.exists(chunks := os.path.join(store.path, CHUNKS_OPEN)):
            assert not [name for name in os.listdir(chunks) if name.startswith(".draft")]
            store.collect(None)
            assert store.verify("bystander").manifest.generation == 7
        # And it can be done again.
        add_one(store, "warm", replace=True, generation=2)
        assert store.verify("warm").manifest.generation == 2
    # First the old state, from some call on the new one, and never anything else.
    assert found == sorted(found, key=lambda one: one == after)
    assert set(found) == {before, after}
    assert len(found) > 8


def test_chunks_are_whole_wherever_their_collection_is_killed(tmp_path: Path) -> None:
    stores = [Store(str(tmp_path / str(number))) for number in range(40)]
    add_chunked(stores[0], "warm", images={"pages-1.img": os.urandom(1 << 16)}, generation=7)
    add_chunked(stores[0], "other", images={"pages-1.img": os.urandom(1 << 16)})
    stores[0].remove("other")
    copy(stores)
    command = [sys.executable, "-m", "tests.helpers.dying", str(tmp_path), "collect"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    for store in stores[: int(done.stdout) + 1]:
        assert store.verify("warm").manifest.generation == 7
        store.collect(None)
        assert sum(name.endswith(".pack") for name in os.listdir(os.path.join(store.path, CHUNKS_OPEN))) == 1
        assert store.verify("warm").manifest.generation == 7


def test_one_of_both_keys_opens_everything_wherever_a_change_of_keys_is_killed(tmp_path: Path) -> None:
    stores = [Store(str(tmp_path / str(number))) for number in range(MOST)]
    for name in ("warm", "other"):
        add_chunked(stores[0], name, master=MASTER, images={"pages-1.img": os.urandom(1 << 14)})
    add_chunked(stores[0], "open", images={"pages-1.img": os.urandom(1 << 14)})
    add(stores[0], "plain")
    copy(stores)
    command = [sys.executable, "-m", "tests.helpers.dying", str(tmp_path), "rotate"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    last = int(done.stdout)
    assert last > 20
    found = []
    for store in stores[: last + 1]:
        assert [one.fault for one in store.list() if one.fault] == []
        found.append([key for key in (MASTER, NEW_MASTER) if opens(store, key)])
        # With the key that opens it a snapshot can be made and removed, and the change be done again.
        (key,) = found[-1]
        add_chunked(store, "meanwhile", master=key)
        store.remove("meanwhile")
        store.collect(key)
        assert rotate(store, MASTER, NEW_MASTER).faults == {}
        assert opens(store, NEW_MASTER)
        assert not opens(store, MASTER)
        store.verify("open")
        store.verify("plain")
        assert sorted(os.listdir(os.path.join(store.path, "warm"))) == ["manifest.json", "recipes"]
        assert not [name for name in os.listdir(os.path.join(store.path, CHUNKS)) if name.startswith(".")]
    assert found == sorted(found, key=lambda one: one == [NEW_MASTER])
    assert found[0] == [MASTER]
    assert found[-1] == [NEW_MASTER]


def opens(store: Store, key: MasterKey) -> bool:
    """Whether a key opens both snapshots; one alone would be half of the store."""
    opened = []
    for name in ("warm", "other"):
        try:
            store.verify(name, key)
        except CorruptError:
            continue
        opened.append(name)
    assert len(opened) in (0, 2)
    return bool(opened)


def test_what_is_alive_is_not_left_over(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    program = (
        "import sys\nfrom checkpoint.store import Store\n"
        "draft = Store(sys.argv[1]).begin('warm')\nprint(draft.folder, flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, store.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        folder = process.stdout.readline().strip()
        assert store.recover() == ()
        assert os.path.isdir(folder)
        process.kill()
        process.wait()
        assert store.recover() == ("warm",)
        assert not os.path.exists(folder)
