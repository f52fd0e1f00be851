"""kill -9 at every call that changes a store's chunks, and processes that add and prune at once: nothing is lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from checkpoint.chunks import collecting, pack, writing
from checkpoint.chunks.packs import Packs
from checkpoint.errors import CorruptError, RetryError
from tests.helpers.dying import MASTER, NEW_MASTER
from tests.helpers.dying_chunks import KEPT, NEW, OLD, PACK_BYTES, fill

MOST = 120
"""More calls than any of them makes."""

WORKER = """
import random, sys, time
from pathlib import Path
from checkpoint.chunks import collecting, pack, writing
from checkpoint.chunks.packs import Packs
from checkpoint.errors import RetryError
from tests.helpers.dying import MASTER
path, seed, seconds = sys.argv[1:]
writing.PACK_BYTES, collecting._WAIT_S = 20_000, 0.5
choose, until, done = random.Random(seed), time.monotonic() + float(seconds), {}
contents = [random.Random(number).randbytes(1500) for number in range(60)]  # the same in every process
reader, roots = Packs(path, MASTER), Path(path).parent / "roots"

def needed():
    found = []
    for root in roots.iterdir():
        try:
            text = root.read_bytes()
        except FileNotFoundError:  # another worker has removed it since, as a snapshot may be
            continue
        found += [text[at : at + 32] for at in range(0, len(text), 32)]
    return found

while time.monotonic() < until:
    what = choose.choice(["add", "add", "read", "read", "prune", "remove"])
    root = roots / f"{seed}-{choose.randrange(3)}"
    try:
        if what == "add":
            with Packs(path, MASTER).begin(threads=1) as writer:
                ids = [writer.add(memoryview(choose.choice(contents))) for _ in range(choose.randrange(1, 20))]
                writer.commit()
                time.sleep(choose.random() / 100)
                (roots.parent / root.name).write_bytes(b"".join(ids))
                (roots.parent / root.name).rename(root)
        elif what == "read" and root.exists():
            text = root.read_bytes()
            for at in range(0, len(text), 32):
                id_ = text[at : at + 32]
                assert pack.digest(reader.digest_key, reader.get(id_)) == id_
        elif what == "prune":
            assert reader.prune(needed).faults == {}
        elif what == "remove":
            root.unlink(missing_ok=True)
        what += " done"
    except RetryError:
        what += " retry"
    done[what] = done.get(what, 0) + 1
for what, count in done.items():
    print(what, count, sep="=")
"""


@pytest.mark.parametrize("action", ["add", "prune", "rebuild", "rotate"])
def test_the_chunks_are_there_wherever_it_is_killed(
    tmp_path: Path, action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "PACK_BYTES", PACK_BYTES)
    fill(str(tmp_path / "original"))
    stores = [tmp_path / "stores" / str(number) for number in range(MOST)]
    for store in stores:
        shutil.copytree(tmp_path / "original", store)
    command = [sys.executable, "-m", "tests.helpers.dying_chunks", str(tmp_path / "stores"), action]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    last = int(done.stdout)
    assert last > 8
    found = []
    for store in stores[: last + 1]:
        found.append(states(store, action))
        # And it can be done again.
        packs = Packs(str(store), MASTER)
        if action == "rotate":
            assert packs.rotate(NEW_MASTER).faults == {}
        live = [pack.digest(packs.digest_key, content) for content in KEPT]
        assert packs.rebuild().lost == {}
        assert packs.prune(lambda live=live: live).faults == {}  # type: ignore[misc]
        assert [packs.get(id_) for id_ in live] == KEPT
        assert sum(path.suffix == ".pack" for path in store.iterdir()) == 1
        assert not [path for path in store.iterdir() if path.name.startswith(".")]
    if action == "rotate":  # the old key, and from some call on the new one
        assert found == sorted(found)
        assert set(found) == {(0,), (1,)}


def states(store: Path, action: str) -> tuple[int, ...]:
    """Which of the keys opens everything that is needed."""
    opens = []
    for number, master in enumerate((MASTER, NEW_MASTER)):
        packs = Packs(str(store), master)
        wanted = KEPT if action == "prune" else OLD
        try:
            for content in wanted:
                assert packs.get(pack.digest(packs.digest_key, content)) == content
        except CorruptError:
            continue
        opens.append(number)
    assert opens
    if action == "add":
        with Packs(str(store), MASTER).begin() as writer:
            for content in NEW:
                writer.add(memoryview(content))
            writer.commit()
    return tuple(opens)


def test_what_one_adds_another_does_not_prune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "_WAIT_S", 0.05)
    path = str(tmp_path / "packs")
    fill(path)
    with Packs(path, MASTER).begin() as writer:
        ids = [writer.add(memoryview(content)) for content in (OLD[0], NEW[0])]
        writer.commit()
        for action in (lambda: Packs(path, MASTER).prune(list), Packs(path, MASTER).rebuild):
            with pytest.raises(RetryError, match="in use"):
                action()
        # Others may add meanwhile.
        with Packs(path, MASTER).begin() as other:
            other.add(memoryview(NEW[1]))
            other.commit()
    assert Packs(path, MASTER).prune(lambda: ids).removed > 0
    reader = Packs(path, MASTER)
    assert [reader.get(id_) for id_ in ids] == [OLD[0], NEW[0]]


def test_an_error_of_who_says_what_is_needed_removes_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / "packs")
    fill(path)
    before = sorted(os.listdir(path))

    def fails() -> list[bytes]:
        raise CorruptError("a snapshot can't be read")

    with pytest.raises(CorruptError, match="a snapshot can't be read"):
        Packs(path, MASTER).prune(fails)
    assert sorted(os.listdir(path)) == before


def test_many_add_read_and_prune_at_once(tmp_path: Path) -> None:
    path = str(tmp_path / "packs")
    fill(path)
    (tmp_path / "roots").mkdir()
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, path, str(seed), "5"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(4)
    ]
    told: Counter[str] = Counter()
    ended = [(*worker.communicate(timeout=100), worker.returncode) for worker in workers]
    for out, err, status in ended:
        assert status == 0, err
        told.update({what: int(count) for what, _, count in (line.rpartition("=") for line in out.splitlines())})
    assert all(told[f"{what} done"] for what in ("add", "read", "prune", "remove")), told
    packs = Packs(path, MASTER)
    for root in (tmp_path / "roots").iterdir():
        text = root.read_bytes()
        for at in range(0, len(text), 32):
            packs.get(text[at : at + 32])
