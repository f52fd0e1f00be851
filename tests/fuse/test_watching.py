"""Changes are told to the kernel: the mounts here let it believe everything for ten minutes, and it never shows."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fuse.test_changes import read, replaced
from tests.helpers.models import model_tensors, write, write_safetensors
from tests.helpers.mounting import (
    Daemon,
    Mount,
    Mounter,
    both_engines,
    child,
    refused,
    wait_until,
    wait_until_settled,
    within,
)

SOON_S = 20.0
ASKING = ("lookup", "getattr", "readdirplus")


def asked(mount: Mount) -> dict[str, int]:
    """How often the kernel has asked for names and attributes."""
    requests = mount.live()["requests"]
    return {kind: requests.get(kind, 0) for kind in ASKING}


def walk(root: str) -> dict[str, os.stat_result]:
    found = {}
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            path = os.path.join(folder, name)
            found[os.path.relpath(path, root)] = os.lstat(path)
    return found


def believing(mounter: Mounter, source: str, engine: str, *options: str) -> Mount:
    """A mount whose kernel asks for nothing any more."""
    config = write(f"{mounter.folder}/believing.toml", b"attribute_timeout_s = 600\n")
    mount = mounter(source, engine, "--config", config, *options)
    mount.live()
    wait_until(lambda: walk(mount.mountpoint) and is_believed(mount), "everything is believed")
    return mount


def is_believed(mount: Mount) -> bool:
    before = asked(mount)
    walk(mount.mountpoint)
    return asked(mount) == before


def soon(condition: Callable[[], Any], what: str) -> None:
    wait_until(condition, what, timeout_s=SOON_S)


def facts(entry: os.stat_result) -> tuple[int, ...]:
    return entry.st_mode, entry.st_nlink, entry.st_uid, entry.st_size, entry.st_mtime_ns, entry.st_ctime_ns


def same(mount: Mount) -> bool:
    """Whether the mount shows what the source holds, all names and attributes."""
    try:
        shown, there = walk(mount.mountpoint), walk(mount.source)
    except FileNotFoundError:  # it went while we walked
        return False
    return {path: facts(entry) for path, entry in shown.items()} == {
        path: facts(entry) for path, entry in there.items()
    }


@pytest.fixture
def source(tmp_path: Path) -> str:
    root = f"{tmp_path}/source"
    write(f"{root}/folder/file", b"a" * 50_000)
    write(f"{root}/folder/other", b"o" * 10)
    write(f"{root}/folder/deep/leaf", b"leaf")
    write(f"{root}/second/file", b"second")
    os.symlink("file", f"{root}/folder/link")
    return root


def append(path: str) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def write_in_place(path: str) -> None:
    with open(path, "r+b") as file:
        file.seek(100)
        file.write(b"b" * 100)


def replace(path: str) -> None:
    write(f"{os.path.dirname(os.path.dirname(path))}/.new", b"replaced")
    os.rename(f"{os.path.dirname(os.path.dirname(path))}/.new", path)


def replace_folder(root: str) -> None:
    os.rename(f"{root}/folder", f"{root}/previous")
    os.rename(f"{root}/second", f"{root}/folder")


def retarget(root: str) -> None:
    os.symlink("other", f"{root}/.link")
    os.rename(f"{root}/.link", f"{root}/folder/link")


CHANGES: dict[str, Callable[[str], object]] = {
    "created": lambda root: write(f"{root}/folder/new", b"new"),
    "created in a new folder": lambda root: write(f"{root}/new/folder/file", b"new"),
    "removed": lambda root: os.unlink(f"{root}/folder/file"),
    "removed with its folder": lambda root: shutil.rmtree(f"{root}/folder"),
    "replaced": lambda root: replace(f"{root}/folder/file"),
    "edited in place": lambda root: write_in_place(f"{root}/folder/file"),
    "appended to": lambda root: append(f"{root}/folder/file"),
    "truncated": lambda root: os.truncate(f"{root}/folder/file", 10),
    "chmod-ed": lambda root: os.chmod(f"{root}/folder/file", 0o600),
    "touched": lambda root: os.utime(f"{root}/folder/file", (1, 1)),
    "folder chmod-ed": lambda root: os.chmod(f"{root}/folder", 0o700),
    "root chmod-ed": lambda root: os.chmod(root, 0o711),
    "renamed": lambda root: os.rename(f"{root}/folder/file", f"{root}/folder/renamed"),
    "moved": lambda root: os.rename(f"{root}/folder/file", f"{root}/second/moved"),
    "moved out": lambda root: os.rename(f"{root}/folder/file", f"{root}-outside"),
    "hard-linked": lambda root: os.link(f"{root}/folder/file", f"{root}/second/link"),
    "folder renamed": lambda root: os.rename(f"{root}/folder", f"{root}/renamed"),
    "folder moved": lambda root: os.rename(f"{root}/folder", f"{root}/second/moved"),
    "folder replaced": replace_folder,
    "symlink retargeted": retarget,
}


@both_engines
@pytest.mark.parametrize("change", CHANGES)
def test_shows_soon(source: str, mounter: Mounter, engine: str, change: str) -> None:
    """All names and attributes, and the bytes of all files, are the source's within a second."""
    mount = believing(mounter, source, engine)
    assert same(mount)
    CHANGES[change](source)
    soon(lambda: same(mount), change)
    for path, entry in walk(source).items():
        if stat.S_ISREG(entry.st_mode):
            assert read(mount.path(path)) == read(f"{source}/{path}"), path


@both_engines
def test_shows_through_what_is_open(source: str, mounter: Mounter, engine: str) -> None:
    """Replaced: the old bytes. Written in place: the new ones, by read and through a mapping. Unlinked: no links."""
    mount = believing(mounter, source, engine)
    path = f"{source}/folder/file"
    shown = mount.path("folder/file")
    with open(shown, "rb", buffering=0) as held, mmap.mmap(held.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert held.read() == mapped[:] == b"a" * 50_000
        write_in_place(path)
        soon(lambda: os.pread(held.fileno(), 100, 100) == b"b" * 100, "by read")
        soon(lambda: mapped[100:200] == b"b" * 100, "through the mapping")
        soon(lambda: os.fstat(held.fileno()).st_mtime_ns == os.stat(path).st_mtime_ns, "its times")
        os.unlink(path)
        soon(lambda: os.fstat(held.fileno()).st_nlink == 0, "no links")
        write(path, b"another file")
        soon(lambda: read(shown) == b"another file", "the new file")
        assert mapped[100:200] == b"b" * 100
        assert os.pread(held.fileno(), 100, 0) == b"a" * 100


@both_engines
def test_written_through_a_mapping(source: str, mounter: Mounter, engine: str) -> None:
    """Nothing tells of such a write before the writer is done: an open hears of it at once, all else then."""
    mount = believing(mounter, source, engine)
    path = f"{source}/folder/file"
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[0:4] = b"mmap"
        mapped.flush()
        assert read(mount.path("folder/file"))[:4] == b"mmap"
        mapped[0:4] = b"done"
    soon(lambda: os.stat(mount.path("folder/file")).st_mtime_ns == os.stat(path).st_mtime_ns, "times")
    assert read(mount.path("folder/file"))[:4] == b"done"


@both_engines
def test_edited_through_a_hard_link_elsewhere(source: str, mounter: Mounter, engine: str, tmp_path: Path) -> None:
    """Made and used where nobody watches: no event tells, and an open hears of it all the same."""
    mount = mounter(source, engine)
    walk(mount.mountpoint)
    time.sleep(1.3)  # beyond the short timeout, so that what the kernel believes now it believes for long
    assert os.stat(mount.path("folder/file")).st_size == 50_000
    os.link(f"{source}/folder/file", f"{tmp_path}/outside")
    append(f"{tmp_path}/outside")
    time.sleep(1.1)
    with open(mount.path("folder/file"), "rb") as file:
        assert os.fstat(file.fileno()).st_size == 50_004
        assert file.read() == b"a" * 50_000 + b"more"
    # Two names: from now on it is asked for every second.
    append(f"{tmp_path}/outside")
    wait_until(lambda: os.stat(mount.path("folder/file")).st_size == 50_008, "size")


@both_engines
def test_a_mapped_file_keeps_its_name(source: str, mounter: Mounter, engine: str) -> None:
    """An edit in place, and everything in doubt, must not make the kernel say `(deleted)` of what a process maps."""
    mount = believing(mounter, source, engine)
    with open(mount.path("folder/file"), "rb") as held, mmap.mmap(held.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[0] == ord("a")
        write_in_place(f"{source}/folder/file")
        os.chmod(f"{source}/folder/file", 0o640)
        soon(lambda: same(mount), "changes")
        write(f"{source}/folder/neighbour", b"new")
        soon(lambda: same(mount), "a neighbour")
        with open("/proc/self/maps") as maps:
            (line,) = [line for line in maps if "folder/file" in line]
        assert line.rstrip("\n").endswith(mount.path("folder/file"))


@both_engines
@pytest.mark.parametrize("how", ["rename", "in place", "chmod"])
def test_viewed_as_a_tensor(tmp_path: Path, mounter: Mounter, engine: str, how: str) -> None:
    """Whoever has the view open hears ESTALE, also for bytes the kernel has cached; the name gives the new content."""
    path, old = f"{tmp_path}/model.safetensors", model_tensors(2, rows=2000)
    write_safetensors(path, old)
    wait_until_settled(path)
    mount = mounter(str(tmp_path), engine)
    walk(mount.mountpoint)
    view = mount.path(".tensors/model/lm_head.weight")
    with open(view, "rb", buffering=0) as held:
        number = os.fstat(held.fileno()).st_ino
        assert held.read() == old["lm_head.weight"].data
        new = old if how == "chmod" else replaced(old)
        if how == "rename":
            write_safetensors(f"{tmp_path}/next", new)
            os.rename(f"{tmp_path}/next", path)
        elif how == "chmod":
            os.chmod(path, 0o600)
        else:
            write_safetensors(path, new)

        def is_stale() -> bool:
            try:
                os.pread(held.fileno(), 4096, 0)
            except OSError:
                return True
            return False

        wait_until(is_stale, "stale", timeout_s=SOON_S)
        with refused(errno.ESTALE):
            os.pread(held.fileno(), 4096, 0)
        wait_until(lambda: read(view) == new["lm_head.weight"].data, "new content")
        assert os.stat(view).st_ino != number


@both_engines
def test_a_storm_leaves_the_mount_answering(source: str, mounter: Mounter, engine: str) -> None:
    """A thousand files a second and more, for three seconds, beside a walk; what it ends with is what is shown."""
    mount = believing(mounter, source, engine)
    made, stop = 0, threading.Event()

    def storm() -> None:
        nonlocal made
        while not stop.is_set():
            write(f"{source}/folder/storm-{made % 3000}", b"x" * (made % 100))
            if made % 3 == 0:
                os.unlink(f"{source}/folder/storm-{made % 3000}")
            made += 1

    thread = threading.Thread(target=storm)
    thread.start()
    slowest = 0.0
    try:
        ends = time.monotonic() + 3
        while time.monotonic() < ends:
            started = time.monotonic()
            within(20, lambda: read(mount.path("second/file")))
            assert within(20, lambda: os.stat(mount.path("folder/deep/leaf"))).st_size == 4
            slowest = max(slowest, time.monotonic() - started)
    finally:
        stop.set()
        thread.join()
    assert made > 1000
    assert slowest < 5
    wait_until(lambda: same(mount), "the same in the end")
    assert mount.live()["watch"]["overflows"] <= 1


@both_engines
def test_a_lost_event_is_no_lost_change(source: str, mounter: Mounter, engine: str) -> None:
    """The kernel's queue overflows while the daemon is stopped: everything is asked for anew."""
    mount = believing(mounter, source, engine)
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    daemon = Daemon(mount.daemon_pid())
    daemon.signal(signal.SIGSTOP)
    try:
        for number in range(limit // 2 + 100):
            os.rename(f"{source}/second/file", f"{source}/second/other-{number}")
            os.rename(f"{source}/second/other-{number}", f"{source}/second/file")
        replace(f"{source}/folder/file")
        os.unlink(f"{source}/folder/other")
    finally:
        daemon.signal(signal.SIGCONT)
        daemon.close()
    wait_until(lambda: mount.live()["watch"]["overflows"] > 0, "overflow", timeout_s=SOON_S)
    soon(lambda: same(mount), "changes behind the overflow")
    assert read(mount.path("folder/file")) == b"replaced"


def test_something_mounted_inside_the_source(source: str, mounter: Mounter) -> None:
    """inotify tells nothing of it; the table of mounts does."""
    mount = believing(mounter, source, "auto")
    subprocess.run(["mount", "-t", "tmpfs", "weightfs-test", f"{source}/second"], check=True)
    try:
        soon(lambda: os.listdir(mount.path("second")) == [], "what is mounted")
        write(f"{source}/second/inside", b"tmpfs")
        soon(lambda: os.listdir(mount.path("second")) == ["inside"], "a new file in it")
        assert read(mount.path("second/inside")) == b"tmpfs"
    finally:
        # Busy until the release of what was read has come in.
        unmount = ["umount", f"{source}/second"]
        wait_until(lambda: subprocess.run(unmount, capture_output=True).returncode == 0, "unmounted")
    soon(lambda: os.listdir(mount.path("second")) == ["file"], "what was below it")
    assert read(mount.path("second/file")) == b"second"


@both_engines
def test_without_watches(source: str, mounter: Mounter, engine: str) -> None:
    """`--watch off`: changes show after the timeout, and status says so."""
    mount = mounter(source, engine, "--watch", "off")
    walk(mount.mountpoint)
    assert mount.live()["watch"] == {"state": "off", "reason": "asked for"}
    append(f"{source}/folder/file")
    os.unlink(f"{source}/folder/other")
    wait_until(lambda: same(mount), "changes")


@pytest.mark.alone
def test_the_systems_limit(source: str, mounter: Mounter) -> None:
    """Folders beyond it keep the short timeout; status says which limit and how many."""
    for number in range(20):
        write(f"{source}/many/{number}/file", b"x")
    mount = mounter(source, "auto")
    limit = Path("/proc/sys/fs/inotify/max_user_watches")
    before = limit.read_text()
    limit.write_text("3")
    try:
        walk(mount.mountpoint)
    finally:
        limit.write_text(before)
    watch = mount.live()["watch"]
    assert watch["folders"] <= 3
    assert watch["unwatched"]["fs.inotify.max_user_watches"] >= 20
    append(f"{source}/many/7/file")
    os.unlink(f"{source}/many/8/file")
    wait_until(lambda: same(mount), "changes")


def test_a_filesystem_that_others_may_change(tmp_path: Path, mounter: Mounter) -> None:
    """A source on FUSE is not watched: its server may change it without this kernel's knowing."""
    write(f"{tmp_path}/source/shown/folder/file", b"1")
    inner = mounter(f"{tmp_path}/source", "auto")
    outer = mounter(inner.path("shown"), "portable")
    walk(outer.mountpoint)
    watch = outer.live()["watch"]
    assert watch["folders"] == 0
    assert sum(watch["unwatched"].values()) >= 2
    append(f"{tmp_path}/source/shown/folder/file")
    wait_until(lambda: read(outer.path("folder/file")) == b"1more", "change")


def test_watches_go_with_the_kernels_memory(source: str, mounter: Mounter) -> None:
    """What the kernel forgets is not watched any longer."""
    for number in range(50):
        write(f"{source}/many/{number}/file", b"x")
    mount = believing(mounter, source, "auto")
    assert mount.live()["watch"]["folders"] >= 50
    shutil.rmtree(f"{source}/many")
    wait_until(lambda: mount.live()["watch"]["folders"] < 10, "watches dropped")
    with child("import os, sys; os.chdir(sys.argv[1]); print('in', flush=True); input()", mount.path("folder")):
        assert mount.live()["watch"]["folders"] >= 2
