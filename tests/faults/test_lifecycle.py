"""The life of a mount: signals, crashes, busy unmounts, mounts upon mounts."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import random
import signal
from pathlib import Path

import pytest

from tests.helpers.models import write
from tests.helpers.mounting import (
    Mount,
    Mounter,
    both_engines,
    child,
    errno_from,
    mounts_below,
    needs_passthrough,
    wait_until,
    weightfs,
    within,
)

DATA = random.Random(3).randbytes(3_000_000)
GONE = (errno.ENOENT, errno.ESTALE)
DEAD = (0, errno.ECONNABORTED, errno.ENOTCONN, errno.EIO)
"""What a read through a portable mount that is no more may answer; 0 from the kernel's cache."""

READER = """
import os, random, sys
chosen, size = random.Random(os.getpid()), os.stat(sys.argv[1]).st_size
fd = os.open(sys.argv[1], os.O_RDONLY)
print("reading", flush=True)
while True:
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert os.pread(fd, 1 << 20, chosen.randrange(size))
"""


@pytest.fixture
def source(tmp_path: Path) -> str:
    write(f"{tmp_path}/source/model/file", DATA)
    return f"{tmp_path}/source"


def read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def ends_cleanly(mount: Mount, number: signal.Signals) -> None:
    mount.supervisor.signal(number)
    # 5 s are promised; this machine may be busy with others.
    assert mount.supervisor.has_ended(10), f"still alive 10 s after {number.name}"
    assert mounts_below(mount.mountpoint) == []
    assert within(20, lambda: os.listdir(mount.mountpoint)) == []


@both_engines
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_unmounts(source: str, mounter: Mounter, engine: str, number: signal.Signals) -> None:
    mount = mounter(source, engine)
    assert read(mount.path("model/file")) == DATA
    ends_cleanly(mount, number)


@both_engines
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_while_busy_unmounts_lazily(source: str, mounter: Mounter, engine: str, number: signal.Signals) -> None:
    """What the kernel reads by itself goes on; everything else gets an error, never a hang."""
    mount = mounter(source, engine)
    with open(mount.path("model/file"), "rb", buffering=0) as held:
        mapped = mmap.mmap(held.fileno(), 0, prot=mmap.PROT_READ)
        assert mapped[0] == DATA[0]
        ends_cleanly(mount, number)
        if engine == "passthrough":
            assert within(20, lambda: os.pread(held.fileno(), len(DATA), 0)) == DATA
            assert within(20, lambda: mapped[:]) == DATA
        else:
            os.posix_fadvise(held.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert errno_from(lambda: os.pread(held.fileno(), 4096, 1_000_000)) in DEAD
        mapped.close()


@both_engines
def test_signal_while_a_reader_works(source: str, mounter: Mounter, engine: str) -> None:
    mount = mounter(source, engine)
    with child(READER, mount.path("model/file")) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "reading\n"
        ends_cleanly(mount, signal.SIGTERM)


@both_engines
def test_killed_daemon_leaves_a_dead_mount_that_mount_replaces(source: str, mounter: Mounter, engine: str) -> None:
    mount = mounter(source, engine)
    assert read(mount.path("model/file")) == DATA
    mount.kill_all()
    assert errno_from(lambda: os.statvfs(mount.mountpoint)) in (errno.ENOTCONN, errno.ECONNABORTED)
    status = weightfs("status", mount.mountpoint, "--json")
    assert status.returncode == 75
    again = mounter(source, engine, at=mount.mountpoint, state_dir=mount.state_dir)
    assert mounts_below(mount.mountpoint) == [mount.mountpoint]
    assert within(20, lambda: read(again.path("model/file"))) == DATA
    assert again.live()["index"]["set_aside"] is None


def test_killed_daemon_then_umount(source: str, mounter: Mounter) -> None:
    mount = mounter(source)
    mount.kill_all()
    done = mount.umount()
    assert done.returncode == 0, done.stderr
    assert mounts_below(mount.mountpoint) == []


@needs_passthrough
def test_killed_daemon_while_files_are_open(source: str, mounter: Mounter) -> None:
    """Reads and mappings that the kernel serves go on without the daemon."""
    mount = mounter(source, "passthrough")
    with open(mount.path("model/file"), "rb", buffering=0) as held:
        with mmap.mmap(held.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            mount.kill_all()
            assert within(20, lambda: os.pread(held.fileno(), 100, 1_000_000)) == DATA[1_000_000:1_000_100]
            assert within(20, lambda: mapped[2_000_000:2_000_100]) == DATA[2_000_000:2_000_100]
        again = mounter(source, "passthrough", at=mount.mountpoint)
        assert within(20, lambda: read(again.path("model/file"))) == DATA
        assert within(20, lambda: os.pread(held.fileno(), 100, 0)) == DATA[:100]


@both_engines
def test_killed_readers_leave_it_healthy(source: str, mounter: Mounter, engine: str) -> None:
    mount = mounter(source, engine)
    for _ in range(3):
        with contextlib.ExitStack() as stack:
            readers = [stack.enter_context(child(READER, mount.path("model/file"))) for _ in range(6)]
            for reader in readers:
                assert reader.stdout is not None
                assert reader.stdout.readline() == "reading\n"
            for reader in readers:
                reader.kill()
                assert reader.wait(5) == -signal.SIGKILL
    assert within(20, lambda: read(mount.path("model/file"))) == DATA
    wait_until(lambda: mount.live()["open_inodes"] == 1, "handles of the dead are given back")
    assert mount.live()["requests_expired"] == 0
    descriptors = len(os.listdir(f"/proc/{mount.daemon_pid()}/fd"))
    assert descriptors < 40


@both_engines
def test_handles_and_descriptors_are_given_back(source: str, mounter: Mounter, engine: str) -> None:
    mount = mounter(source, engine)
    read(mount.path("model/file"))
    before = len(os.listdir(f"/proc/{mount.daemon_pid()}/fd"))
    for _ in range(500):
        read(mount.path("model/file"))
        with pytest.raises(FileNotFoundError):
            read(mount.path("model/absent"))
        os.listdir(mount.path("model"))
    wait_until(lambda: len(os.listdir(f"/proc/{mount.daemon_pid()}/fd")) <= before + 1, "descriptors")
    assert mount.live()["open_inodes"] == 1


@both_engines
def test_two_mounts_of_one_source(source: str, mounter: Mounter, engine: str) -> None:
    """At once, with a state folder each; the one goes on when the other ends."""
    first, second = mounter(source, engine), mounter(source, engine)
    assert read(first.path("model/file")) == read(second.path("model/file")) == DATA
    assert first.umount().returncode == 0
    assert read(second.path("model/file")) == DATA


@both_engines
def test_two_mounts_with_one_state_folder(source: str, mounter: Mounter, tmp_path: Path, engine: str) -> None:
    """Either both serve, or the second says why not; numbers never mean two things."""
    state = f"{tmp_path}/state"
    first = mounter(source, engine, state_dir=state)
    place = f"{tmp_path}/second"
    os.mkdir(place)
    done = weightfs("mount", source, place, "--state-dir", state, "--engine", engine, "--json")
    try:
        if done.returncode == 0:
            write(f"{source}/one", b"1")
            write(f"{source}/two", b"2")
            seen = {os.stat(first.path("one")).st_ino, os.stat(f"{place}/two").st_ino}
            assert len(seen) == 2
            assert os.stat(first.path("two")).st_ino not in (os.stat(first.path("one")).st_ino, 1)
        else:
            assert "error" in json.loads(done.stdout)
            assert "Traceback" not in done.stderr
    finally:
        weightfs("umount", place)
    assert read(first.path("model/file")) == DATA


def test_umount_while_busy_names_the_user(source: str, mounter: Mounter) -> None:
    mount = mounter(source)
    with open(mount.path("model/file"), "rb", buffering=0) as held:
        done = mount.umount()
        assert done.returncode == 75
        assert str(os.getpid()) in json.loads(done.stdout)["error"]["message"]
        assert read(mount.path("model/file")) == DATA
        assert mount.umount("--lazy").returncode == 0
        assert mounts_below(mount.mountpoint) == []
        assert within(20, lambda: os.pread(held.fileno(), len(DATA), 0)) == DATA
    assert mount.supervisor.has_ended(20)


def test_umount_while_mapped_names_the_user(source: str, mounter: Mounter) -> None:
    """A mapping without a descriptor holds the mount as well: what a loader leaves behind."""
    mount = mounter(source)
    with open(mount.path("model/file"), "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    with mapped:
        done = mount.umount()
        assert done.returncode == 75
        assert str(os.getpid()) in json.loads(done.stdout)["error"]["message"]
        assert mapped[:] == DATA
    done = mount.umount()
    assert done.returncode == 0, done.stderr
    assert mount.supervisor.has_ended(20)


def test_umount_ends_the_daemon(source: str, mounter: Mounter) -> None:
    mount = mounter(source)
    assert mount.umount().returncode == 0
    assert mount.supervisor.has_ended(0)
    done = mount.umount()
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["code"] == "failed"


@both_engines
def test_file_removed_under_an_open_handle(source: str, mounter: Mounter, engine: str) -> None:
    mount = mounter(source, engine)
    with open(mount.path("model/file"), "rb", buffering=0) as held:
        os.unlink(f"{source}/model/file")
        assert os.pread(held.fileno(), len(DATA), 0) == DATA
        wait_until(lambda: not os.path.exists(mount.path("model/file")), "name gone")
        os.posix_fadvise(held.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(held.fileno(), len(DATA), 0) == DATA
        seen = os.fstat(held.fileno())
        assert (seen.st_size, seen.st_nlink) == (len(DATA), 0)
        with mmap.mmap(held.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            assert mapped[:] == DATA


@both_engines
def test_source_folder_removed(source: str, mounter: Mounter, engine: str) -> None:
    mount = mounter(source, engine)
    os.unlink(f"{source}/model/file")
    os.rmdir(f"{source}/model")
    os.rmdir(source)
    wait_until(lambda: errno_from(lambda: os.stat(mount.path("model"))) in GONE, "folder gone")
    assert errno_from(lambda: os.listdir(mount.mountpoint)) in (0, *GONE)
    assert mount.live()["source"] == source
    assert mount.umount().returncode == 0


def test_mount_over_a_living_one(source: str, mounter: Mounter, tmp_path: Path) -> None:
    mount = mounter(source)
    done = weightfs("mount", source, mount.mountpoint, "--state-dir", f"{tmp_path}/other", "--json")
    assert done.returncode == 1
    assert "mounted there already" in json.loads(done.stdout)["error"]["message"]
    assert mounts_below(mount.mountpoint) == [mount.mountpoint]
    assert read(mount.path("model/file")) == DATA


@pytest.mark.parametrize("what", ["source", "source is a file", "mountpoint", "mountpoint is a file"])
def test_missing_folders_are_usage_errors(tmp_path: Path, what: str) -> None:
    source, place, file = f"{tmp_path}/source", f"{tmp_path}/place", write(f"{tmp_path}/file", b"")
    os.mkdir(source)
    os.mkdir(place)
    wrong = {"source": f"{tmp_path}/no", "mountpoint": f"{tmp_path}/no"}.get(what, file)
    arguments = (wrong, place) if what.startswith("source") else (source, wrong)
    done = weightfs("mount", *arguments, "--state-dir", f"{tmp_path}/state", "--json")
    assert done.returncode == 2, done.stderr
    error = json.loads(done.stdout)["error"]
    assert error["code"] == "usage"
    assert error["path"] == wrong
    assert error["mend"]
    assert done.stderr.count("\n") == 1
    assert mounts_below(str(tmp_path)) == []
