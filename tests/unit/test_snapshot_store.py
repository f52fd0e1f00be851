"""The store: what begins, what is published, what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from checkpoint.errors import CorruptError, RetryError, SnapshotNameError
from checkpoint.store import Store
from tests.helpers.snapshots import IMAGES, add, manifest_of


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "var" / "snapshots"))


def test_a_snapshot_is_as_it_was_committed(store: Store) -> None:
    made = add(store, "warm", weights=[], phases={"dump": 0.5})
    found = store.verify("warm")
    assert found == made
    assert found.manifest.phases == {"dump": 0.5}
    assert [file.name for file in found.manifest.files] == sorted(IMAGES)
    assert found.manifest.bytes_logical == sum(map(len, IMAGES.values()))
    assert found.bytes_stored >= found.manifest.bytes_logical
    assert sorted(os.listdir(store.path)) == ["warm"]
    modes = {path: os.stat(path).st_mode & 0o7777 for path in (store.path, found.folder, found.images)}
    assert set(modes.values()) == {0o700}


def test_nothing_shows_before_it_is_complete(store: Store) -> None:
    draft = store.begin("warm")
    assert store.list() == ()
    with pytest.raises(SnapshotNameError):
        store.open("warm")
    draft.abandon()
    draft.abandon()
    assert os.listdir(store.path) == []


def test_a_name_is_taken_once(store: Store) -> None:
    add(store, "warm")
    with pytest.raises(SnapshotNameError, match="already"):
        store.begin("warm")
    first = store.begin("other")
    with pytest.raises(RetryError, match="being made"):
        store.begin("other")
    first.abandon()
    store.begin("other").abandon()


def test_a_replacement_takes_the_name_when_it_is_complete(store: Store) -> None:
    old = add(store, "warm")
    draft = store.begin("warm", replace=True)
    Path(draft.images, "core-1.img").write_bytes(b"new")
    assert store.open("warm").manifest.id == old.manifest.id
    new = draft.commit(manifest_of(draft))
    assert store.verify("warm") == new
    assert new.manifest.id != old.manifest.id
    assert sorted(os.listdir(store.path)) == ["warm"]


def test_a_changed_byte_is_found(store: Store) -> None:
    made = add(store, "warm")
    image = Path(made.images, "pages-1.img")
    content = bytearray(image.read_bytes())
    content[5000] ^= 1
    image.write_bytes(content)
    store.open("warm")
    with pytest.raises(CorruptError) as raised:
        store.verify("warm")
    assert raised.value.path == str(image)


def test_what_is_in_use_is_not_removed(store: Store) -> None:
    add(store, "warm")
    with store.lock("warm", shared=True), store.lock("warm", shared=True):
        with pytest.raises(RetryError):
            store.remove("warm")
        with pytest.raises(RetryError), store.lock("warm"):
            pass
    store.remove("warm")
    assert os.listdir(store.path) == []
    with pytest.raises(SnapshotNameError):
        store.remove("warm")


def test_what_a_dead_process_left_is_removed_and_what_is_being_made_is_not(store: Store) -> None:
    live = store.begin("live")
    os.makedirs(os.path.join(store.path, ".draft.dead.00000000", "images"))
    assert store.recover() == ("dead",)
    live.commit(manifest_of(live))
    assert [one.name for one in store.list()] == ["live"]


def test_what_is_left_of_a_removed_one_goes_with_the_next_snapshot_begun_or_removed(store: Store) -> None:
    left = Path(store.path, ".removed.a.b.00000000")

    def leave() -> None:
        (left / "images").mkdir(parents=True)
        (left / "images" / "pages-1.img").write_bytes(b"left")

    add(store, "warm")
    leave()
    store.begin("another").abandon()
    assert not left.exists()
    leave()
    store.remove("warm")
    assert os.listdir(store.path) == []
    leave()
    assert store.recover() == ("a.b",)
