"""The programs and libraries that a process has mapped: found, and found to be others."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint import programs
from checkpoint.digest_cache import DigestCache
from checkpoint.processes import process
from checkpoint.programs import build_id_of, compared, identify, mapped


def libc() -> str:
    return next(path for path in mapped([process(os.getpid())]) if os.path.basename(path).startswith("libc."))


HEAD = Path(libc()).read_bytes()[:3000]


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A copy of one with a build ID."""
    return Path(shutil.copy(libc(), tmp_path / "lib.so"))


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """One without."""
    path = tmp_path / "plain.so"
    path.write_bytes(b"\x7fELF" + bytes(1000))
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[DigestCache]:
    with DigestCache(str(tmp_path / "digests")) as one:
        yield one


def rewrite(path: Path, content: bytes) -> None:
    """As an upgrade does: another file of that name, at the time of the old one."""
    status = path.stat()
    new = path.with_name("new")
    new.write_bytes(content)
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
    new.rename(path)


def test_those_of_a_process() -> None:
    found = mapped([process(os.getpid())])
    assert os.path.realpath("/proc/self/exe") in found
    assert libc() in found
    assert not [path for path in found if path.startswith("[")]


def test_the_build_id_is_what_the_loader_would_say(library: Path, plain: Path) -> None:
    assert len(build_id_of(str(library))) == 40
    assert bytes.fromhex(build_id_of(str(library))) in library.read_bytes()
    assert build_id_of(str(plain)) == ""


def test_a_copy_is_the_same(library: Path, plain: Path, cache: DigestCache) -> None:
    known = identify([str(library), str(plain), "/not/there"], cache=cache)
    assert [(one.path, bool(one.build_id), bool(one.blake3)) for one in known] == [
        (str(library), True, False),
        (str(plain), False, True),
    ]
    for path in (library, plain):
        rewrite(path, path.read_bytes())
    assert compared(known, cache=cache) == []


def test_other_code_of_the_same_size_and_time(library: Path, plain: Path, cache: DigestCache) -> None:
    known = identify([str(library), str(plain)], cache=cache)
    content = library.read_bytes()
    old = bytes.fromhex(build_id_of(str(library)))
    rewrite(library, content.replace(old, old[::-1]))
    rewrite(plain, plain.read_bytes()[:-1] + b"x")
    first, second = compared(known, cache=cache)
    assert (first.what, first.snapshot, first.here) == (
        str(library),
        f"build ID {old.hex()}",
        f"build ID {old[::-1].hex()}",
    )
    assert second.what == str(plain)
    assert second.snapshot.startswith("BLAKE3 ")
    assert first.matters
    assert second.matters


def test_another_size_and_none_at_all(library: Path, plain: Path, cache: DigestCache) -> None:
    known = identify([str(library), str(plain)], cache=cache)
    os.truncate(library, 5000)
    plain.unlink()
    assert [one.here for one in compared(known, cache=cache)] == ["5000 bytes", "No such file or directory"]
    assert [one.what for one in compared(known, cache=cache, has_own_mounts=True)] == [str(library)]


def test_below_another_root(tmp_path: Path, library: Path) -> None:
    (known,) = identify(["/lib.so"], root=str(tmp_path))
    assert known.path == "/lib.so"
    assert compared([known], root=str(tmp_path)) == []
    assert compared([known], root=str(tmp_path / "elsewhere")) != []


def test_what_was_not_touched_is_not_read(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = identify([str(library)])

    def refuse(path: str) -> str:
        raise AssertionError(path)

    monkeypatch.setattr(programs, "build_id_of", refuse)
    assert compared(known) == []


@given(st.binary(max_size=400), st.integers(0, 300), st.integers(0, 3000))
def test_no_file_is_too_broken(tmp_path_factory: pytest.TempPathFactory, noise: bytes, at: int, cut: int) -> None:
    path = tmp_path_factory.getbasetemp() / "broken.so"
    content = bytearray(HEAD)
    content[at : at + len(noise)] = noise
    path.write_bytes(content[: 3000 - cut])
    assert all(one in "0123456789abcdef" for one in build_id_of(str(path)))
