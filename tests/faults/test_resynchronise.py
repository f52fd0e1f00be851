"""What changed while nobody watched: between the death of one daemon and the word to go for the next.

The supervisor is stopped in between, so that the source can change in peace.
"""

from __future__ import annotations

import glob
import mmap
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.models import write
from tests.helpers.mounting import Daemon, Mount, Mounter, both_engines, wait_until

SOON_S = 20.0


@pytest.fixture
def source(tmp_path: Path) -> str:
    source = f"{tmp_path}/source"
    write(f"{source}/folder/file", b"a" * 10_000)
    write(f"{source}/folder/other", b"o")
    write(f"{source}/gone/file", b"g")
    write(f"{source}/top", b"t")
    return source


@contextmanager
def unwatched(mount: Mount) -> Iterator[None]:
    """Within the block nobody serves; behind it somebody does."""
    daemon = Daemon(mount.daemon_pid())
    mount.supervisor.signal(signal.SIGSTOP)
    try:
        daemon.signal(signal.SIGKILL)
        assert daemon.has_ended(20)
        daemon.close()
        yield
    finally:
        mount.supervisor.signal(signal.SIGCONT)
    assert mount.daemon_pid() != daemon.pid


def believed(mount: Mount) -> None:
    """Have the kernel believe all that it may."""
    tree(mount.mountpoint)
    time.sleep(1.2)  # until the index has it on file; what is not there is told for a second only
    tree(mount.mountpoint)


def tree(root: str) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            entry = os.lstat(os.path.join(folder, name))
            found[os.path.relpath(os.path.join(folder, name), root)] = entry.st_mode, entry.st_size, entry.st_mtime_ns
    return found


def change(source: str) -> None:
    write(f"{source}/.new", b"replaced")
    os.rename(f"{source}/.new", f"{source}/folder/file")
    write(f"{source}/folder/other", b"longer")
    write(f"{source}/folder/added", b"added")
    shutil.rmtree(f"{source}/gone")
    os.chmod(f"{source}/top", 0o600)
    os.rename(f"{source}/top", f"{source}/folder/top")


@both_engines
@pytest.mark.parametrize("how", ["found", "lost"])
def test_nothing_old_is_believed(source: str, mounter: Mounter, engine: str, how: str) -> None:
    """Neither with the predecessor's index, nor without it, where the kernel can forget all names at once."""
    mount = mounter(source, engine)
    believed(mount)
    with open(mount.path("folder/other"), "rb") as held:
        with unwatched(mount):
            change(source)
            if how == "lost":
                for path in glob.glob(f"{mount.state_dir}/index.lmdb*"):
                    os.unlink(path)
        wait_until(lambda: tree(mount.mountpoint) == tree(source), "the changes", timeout_s=SOON_S)
        if how == "found":  # else its number is of an index that is gone
            wait_until(lambda: os.fstat(held.fileno()).st_size == 6, "the size of an open file", timeout_s=SOON_S)
        with open(mount.path("folder/file"), "rb") as file:
            assert file.read() == b"replaced"


@both_engines
def test_a_mapped_file_keeps_its_name(source: str, mounter: Mounter, engine: str) -> None:
    """CRIU finds files in use by the name that /proc/PID/maps gives them."""
    mount = mounter(source, engine)
    believed(mount)
    path = mount.path("folder/file")
    with open(path, "rb") as held, mmap.mmap(held.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[0] == ord("a")
        with unwatched(mount):
            write(f"{source}/folder/added", b"added")
        wait_until(lambda: tree(mount.mountpoint) == tree(source), "the changes", timeout_s=SOON_S)
        with open("/proc/self/maps") as maps:
            (line,) = [line.rstrip("\n") for line in maps if "folder/file" in line]
        assert line.endswith(path)
