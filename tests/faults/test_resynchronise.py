"""What a successor has to do before it serves: the kernel believes what nobody watched while there was no daemon.

The daemon here watches nothing and lets the kernel believe everything for ten minutes, so that what changes is seen by
no one; a line on its stdin stands for the takeover.
"""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.models import write
from tests.helpers.mounting import Daemon, both_engines, child, detach

UNWATCHED = """
import sys, threading
from weightfs import service
from weightfs.beliefs import resynchronise
from weightfs.config import MountConfig

source, mountpoint, state, engine = sys.argv[1:]
made = []
start = service.Service._start_watching
service.Service._start_watching = lambda self, notifier: made.append((self._index, notifier))

def wait():
    for line in sys.stdin:
        index, notifier = made[0]
        index.flush()  # what is not on file was told for short only
        if line == "lost\\n":
            index.set_aside = ("somewhere", "a test says so")
        resynchronise(index, notifier)
        print("done", dict(notifier.sent), flush=True)

threading.Thread(target=wait, daemon=True).start()
config = MountConfig(
    source=source, mountpoint=mountpoint, state_dir=state, engine=engine, attribute_timeout_s=600.0, watch="off"
)
service.serve(config, lambda document: print("mounted", flush=True))
"""


class Unwatched:
    def __init__(self, source: str, mountpoint: str, process: subprocess.Popen[str]) -> None:
        self.source = source
        self.mountpoint = mountpoint
        self._process = process

    def take_over(self, how: str = "found") -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(how + "\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline().startswith("done")


@contextmanager
def unwatched(tmp_path: Path, engine: str) -> Iterator[Unwatched]:
    source, mountpoint = f"{tmp_path}/source", f"{tmp_path}/mount"
    write(f"{source}/folder/file", b"a" * 10_000)
    write(f"{source}/folder/other", b"o")
    write(f"{source}/gone/file", b"g")
    write(f"{source}/top", b"t")
    os.mkdir(mountpoint)
    with child(UNWATCHED, source, mountpoint, f"{tmp_path}/state", engine) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "mounted\n"
        daemon = Daemon(process.pid)
        try:
            yield Unwatched(source, mountpoint, process)
        finally:
            detach(mountpoint)
            assert daemon.end() is None


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
def test_nothing_old_is_believed(tmp_path: Path, engine: str, how: str) -> None:
    """Neither with the predecessor's index, nor without it, where the kernel can forget all names at once."""
    with unwatched(tmp_path, engine) as mount:
        before = tree(mount.mountpoint)
        assert before == tree(mount.source)
        with open(f"{mount.mountpoint}/folder/other", "rb") as held:
            change(mount.source)
            assert tree(mount.mountpoint) == before, "the test needs a kernel that believes"
            mount.take_over(how)
            assert tree(mount.mountpoint) == tree(mount.source)
            assert os.fstat(held.fileno()).st_size == 6
            with open(f"{mount.mountpoint}/folder/file", "rb") as file:
                assert file.read() == b"replaced"


@both_engines
def test_a_mapped_file_keeps_its_name(tmp_path: Path, engine: str) -> None:
    """CRIU finds files in use by the name that /proc/PID/maps gives them."""
    with unwatched(tmp_path, engine) as mount:
        path = f"{mount.mountpoint}/folder/file"
        with open(path, "rb") as held, mmap.mmap(held.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            assert mapped[0] == ord("a")
            mount.take_over()
            assert tree(mount.mountpoint) == tree(mount.source)
            with open("/proc/self/maps") as maps:
                (line,) = [line.rstrip("\n") for line in maps if "folder/file" in line]
            assert line.endswith(path)
