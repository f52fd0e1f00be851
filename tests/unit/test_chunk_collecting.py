"""What pruning, mending and changing keys do with packs that are damaged, and on a disk that fails."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoint.chunks import catalogue, collecting, pack
from checkpoint.chunks.catalogue import Catalogue, GoneError
from checkpoint.chunks.folder import Folder
from checkpoint.chunks.keys import MasterKey
from checkpoint.chunks.packs import Packs
from checkpoint.errors import CheckpointError, CorruptError, RetryError

MASTER, NEW = MasterKey(secret=bytes(range(32))), MasterKey(secret=bytes(range(1, 33)))


@pytest.fixture
def packs(tmp_path: Path) -> Packs:
    return Packs(str(tmp_path / "packs"), MASTER)


def added(packs: Packs, seed: int, count: int = 8) -> list[bytes]:
    """The ids of chunks in a pack of their own."""
    choose = random.Random(seed)
    with packs.begin(threads=0) as writer:
        ids = [writer.add(memoryview(choose.randbytes(3000))) for _ in range(count)]
        writer.commit()
    return ids


def path_of(packs: Packs, seed_first: list[str]) -> Path:
    return next(path for path in Path(packs.folder.path).glob("*.pack") if path.name not in seed_first)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_pack_with_a_damaged_chunk_that_is_needed_stays_as_it_is(packs: Packs) -> None:
    ids = added(packs, 1)
    (path,) = Path(packs.folder.path).glob("*.pack")
    flip(path, pack.START + pack.HEAD_BYTES + 100)
    done = packs.prune(lambda: ids[:2])
    assert list(done.faults) == [path.name]
    assert (done.removed, done.rewritten) == (0, 0)
    with pytest.raises(CorruptError):
        packs.get(ids[0])
    assert len(packs.get(ids[1])) == 3000
    # What is not needed may be damaged.
    assert packs.prune(lambda: ids[1:2]).rewritten == 1
    assert len(packs.get(ids[1])) == 3000


def test_a_pack_that_cannot_be_opened_stays_and_says_why_a_chunk_is_missing(packs: Packs) -> None:
    ids = added(packs, 1)
    (first,) = (path.name for path in Path(packs.folder.path).glob("*.pack"))
    others = added(packs, 2)
    flip(path_of(packs, [first]), 50)
    reader = Packs(packs.folder.path, MASTER)
    assert len(reader.get(ids[0])) == 3000
    with pytest.raises(CorruptError, match="does not begin as what is sealed does"):
        reader.get(others[0])
    done = reader.prune(lambda: ids)
    assert list(done.faults) == [path_of(packs, [first]).name]
    assert done.removed == 0
    assert list(reader.rebuild().faults) == list(done.faults)
    assert list(reader.rotate(NEW).faults) == list(done.faults)
    assert len(Packs(packs.folder.path, NEW).get(ids[0])) == 3000


def count(packs: Packs) -> int:
    return len(list(Path(packs.folder.path).glob("*.pack")))


def test_many_small_packs_become_one(packs: Packs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "_TIERS", (60_000, 480_000))
    ids: list[bytes] = []
    written = []
    for number in range(128):
        ids += added(packs, number, count=1 + number % 3)
        done = packs.prune(lambda: ids)
        assert done.removed == done.rewritten
        written.append(done.rewritten)
        assert count(packs) <= 2 * 7 + 1
    assert written[:8] == [0] * 7 + [8]
    assert sum(written) < 2.5 * 128, "none again and again"
    assert {len(packs.get(id_)) for id_ in ids} == {3000}
    assert packs.prune(lambda: ids).freed_nbytes == 0


def test_a_folder_that_never_stands_still(packs: Packs, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = added(packs, 1)
    looks = []

    def look(self: Catalogue, folder: Folder) -> bool:
        looks.append(folder)
        return False

    with monkeypatch.context() as patch:
        patch.setattr(Catalogue, "_look_up", look)
        with pytest.raises(RetryError, match="change faster"):
            Packs(packs.folder.path, MASTER).get(ids[0])
        assert len(looks) == catalogue.MOST_LOOKS
    monkeypatch.setattr(Catalogue, "get", failing_with(GoneError()))
    with pytest.raises(RetryError, match="moved again and again"):
        packs.get(ids[0])


def failing_with(error: Exception) -> Callable[..., bytes]:
    def call(*_: object) -> bytes:
        raise error

    return call


def test_keys_of_what_is_not_encrypted_cannot_be_changed(tmp_path: Path) -> None:
    packs = Packs(str(tmp_path / "packs"), None)
    added(packs, 1)
    with pytest.raises(ValueError, match="not encrypted"):
        packs.rotate(NEW)


def test_keys_are_changed_with_the_store_s_key_only(packs: Packs) -> None:
    ids = added(packs, 1)
    with pytest.raises(CorruptError, match="encrypted with the key"):
        Packs(packs.folder.path, NEW).rotate(MasterKey(secret=bytes(32)))
    assert packs.rotate(NEW).faults == {}
    assert packs.rotate(MASTER).faults == {}  # and back
    assert len(packs.get(ids[0])) == 3000
    assert packs.rotate(MASTER).faults == {}


def test_the_store_s_key_is_made_anew_from_a_pack(packs: Packs) -> None:
    ids = added(packs, 1)
    key = Path(packs.folder.path, "key")
    for content in (b"", key.read_bytes()[:-1], bytes(148)):
        key.write_bytes(content)
        with pytest.raises(CorruptError):
            Packs(packs.folder.path, MASTER).get(ids[0])
        assert packs.rebuild().chunks == 8
        assert Packs(packs.folder.path, MASTER).digest_key == packs.digest_key
    key.unlink()
    with pytest.raises(CorruptError, match="encrypted with the key"):
        Packs(packs.folder.path, NEW).rebuild()
    assert packs.prune(lambda: ids).removed == 0
    assert added(packs, 1) == ids


def test_a_pack_that_another_host_removed_is_looked_for_again(packs: Packs, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = added(packs, 1)
    packs.get(ids[0])
    whole, stale = os.pread, [True]

    def pread(fd: int, nbytes: int, at: int) -> bytes:
        if stale.pop():
            stale.append(False)
            raise OSError(errno.ESTALE, "Stale file handle")
        stale.append(False)
        return whole(fd, nbytes, at)

    monkeypatch.setattr(os, "pread", pread)
    assert len(packs.get(ids[0])) == 3000


def failing(number: int) -> Callable[..., object]:
    def call(*_: object, **__: object) -> object:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("name", ["pwritev", "fsync", "rename", "unlink", "link"])
def test_on_a_disk_that_fails_what_is_needed_stays(packs: Packs, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    ids = added(packs, 1)
    first = added(packs, 2)
    actions: list[Callable[[], object]] = [
        lambda: packs.prune(lambda: ids[:2]),
        lambda: added(packs, 3),
        lambda: packs.rotate(NEW),
    ]
    failed = 0
    for action in actions:
        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing(errno.EIO))
            try:
                action()
            except CheckpointError as e:
                assert "can't be" in str(e)
                failed += 1
    assert failed >= (name != "link")
    packs.prune(lambda: [*ids[:2], *first])
    assert {len(packs.get(id_)) for id_ in ids[:2]} == {3000}


def test_a_disk_that_cannot_be_read(packs: Packs, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = added(packs, 1)
    packs.get(ids[0])
    monkeypatch.setattr(os, "pread", failing(errno.EIO))
    with pytest.raises(CheckpointError, match="can't be read") as raised:
        packs.get(ids[0])
    assert not isinstance(raised.value, CorruptError)
    monkeypatch.undo()
    monkeypatch.setattr(os, "listdir", failing(errno.EIO))
    with pytest.raises(CheckpointError, match="can't be read"):
        Packs(packs.folder.path, MASTER).get(ids[0])
