"""Locked parts of files: what smaps, mincore and the limit say of them."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefetch.pins import Pins, _whole_pages
from tests.helpers.page_cache import resident_bytes
from tests.unit.support import python
from weightfs import linux
from weightfs.errors import ShortReadError, UnfitError

PAGE = mmap.PAGESIZE
MIB = 1 << 20
SIZE = 8 * MIB


@pytest.fixture(autouse=True)
def _may_lock() -> None:
    limit = linux.raise_lock_limit()
    if limit is not None and limit < SIZE:
        pytest.skip(f"this machine lacks a limit on locked memory of {SIZE} bytes or more (RLIMIT_MEMLOCK)")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """8 MiB on the disk and not in memory."""
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(SIZE))
    with path.open("rb") as file:
        os.fsync(file.fileno())
    drop(path)
    assert resident_bytes(path) == 0
    return path


def drop(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def locked(path: Path) -> int:
    """Bytes of a file that smaps counts as locked in this process."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = line.endswith(str(path))
        elif ours and line.startswith("Locked:"):
            total += int(line.split()[1]) << 10
    return total


def test_what_is_pinned_survives_and_what_is_released_goes(weights: Path) -> None:
    pins = Pins()
    before = linux.locked_bytes()
    assert pins.pin("model", str(weights), [(0, MIB), (4 * MIB + 1, 100)]) == MIB + PAGE
    assert locked(weights) == linux.locked_bytes() - before == pins.total_bytes == MIB + PAGE
    assert pins.keys() == {"model"}
    resident = resident_bytes(weights)
    assert resident >= MIB + PAGE
    drop(weights)
    assert MIB + PAGE <= resident_bytes(weights) <= resident, "no hint drops it"
    assert pins.release("model") == MIB + PAGE
    assert locked(weights) == pins.total_bytes == 0
    assert linux.locked_bytes() == before
    drop(weights)
    assert resident_bytes(weights) == 0
    assert pins.release("model") == 0


def test_a_descriptor_and_several_files_of_one_key(weights: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.write_bytes(os.urandom(3 * PAGE + 5))
    pins = Pins()
    descriptors = len(os.listdir("/proc/self/fd"))
    with weights.open("rb") as file:
        assert pins.pin("model", file.fileno(), [(PAGE, PAGE)]) == PAGE
        assert os.fstat(file.fileno()), "it stays the caller's"
    assert pins.pin("model", str(second), [(0, 3 * PAGE + 5)]) == 4 * PAGE, "the last page is part of one"
    assert pins.pin("other", str(second), [(0, 1), (1, 0)]) == PAGE
    assert pins.total_bytes == 6 * PAGE
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert pins.release("model") == 5 * PAGE
    assert locked(second) == PAGE
    assert pins.release("other") == PAGE


def test_beyond_the_end_nothing_is_pinned(weights: Path) -> None:
    pins = Pins()
    with pytest.raises(ShortReadError, match="ends at byte 8388608, before byte 8396800") as caught:
        pins.pin("model", str(weights), [(0, PAGE), (SIZE, 2 * PAGE)])
    assert caught.value.path == str(weights)
    assert locked(weights) == pins.total_bytes == 0
    assert not pins.keys()


def test_it_shrinks_between_the_look_and_the_lock(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = linux.lock

    def lock(address: int, nbytes: int) -> None:
        os.truncate(weights, MIB)
        real(address, nbytes)

    monkeypatch.setattr(linux, "lock", lock)
    pins = Pins()
    with pytest.raises(ShortReadError, match="ends at byte 1048576"):
        pins.pin("model", str(weights), [(0, 2 * MIB)])
    assert locked(weights) == pins.total_bytes == 0


def test_it_shrinks_under_a_pin(weights: Path) -> None:
    """In a child: were the mapping touched, SIGBUS would end it."""
    code = """
import os, sys
from prefetch.pins import Pins
pins = Pins()
assert pins.pin("model", sys.argv[1], [(0, 1 << 20)]) == 1 << 20
os.truncate(sys.argv[1], 0)
assert pins.total_bytes == pins.release("model") == 1 << 20
os.truncate(sys.argv[1], 1 << 20)
assert pins.pin("model", sys.argv[1], [(0, 1 << 20)]) == 1 << 20
print("lives")
"""
    done = python(code, str(weights))
    assert (done.returncode, done.stdout) == (0, "lives\n"), done.stderr


@pytest.mark.parametrize("count", [1, 2])
def test_a_limit_that_does_not_suffice(weights: Path, count: int) -> None:
    """In a child of another user, which has no CAP_IPC_LOCK: the soft limit is raised, the hard one holds."""
    code = """
import os, resource, sys
from prefetch.pins import Pins
from weightfs import linux
from weightfs.errors import UnfitError
fd = os.open(sys.argv[1], os.O_RDONLY)
resource.setrlimit(resource.RLIMIT_MEMLOCK, (4096, 1 << 20))
if os.geteuid() == 0:
    os.setresuid(65534, 65534, 65534)
pins = Pins()
assert pins.pin("a", fd, [(0, 1 << 19)]) == 1 << 19
assert resource.getrlimit(resource.RLIMIT_MEMLOCK) == (1 << 20, 1 << 20)
try:
    pins.pin("b", fd, [(part << 20, (1 << 20) // int(sys.argv[2])) for part in range(int(sys.argv[2]))])
except UnfitError as e:
    assert pins.total_bytes == linux.locked_bytes() == 1 << 19
    assert pins.pin("c", fd, [(1 << 20, 1 << 19)]) == 1 << 19
    print(e, "|", e.mend)
"""
    done = python(code, str(weights), str(count))
    assert done.returncode == 0, done.stderr
    assert "can't be locked beside 524288: the limit is 1048576 (RLIMIT_MEMLOCK)" in done.stdout
    assert "LimitMEMLOCK=infinity" in done.stdout
    assert "ulimit -l unlimited" in done.stdout


@pytest.mark.parametrize("name", ["ENOMEM", "EAGAIN", "EPERM"])
def test_the_kernel_refuses_all_the_same(weights: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def lock(address: int, nbytes: int) -> None:
        raise OSError(getattr(errno, name), "refused")

    monkeypatch.setattr(linux, "lock", lock)
    pins = Pins()
    with pytest.raises(UnfitError, match="can't be locked") as caught:
        pins.pin("model", str(weights), [(0, PAGE)])
    assert caught.value.mend is not None
    assert str(weights) not in Path("/proc/self/maps").read_text()


def test_what_is_no_matter_of_locking_is_said_as_it_is(tmp_path: Path) -> None:
    pins = Pins()
    with pytest.raises(FileNotFoundError):
        pins.pin("model", str(tmp_path / "none"), [(0, 1)])
    reader, writer = os.pipe()
    try:
        with pytest.raises((OSError, ShortReadError)):
            pins.pin("model", reader, [(0, 1)])
    finally:
        os.close(reader)
        os.close(writer)


EXTENTS = st.lists(st.tuples(st.integers(0, 64 * PAGE), st.integers(0, 5 * PAGE)), max_size=8)


@given(extents=EXTENTS)
def test_parts_are_whole_pages_that_cover_all(extents: list[tuple[int, int]]) -> None:
    parts = _whole_pages(extents)
    pages = {at for offset, nbytes in parts for at in range(offset, offset + nbytes, PAGE)}
    expected = {
        page * PAGE
        for offset, nbytes in extents
        if nbytes
        for page in range(offset // PAGE, (offset + nbytes - 1) // PAGE + 1)
    }
    assert pages == expected
    assert all(offset % PAGE == 0 and nbytes % PAGE == 0 for offset, nbytes in parts)
    assert all(sum(one) < other[0] for one, other in itertools.pairwise(parts))
    assert sum(nbytes for _, nbytes in parts) == len(pages) * PAGE
