"""Processes that make, replace, read and remove snapshots of the same names at once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from checkpoint.store import Store

WORKER = """
import random, sys, time
from checkpoint.errors import RetryError, SnapshotNameError
from checkpoint.store import Store
from tests.helpers.snapshots import add
path, seed, seconds = sys.argv[1:]
choose, store, until = random.Random(seed), Store(path), time.monotonic() + float(seconds)
done = {}
while time.monotonic() < until:
    name, what = choose.choice("ab"), choose.choice(["create", "replace", "read", "read", "remove", "recover", "list"])
    try:
        if what in ("create", "replace"):
            add(store, name, images={f"pages-{i}.img": choose.randbytes(5000) for i in range(choose.randrange(1, 9))},
                replace=what == "replace")
        elif what == "read":
            with store.lock(name, shared=True):
                found = store.open(name)
                for _ in range(3):
                    found.verify()
                    assert store.open(name) == found
        elif what == "remove":
            store.remove(name)
        elif what == "recover":
            assert store.recover() in ((), ("a",), ("b",), ("a", "b"))
        else:
            found = store.list()
            assert [one.name for one in found] in ([], ["a"], ["b"], ["a", "b"])
            assert [one.fault for one in found if one.fault] == []
        what += " done"
    except (RetryError, SnapshotNameError) as e:
        what += " " + e.code
    done[what] = done.get(what, 0) + 1
for what, count in done.items():
    print(what, count, sep="=")
"""


def test_whoever_reads_reads_one_snapshot_to_its_end(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, store.path, str(seed), "5"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(4)
    ]
    told: Counter[str] = Counter()
    for worker in workers:
        out, err = worker.communicate(timeout=60)
        assert worker.returncode == 0, err
        told.update({what: int(count) for what, _, count in (line.rpartition("=") for line in out.splitlines())})
    assert all(told[f"{what} done"] for what in ("create", "replace", "read", "remove", "list")), told
    assert store.recover() == ()
    assert set(os.listdir(store.path)) <= {"a", "b"}
    for one in store.list():
        store.verify(one.name)
