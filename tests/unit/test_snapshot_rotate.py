"""`weightfs snapshot rotate`: another key for a store, and what is in its way."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from checkpoint import rotation
from checkpoint.chunks import rotating
from checkpoint.chunks.keys import MasterKey
from checkpoint.contents import Vault, key_id
from checkpoint.errors import CorruptError
from checkpoint.store import Store
from tests.helpers.snapshots import add, add_chunked
from weightfs.cli.main import app

OLD, NEW, THIRD = (MasterKey(secret=bytes(range(first, first + 32))) for first in range(3))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    for number, key in enumerate((OLD, NEW, THIRD)):
        path = tmp_path / f"key{number}"
        path.write_bytes(key.secret)
        path.chmod(0o600)
    return Store(str(tmp_path / "store"))


def run(store: Store, old: int, new: int, *arguments: str) -> Result:
    folder = os.path.dirname(store.path)
    keys = ["--key-file", f"{folder}/key{old}", "--new-key-file", f"{folder}/key{new}"]
    return CliRunner().invoke(app, ["snapshot", "rotate", *keys, "--store", store.path, *arguments])


def told(store: Store, old: int, new: int, *, code: int = 0) -> dict[str, Any]:
    result = run(store, old, new, "--json")
    assert result.exit_code == code, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def test_the_new_key_opens_everything_and_the_old_one_nothing(store: Store) -> None:
    for name in ("one", "two"):
        add_chunked(store, name, master=OLD, images={"pages-1.img": name.encode() * 9000})
    add_chunked(store, "open")
    add(store, "plain")
    before = {path: path.stat().st_size for path in Path(store.path).rglob("*") if path.is_file()}
    document = told(store, 0, 1)
    assert document == {"schema": 1, "key": NEW.id.hex(), "snapshots": 2, "packs": 2, "failed": []}
    assert {path: path.stat().st_size for path in Path(store.path).rglob("*") if path.is_file()} == before
    for name in ("one", "two"):
        store.verify(name, NEW)
        assert key_id(store.open(name)) == NEW.id.hex()
        with pytest.raises(CorruptError, match="encrypted with the key"):
            store.verify(name, OLD)
    store.verify("open")
    store.verify("plain")
    assert told(store, 0, 1)["snapshots"] == 2, "done again"
    assert told(store, 1, 2)["snapshots"] == 2
    assert "2 snapshots and 2 packs have the key" in run(store, 2, 0).stdout
    store.verify("one", OLD)
    store.remove("one")
    assert store.collect(OLD).removed == 1


def test_what_reads_goes_on(store: Store) -> None:
    made = add_chunked(store, "one", master=OLD)
    vault = Vault(store.path, OLD)
    with store.lock("one", shared=True):
        contents = vault.open(made)
        assert told(store, 0, 1)["snapshots"] == 1
        assert all(vault.packs.get(id_) for id_ in contents.chunks())


def test_it_is_refused_while_a_snapshot_is_made_or_removed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotating, "_WAIT_S", 0.0)
    monkeypatch.setattr(rotation, "_IN_USE_S", 0.0)
    add_chunked(store, "one", master=OLD)
    with Vault(store.path, OLD).packs.begin(threads=0):
        result = run(store, 0, 1)
    assert (result.exit_code, "a snapshot is being made" in result.stderr) == (75, True)
    with store.lock("one"):
        assert run(store, 0, 1).exit_code == 75
    store.verify("one", OLD)
    assert run(store, 0, 1).exit_code == 0
    store.verify("one", NEW)


def test_neither_key_of_a_store(store: Store) -> None:
    add_chunked(store, "one", master=OLD)
    assert run(store, 1, 2).exit_code == 4
    store.verify("one", OLD)
    assert run(store, 0, 0).exit_code == 2
    assert run(store, 0, 1, "--key-env", "KEY").exit_code == 2
    shutil.rmtree(store.path)
    add_chunked(store, "open")
    result = run(store, 0, 1)
    assert (result.exit_code, "nothing that is encrypted" in result.stderr) == (1, True)


def test_a_damaged_snapshot_is_named_and_the_others_have_the_new_key(store: Store) -> None:
    bad = add_chunked(store, "bad", master=OLD)
    add_chunked(store, "good", master=OLD)
    unread = add_chunked(store, "unread", master=OLD)
    Path(unread.folder, "manifest.json").write_bytes(b"of a newer version")
    Path(store.path, "stray").write_bytes(b"")
    content = Path(bad.recipes).read_bytes()
    Path(bad.recipes).write_bytes(b"x" + content[1:])
    document = told(store, 0, 1, code=4)
    assert document["snapshots"] == 2
    assert len(document["failed"]) == 1
    assert bad.recipes in document["failed"][0]
    store.verify("good", NEW)
    assert key_id(unread) == NEW.id.hex()
