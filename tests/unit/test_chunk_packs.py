"""Chunks are added once, and read as they were; what was not committed is nowhere."""

from __future__ import annotations

import errno
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from checkpoint.chunks import pack, sealing, writing
from checkpoint.chunks.keys import MasterKey
from checkpoint.chunks.packs import Packs
from checkpoint.chunks.sealing import Cipher
from checkpoint.errors import CheckpointError, CorruptError

MASTER = MasterKey(secret=bytes(range(32)))


@pytest.fixture(params=Cipher, ids=lambda cipher: cipher.name)
def packs(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Packs:
    monkeypatch.setattr(sealing, "preferred", lambda: request.param)
    return Packs(str(tmp_path / "packs"), None if request.param is Cipher.NONE else MASTER)


@pytest.mark.parametrize("threads", [0, 2])
def test_what_is_written_is_brought_to_the_disk_meanwhile(
    packs: Packs, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(writing, "_FLUSHED_BYTES", 100_000)
    flushed: list[int] = []
    monkeypatch.setattr(os, "fdatasync", flushed.append)
    ids = added(packs, chunks(1), threads=threads)
    assert len(flushed) >= 3
    assert all(packs.get(id_) == content for id_, content in ids.items())

    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(CheckpointError, match="can't be written: Input/output error"):
        added(packs, chunks(2), threads=threads)


def chunks(seed: int, count: int = 40) -> list[bytes]:
    """Compressible and incompressible ones, of many sizes."""
    choose = random.Random(seed)
    return [
        choose.randbytes(choose.randrange(1, 60_000)) if i % 2 else choose.randbytes(7) * choose.randrange(1, 9000)
        for i in range(count)
    ]


def added(packs: Packs, contents: list[bytes], *, threads: int = 2) -> dict[bytes, bytes]:
    with packs.begin(threads=threads) as writer:
        ids = {writer.add(memoryview(content)): content for content in contents}
        writer.commit()
    return ids


def test_what_was_added_is_read(packs: Packs) -> None:
    ids = added(packs, chunks(1))
    for reader in (packs, Packs(packs.folder.path, packs.folder.master)):
        for id_, content in ids.items():
            assert reader.get(id_) == content
            start = len(content) // 3
            into = bytearray(len(content) - start)
            reader.read(id_, memoryview(into), start)
            assert into == content[start:]
            with pytest.raises(CorruptError, match="has only"):
                reader.read(id_, memoryview(bytearray(len(content))), 1)


@pytest.mark.parametrize("has_many", [True, False])
def test_many_are_read_at_once(packs: Packs, has_many: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "_HAS_MANY", has_many)
    monkeypatch.setattr(writing, "PACK_BYTES", 300_000)
    ids = added(packs, chunks(1))
    choose = random.Random(2)
    for count in (0, 1, 2, 30, 100):
        wanted = choose.choices(list(ids), k=count)
        assert [bytes(memoryview(one)) for one in packs.get_all(wanted)] == [ids[id_] for id_ in wanted]
    with pytest.raises(CorruptError, match="is missing"):
        packs.get_all([*ids, bytes(32)])
    later = added(Packs(packs.folder.path, packs.folder.master), chunks(3, 2))
    assert [bytes(memoryview(one)) for one in packs.get_all(list(later))] == list(later.values())
    for path in Path(packs.folder.path).glob("*.pack"):
        content = bytearray(path.read_bytes())
        for at in range(9000, len(content), 5000):
            content[at] ^= 1
        path.write_bytes(content)
    with pytest.raises(CorruptError):
        packs.get_all(list(ids))


def test_only_what_is_new_is_stored(packs: Packs) -> None:
    contents = chunks(2)
    first = added(packs, contents[:20])
    nbytes = {path.name: path.stat().st_size for path in Path(packs.folder.path).iterdir()}
    with packs.begin() as writer:
        ids = [writer.add(memoryview(content)) for content in contents[10:] * 2]
        done = writer.commit()
    assert ids[:10] == list(first)[10:]
    assert (done.chunks, done.new_chunks) == (60, 20)
    assert done.nbytes == 2 * sum(map(len, contents[10:]))
    assert done.new_nbytes == sum(map(len, contents[20:]))
    after = {path.name: path.stat().st_size for path in Path(packs.folder.path).iterdir()}
    assert after.items() > nbytes.items()
    assert len(after) == len(nbytes) + 2
    added_nbytes = sum(after.values()) - sum(nbytes.values())
    assert done.stored_nbytes < added_nbytes < done.stored_nbytes + 12_000
    for id_, content in zip(ids, contents[10:], strict=False):  # by what had been looked up before
        assert packs.get(id_) == content


def test_nothing_is_written_where_nothing_is_new(packs: Packs) -> None:
    added(packs, chunks(3))
    before = os.listdir(packs.folder.path)
    added(packs, chunks(3))
    assert os.listdir(packs.folder.path) == before


def test_what_was_not_committed_is_nowhere(packs: Packs) -> None:
    with packs.begin() as writer:
        id_ = writer.add(memoryview(b"a chunk"))
    assert os.listdir(packs.folder.path) == ["key"]
    with pytest.raises(CorruptError, match="is missing"):
        packs.get(id_)
    with pytest.raises(CheckpointError):
        writer.add(memoryview(b"another"))


def test_where_nothing_is(tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match="there are no chunks"):
        Packs(str(tmp_path / "none"), MASTER).get(bytes(32))


@pytest.mark.parametrize("content", [b"", bytes((16 << 20) + 1)])
def test_what_is_no_chunk(packs: Packs, content: bytes) -> None:
    with packs.begin() as writer, pytest.raises(ValueError, match="a chunk has"):
        writer.add(memoryview(content))


def test_many_threads_and_many_packs(packs: Packs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "PACK_BYTES", 300_000)
    contents = chunks(4, 120) * 2
    buffers = threading.local()

    def add(content: bytes) -> bytes:
        if not hasattr(buffers, "own"):
            buffers.own = bytearray(1 << 20)
        buffers.own[: len(content)] = content  # the same one again and again
        return writer.add(memoryview(buffers.own)[: len(content)])

    with packs.begin(threads=3) as writer, ThreadPoolExecutor(4) as pool:
        ids = list(pool.map(add, contents))
        assert writer.commit().new_chunks == 120
    assert len([name for name in os.listdir(packs.folder.path) if name.endswith(".pack")]) > 3
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(packs.get, ids)) == contents
    assert packs.prefetch(ids) > 300_000
    assert packs.prefetch([bytes(32)]) == 0


def test_no_file_is_readable_by_others(packs: Packs) -> None:
    added(packs, chunks(5))
    assert os.stat(packs.folder.path).st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in Path(packs.folder.path).iterdir()} == {0o600}


def test_nothing_that_was_added_is_in_the_files(tmp_path: Path) -> None:
    packs = Packs(str(tmp_path / "packs"), MASTER)
    marker, noise = b"a secret of the process", random.Random(6).randbytes(40_000)
    added(packs, [marker * 500, noise])
    for path in Path(packs.folder.path).iterdir():
        content = path.read_bytes()
        assert marker not in content
        assert noise[100:200] not in content
        assert MASTER.secret not in content
        assert packs.digest_key not in content


def test_equal_chunks_have_other_ids_in_another_store(tmp_path: Path) -> None:
    stores = [Packs(str(tmp_path / name), MASTER) for name in "ab"]
    assert not set(added(stores[0], chunks(7))) & set(added(stores[1], chunks(7)))


def test_a_full_disk_ends_the_writer(packs: Packs, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = added(packs, chunks(8))

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with packs.begin(threads=1) as writer:
        monkeypatch.setattr(os, "pwritev", full)
        with pytest.raises(CheckpointError, match=r"can't be (written|added)"):  # noqa: PT012  # whichever is first
            for number in range(1000):
                writer.add(memoryview(b"chunk %d" % number))
        with pytest.raises(CheckpointError):
            writer.commit()
        monkeypatch.undo()
    assert len([name for name in os.listdir(packs.folder.path) if name.endswith(".pack")]) == 1
    assert {id_: packs.get(id_) for id_ in ids} == ids


def test_a_write_that_is_cut_short_goes_on(packs: Packs, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwritev

    def short(fd: int, parts: list[bytes], at: int) -> int:
        content = b"".join(parts)
        return whole(fd, [content[: max(1, len(content) // 2)]], at)

    monkeypatch.setattr(os, "pwritev", short)
    ids = added(packs, chunks(9))
    assert {id_: packs.get(id_) for id_ in ids} == ids
