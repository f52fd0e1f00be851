"""Digests of files, and the cache that keeps files from being read twice."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import blake3
import pytest

from checkpoint import digest_cache, digests
from checkpoint.digest_cache import DigestCache
from checkpoint.digests import Digested, Identity, digest_file, digest_files
from checkpoint.errors import CheckpointError, RetryError


def old(path: Path, content: bytes) -> Digested:
    """A file's digest, as if it had been read ten seconds after it was written."""
    path.write_bytes(content)
    found = digest_file(str(path))
    return Digested(blake3=found.blake3, identity=found.identity, started_ns=found.identity.ctime_ns + 10**10)


@pytest.mark.parametrize(
    "nbytes", [0, 1, 1 << 20, (1 << 20) + 1, 4 << 20, (9 << 20) + 5, (64 << 20) - 1, 64 << 20, (65 << 20) + 7]
)
def test_a_digest_is_that_of_the_bytes(tmp_path: Path, nbytes: int) -> None:
    content = os.urandom(nbytes)
    (tmp_path / "file").write_bytes(content)
    found = digest_file(str(tmp_path / "file"))
    assert found.blake3 == blake3.blake3(content).hexdigest()
    assert found.identity == Identity.of(os.stat(tmp_path / "file"))


def test_short_reads_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(66 << 20)
    (tmp_path / "file").write_bytes(content)
    preadv = os.preadv
    monkeypatch.setattr(digests.os, "preadv", lambda fd, parts, at: preadv(fd, [parts[0][:3_000_001]], at))  # type: ignore[attr-defined]
    assert digest_file(str(tmp_path / "file")).blake3 == blake3.blake3(content).hexdigest()


def test_many_files_are_digested_each_by_itself(tmp_path: Path) -> None:
    paths = {str(tmp_path / str(i)): bytes([i]) * i for i in range(50)}
    for path, content in paths.items():
        Path(path).write_bytes(content)
    found = digest_files(paths)
    assert {path: one.blake3 for path, one in found.items()} == {
        path: blake3.blake3(content).hexdigest() for path, content in paths.items()
    }


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(CheckpointError, match="link"):
        digest_file(str(tmp_path / "link"), follow=False)
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "."):
        with pytest.raises(CheckpointError, match="no regular file"):
            digest_file(str(tmp_path / name))
    with pytest.raises(CheckpointError, match="No such file"):
        digest_files([str(tmp_path / "none")])


@pytest.mark.parametrize("mebibytes", [9, 80])
@pytest.mark.parametrize(
    "change",
    [lambda path: path.write_bytes(b"short"), lambda path: os.truncate(path, 1 << 30), os.utime],
    ids=["rewritten", "grown", "touched"],
)
def test_a_file_that_changes_while_it_is_read_has_no_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object], mebibytes: int
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(mebibytes << 20))
    preadv = os.preadv

    def read(fd: int, parts: list[memoryview], at: int) -> int:
        if at == 4 << 20:
            change(path)
        return preadv(fd, parts, at)

    monkeypatch.setattr(digests.os, "preadv", read)  # type: ignore[attr-defined]
    with pytest.raises(RetryError, match="changed"):
        digest_file(str(path))


def test_what_is_known_stays_known_to_the_next_process(tmp_path: Path) -> None:
    found = old(tmp_path / "weights", b"weights")
    with DigestCache(str(tmp_path / "state" / "digests.db")) as cache:
        assert cache.get(found.identity) is None
        cache.put([found])
    with DigestCache(str(tmp_path / "state" / "digests.db")) as cache:
        assert cache.get(found.identity) == found.blake3
    assert os.stat(tmp_path / "state" / "digests.db").st_mode & 0o777 == 0o600


def test_a_file_rewritten_under_its_old_size_and_mtime_is_not_known(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    found = old(path, b"weights")
    with DigestCache(str(tmp_path / "digests.db")) as cache:
        cache.put([found])
        path.write_bytes(b"WEIGHTS")
        os.utime(path, ns=(found.identity.mtime_ns, found.identity.mtime_ns))
        now = Identity.of(os.stat(path))
        assert (now.inode, now.nbytes, now.mtime_ns) == (
            found.identity.inode,
            found.identity.nbytes,
            found.identity.mtime_ns,
        )
        assert cache.get(now) is None


def test_a_file_that_had_just_changed_is_not_recorded(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"weights")
    found = digest_file(str(path))
    with DigestCache(str(tmp_path / "digests.db")) as cache:
        cache.put([found])
        assert cache.get(found.identity) is None
        for age_ns, known in ((digest_cache.YOUNG_NS - 1, None), (digest_cache.YOUNG_NS, found.blake3)):
            started_ns = found.identity.ctime_ns + age_ns
            cache.put([Digested(blake3=found.blake3, identity=found.identity, started_ns=started_ns)])
            assert cache.get(found.identity) == known


def test_numbers_as_large_as_the_kernel_has_them_are_kept(tmp_path: Path) -> None:
    most = (1 << 64) - 1
    identity = Identity(device=most, inode=most, nbytes=most, mtime_ns=-(1 << 63), ctime_ns=0)
    with DigestCache(str(tmp_path / "digests.db")) as cache:
        cache.put([Digested(blake3="ab" * 32, identity=identity, started_ns=time.time_ns())])
        assert cache.get(identity) == "ab" * 32


def test_the_cache_is_bounded_and_the_longest_unused_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest_cache, "MOST_ROWS", 3)
    day_ns = 86_400 * 10**9
    now_ns = time.time_ns()

    def at(inode: int, days_ago: int) -> Digested:
        identity = Identity(device=1, inode=inode, nbytes=1, mtime_ns=0, ctime_ns=0)
        return Digested(blake3=f"{inode:02x}" * 32, identity=identity, started_ns=now_ns - days_ago * day_ns)

    rows = [at(1, 9), at(2, 8), at(3, 7)]
    with DigestCache(str(tmp_path / "digests.db")) as cache:
        cache.put(rows)
        assert cache.get(rows[0].identity)  # used again, so the second is now the oldest
    with DigestCache(str(tmp_path / "digests.db")) as cache:
        cache.put([at(4, 0)])
        assert [bool(cache.get(row.identity)) for row in rows] == [True, False, True]


def test_a_damaged_cache_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "digests.db"
    found = old(tmp_path / "weights", b"weights")
    path.write_bytes(b"this is no database" * 1000)
    with DigestCache(str(path)) as cache:
        assert cache.get(found.identity) is None
        cache.put([found])
        assert cache.get(found.identity) == found.blake3


def test_a_digest_that_rotted_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "digests.db"
    found = old(tmp_path / "weights", b"weights")
    with DigestCache(str(path)) as cache:
        cache.put([found])
    content = path.read_bytes()
    at = content.index(bytes.fromhex(found.blake3))
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with DigestCache(str(path)) as cache:
        assert cache.get(found.identity) is None


def test_a_database_of_another_shape_is_no_cache(tmp_path: Path) -> None:
    path = tmp_path / "digests.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE digest (something TEXT)")
    connection.close()
    path.chmod(0o600)
    found = old(tmp_path / "weights", b"weights")
    with DigestCache(str(path)) as cache:
        cache.put([found])
        assert cache.get(found.identity) is None


def test_a_cache_that_others_may_write_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "digests.db"
    found = old(tmp_path / "weights", b"weights")
    with DigestCache(str(path)) as cache:
        cache.put([found])
    path.chmod(0o666)
    with DigestCache(str(path)) as cache:
        assert cache.get(found.identity) is None
    path.chmod(0o600)
    tmp_path.chmod(0o777)
    try:
        with DigestCache(str(path)) as cache:
            assert cache.get(found.identity) is None
    finally:
        tmp_path.chmod(0o700)


def test_a_cache_that_is_locked_loses_nothing_but_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest_cache, "_WAIT_S", 0.0)
    path = tmp_path / "digests.db"
    found = old(tmp_path / "weights", b"weights")
    with DigestCache(str(path)) as cache:
        cache.put([found])
        holder = sqlite3.connect(path)
        holder.execute("BEGIN EXCLUSIVE")
        assert cache.get(found.identity) is None
        holder.rollback()
        holder.close()
    with DigestCache(str(path)) as cache:
        assert cache.get(found.identity) == found.blake3
