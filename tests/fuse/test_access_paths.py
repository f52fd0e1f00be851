"""Every way a program may read a file gives the bare file's bytes, and with passthrough none of them reaches us."""

from __future__ import annotations

import concurrent.futures
import ctypes
import errno
import mmap
import os
import random
from collections.abc import Iterator

import pytest

from tests.helpers.models import write
from tests.helpers.mounting import ENGINES, Mount, Mounter, needs_passthrough, refused, tolerating
from tests.helpers.reading import MIB, WAYS, by_direct_read, by_read

SIZE = 16 * MIB + 12_345
DATA = random.Random(1).randbytes(SIZE)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = str(tmp_path_factory.mktemp("source"))
    write(f"{root}/file", DATA)
    with open(f"{root}/holes", "wb") as file:
        file.write(b"x" * 4096)
        file.seek(8 * MIB)
        file.write(b"y" * 4096)
        file.truncate(16 * MIB)
    return root


@pytest.fixture(scope="module", params=ENGINES)
def mount(request: pytest.FixtureRequest, source: str, module_mounter: Mounter) -> Mount:
    return module_mounter(source, request.param)


@pytest.fixture
def fd(mount: Mount) -> Iterator[int]:
    number = os.open(mount.path("file"), os.O_RDONLY)
    yield number
    os.close(number)


@pytest.mark.parametrize("way", WAYS)
def test_same_bytes(fd: int, way: str) -> None:
    assert WAYS[way](fd) == DATA


def test_direct_reads(mount: Mount) -> None:
    """O_DIRECT, aligned as every filesystem wants it, into an aligned buffer."""
    fd = os.open(mount.path("file"), os.O_RDONLY | os.O_DIRECT)
    try:
        assert by_direct_read(fd) == DATA
        with mmap.mmap(-1, 4 * MIB) as buffer:
            for offset in (0, 4096, SIZE // 4096 * 4096):
                with memoryview(buffer) as view, view[:4096] as page:
                    got = os.preadv(fd, [page], offset)
                assert buffer[:got] == DATA[offset : offset + 4096]
    finally:
        os.close(fd)


def test_sixteen_threads_on_one_descriptor(fd: int) -> None:
    def read_some(seed: int) -> int:
        chosen = random.Random(seed)
        for _ in range(50):
            offset, length = chosen.randrange(SIZE), chosen.choice([1, 4096, 65536, MIB])
            assert os.pread(fd, length, offset) == DATA[offset : offset + length]
        return seed

    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        assert list(threads.map(read_some, range(16))) == list(range(16))


def test_many_opens_of_one_file_at_once(mount: Mount) -> None:
    """Buffered, direct and mapped side by side: one backing file serves all."""

    def read_some(seed: int) -> int:
        for turn in range(20):
            direct = (seed + turn) % 3 == 0
            fd = os.open(mount.path("file"), os.O_RDONLY | (os.O_DIRECT if direct else 0))
            try:
                if direct:
                    with mmap.mmap(-1, 65536) as buffer:
                        assert os.preadv(fd, [buffer], turn * 65536) == 65536
                        assert buffer[:] == DATA[turn * 65536 : (turn + 1) * 65536]
                else:
                    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
                        assert mapped[turn * 65536 : turn * 65536 + 100] == DATA[turn * 65536 : turn * 65536 + 100]
                    assert os.pread(fd, 100, seed) == DATA[seed : seed + 100]
            finally:
                os.close(fd)
        return seed

    with concurrent.futures.ThreadPoolExecutor(12) as threads:
        assert list(threads.map(read_some, range(12))) == list(range(12))
    assert mount.live()["open_inodes"] == 1  # this very file


def test_mapping_outlives_its_descriptor(mount: Mount) -> None:
    fd = os.open(mount.path("file"), os.O_RDONLY)
    mapped = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
    os.close(fd)
    with mapped:
        assert mapped[:] == DATA


def test_private_mapping_takes_writes_for_itself(fd: int) -> None:
    with mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
        mapped[5000:5004] = b"mine"
        assert mapped[4990:5010] == DATA[4990:5000] + b"mine" + DATA[5004:5010]
    assert os.pread(fd, 20, 4990) == DATA[4990:5010]
    with pytest.raises(PermissionError):
        mmap.mmap(fd, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def test_executable_mapping(mount: Mount) -> None:
    """As the bare file: loaders of compiled code map weights' neighbours so."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    fd = os.open(mount.path("file"), os.O_RDONLY)
    try:
        address = libc.mmap(None, 4096, mmap.PROT_READ | mmap.PROT_EXEC, mmap.MAP_PRIVATE, fd, 0)
        assert address != ctypes.c_void_p(-1).value
        assert ctypes.string_at(address, 100) == DATA[:100]
        libc.munmap(address, 4096)
    finally:
        os.close(fd)


def test_seek_for_data_and_holes(mount: Mount) -> None:
    """The holes found must be holes: a copy made with them is the file (cp --sparse, tar -S)."""
    fd = os.open(mount.path("holes"), os.O_RDONLY)
    try:
        size, copy, at = 16 * MIB, bytearray(16 * MIB), 0
        with tolerating(errno.ENXIO):  # no data after `at`
            while at < size:
                begin = os.lseek(fd, at, os.SEEK_DATA)
                end = os.lseek(fd, begin, os.SEEK_HOLE)
                assert at <= begin < end <= size
                copy[begin:end] = os.pread(fd, end - begin, begin)
                at = end
        with open(os.path.join(mount.source, "holes"), "rb") as bare:
            assert copy == bare.read()
        with refused(errno.ENXIO):
            os.lseek(fd, size, os.SEEK_DATA)
        assert os.lseek(fd, 0, os.SEEK_END) == size
    finally:
        os.close(fd)


def test_locks(fd: int) -> None:
    """Readers that lock what they read (SQLite, some loaders) can."""
    import fcntl

    fcntl.flock(fd, fcntl.LOCK_SH)
    fcntl.flock(fd, fcntl.LOCK_UN)
    fcntl.lockf(fd, fcntl.LOCK_SH)
    fcntl.lockf(fd, fcntl.LOCK_UN)


@pytest.fixture(scope="module")
def passthrough(source: str, module_mounter: Mounter) -> Mount:
    return module_mounter(source, "passthrough")


@needs_passthrough
@pytest.mark.parametrize("flags", [0, os.O_DIRECT], ids=["buffered", "direct"])
@pytest.mark.parametrize("way", WAYS)
def test_passthrough_reads_never_reach_us(passthrough: Mount, way: str, flags: int) -> None:
    mount = passthrough
    if flags and way in ("by_read", "by_preadv", "by_readv"):
        way = "by_direct_read"
    mount.live()
    before = mount.live()
    idle = mount.live()
    fd = os.open(mount.path("file"), os.O_RDONLY | flags)
    try:
        assert {**WAYS, "by_direct_read": by_direct_read}[way](fd) == DATA
    finally:
        os.close(fd)
    after = mount.live()
    assert after["hints"] == idle["hints"]
    assert after["bytes_read"] - idle["bytes_read"] < 100_000
    # What asking for the state itself costs is the same both times.
    asking = idle["requests"]["read"] - before["requests"]["read"]
    assert after["requests"]["read"] - idle["requests"]["read"] == asking


def test_advice_is_harmless(mount: Mount, fd: int) -> None:
    for advice in (os.POSIX_FADV_WILLNEED, os.POSIX_FADV_SEQUENTIAL, os.POSIX_FADV_RANDOM, os.POSIX_FADV_DONTNEED):
        os.posix_fadvise(fd, 0, 0, advice)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.readahead(fd, ctypes.c_long(0), ctypes.c_size_t(MIB)) == 0
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
        for hint in (mmap.MADV_WILLNEED, mmap.MADV_SEQUENTIAL, mmap.MADV_HUGEPAGE, mmap.MADV_DONTNEED):
            mapped.madvise(hint)
        assert mapped[:] == DATA
    assert by_read(fd) == DATA
