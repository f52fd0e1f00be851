"""kill -9 at every call that changes the store: what was under a name is whole, the old one or the new one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoint.store import Store
from tests.helpers.snapshots import add, manifest_of

MOST = 60
"""More calls than any of them makes."""


@pytest.mark.parametrize("action", ["create", "replace", "remove"])
def test_the_store_is_whole_wherever_it_is_killed(tmp_path: Path, action: str) -> None:
    before, after = (None if action == "create" else 0), (None if action == "remove" else 1)
    stores = [Store(str(tmp_path / str(number))) for number in range(MOST)]
    for store in stores:
        add(store, "bystander", generation=7)
        if before is not None:
            add(store, "warm", generation=before)
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
        assert set(os.listdir(store.path)) <= {"bystander", "warm"}
        assert store.recover() == ()
        # And it can be done again.
        with store.begin("warm", replace=True) as draft:
            draft.commit(manifest_of(draft, generation=2))
        assert store.verify("warm").manifest.generation == 2
    # First the old state, from some call on the new one, and never anything else.
    assert found == sorted(found, key=lambda one: one == after)
    assert set(found) == {before, after}
    assert len(found) > 8


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
