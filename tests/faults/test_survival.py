"""Daemons die, at any point of any request, and users of the mount do not notice."""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers.footprint import Footprint
from tests.helpers.load import Load, write_samples
from tests.helpers.models import every_dtype, write, write_safetensors
from tests.helpers.mounting import (
    Daemon,
    Mount,
    Mounter,
    both_engines,
    errno_from,
    mounts_below,
    needs_passthrough,
    wait_until,
    wait_until_settled,
    weightfs,
    within,
)
from tests.helpers.versions import make_mortal_version, make_version

DATA = random.Random(8).randbytes(3_000_000)
TENSORS = every_dtype()
SLOWEST_S = 5.0
"""Of a call under load in a test: a machine that runs tests may be busy. `tools/bench/survival.py` measures."""


@pytest.fixture
def source(tmp_path: Path) -> str:
    write(f"{tmp_path}/source/model/file", DATA)
    write_safetensors(f"{tmp_path}/source/model/weights.safetensors", TENSORS)
    return f"{tmp_path}/source"


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


def read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), 1 << 24, 0)


def pread_uncached(fd: int, nbytes: int, at: int) -> bytes:
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return os.pread(fd, nbytes, at)


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(text) for text in file.read().split()]


def standby(mount: Mount) -> int:
    """The pid of the daemon that waits; waits for one."""
    serving = mount.daemon_pid()
    return wait_until(lambda: next((pid for pid in children(mount.supervisor.pid) if pid != serving), 0), "a standby")


def waits(thread_id: int) -> str:
    """In which function of the kernel a thread waits."""
    with open(f"/proc/self/task/{thread_id}/wchan") as file:
        return file.read()


@both_engines
def test_killed_under_load(tmp_path: Path, mounter: Mounter, engine: str) -> None:
    write_samples(f"{tmp_path}/source", rows=512)
    wait_until_settled(f"{tmp_path}/source/single/model.safetensors")  # else a successor does not know its views
    mount = mounter(f"{tmp_path}/source", engine)
    with Load(mount.source, mount.mountpoint, threads=4) as load:
        for deaths in range(1, 5):
            standby(mount)
            mount.kill_daemon()
            wait_until(lambda deaths=deaths: mount.live()["deaths"] == deaths, "the next serves")  # type: ignore[misc]
    load.must_be_spotless(SLOWEST_S)
    # What the threads had open is closed: the state is the one file that is open.
    wait_until(lambda: Footprint.of(mount.mountpoint).open_inodes == 1, "handles are given back")


@both_engines
def test_unlinked_file_outlives_its_daemon(source: str, mounter: Mounter, engine: str) -> None:
    mount = mounter(source, engine)
    with open(mount.path("model/file"), "rb", buffering=0) as held:
        fd = held.fileno()
        os.unlink(f"{source}/model/file")
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
            for _ in range(2):
                mount.kill_daemon()
                assert within(20, lambda: pread_uncached(fd, len(DATA), 0)) == DATA
                assert within(20, lambda: mapped[1_000_000:]) == DATA[1_000_000:]
                wait_until(lambda: within(20, lambda: os.fstat(fd)).st_nlink == 0, "its name is gone")
                assert os.fstat(fd).st_size == len(DATA)
        with within(20, lambda: mmap.mmap(fd, 0, prot=mmap.PROT_READ)) as mapped:
            assert mapped[:] == DATA
        assert errno_from(lambda: os.stat(mount.path("model/file"))) == errno.ENOENT


@both_engines
def test_open_view_outlives_its_daemon(source: str, mounter: Mounter, engine: str) -> None:
    wait_until_settled(f"{source}/model/weights.safetensors")
    mount = mounter(source, engine)
    for folder, suffix in ((".tensors", ""), (".npy", ".npy")):
        path = mount.path("model", folder, "weights", f"t.F64{suffix}")
        with open(path, "rb", buffering=0) as held:
            before = os.fstat(held.fileno())
            mount.kill_daemon()
            assert within(20, lambda: pread_uncached(held.fileno(), 1 << 20, 0)).endswith(TENSORS["t.F64"].data)
            assert os.fstat(held.fileno()).st_ino == before.st_ino
            assert os.stat(path).st_ino == before.st_ino


@both_engines
def test_view_of_an_unlinked_file_outlives_its_daemon(source: str, mounter: Mounter, engine: str) -> None:
    """Unlinking is a change of the file's identity (ctime): ESTALE as before the death, never other bytes."""
    mount = mounter(source, engine)
    with open(mount.path("model/.tensors/weights/t.F64"), "rb", buffering=0) as held:
        os.unlink(f"{source}/model/weights.safetensors")
        mount.kill_daemon()
        assert errno_from(lambda: pread_uncached(held.fileno(), 1 << 20, 0)) == errno.ESTALE
    assert len(os.listdir(mount.path("model"))) == 1


class Mortal:
    """A mount whose daemons die where they are told to."""

    def __init__(self, mount: Mount, points: str) -> None:
        self.mount = mount
        self._points = points

    def point(self, name: str) -> str:
        return os.path.join(self._points, name)

    def dies_at(self, point: str) -> None:
        """Once; the daemon that serves has a standby by then."""
        standby(self.mount)
        write(self.point(point), b"")

    def has_died(self, point: str) -> bool:
        return not os.path.exists(self.point(point))


@pytest.fixture
def mortal(
    request: pytest.FixtureRequest, source: str, mounter: Mounter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Mortal:
    wait_until_settled(f"{source}/model/weights.safetensors")
    path, points = make_mortal_version(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", path)
    write(f"{tmp_path}/untimed.toml", b"attribute_timeout_s = 0\n")
    mount = mounter(source, request.param, "--config", f"{tmp_path}/untimed.toml")
    return Mortal(mount, points)


mortal_engines = pytest.mark.parametrize(
    "mortal", [pytest.param("passthrough", marks=needs_passthrough), "portable"], indirect=True
)


@mortal_engines
def test_request_under_way_is_answered(mortal: Mortal) -> None:
    """Each kind, read by a daemon that then dies: the next one gets it again."""
    mount = mortal.mount
    file, link, view = mount.path("model/file"), mount.path("model/link"), mount.path("model/.tensors/weights/t.F64")
    os.symlink("file", f"{mount.source}/model/link")
    os.setxattr(f"{mount.source}/model/file", "user.color", b"blue")
    with open(view, "rb", buffering=0) as held:
        calls: dict[str, Callable[[], object]] = {
            "read-1": lambda: os.stat(file).st_size == len(DATA),
            "read-5": lambda: os.readlink(link) == "file",
            "read-14": lambda: read(file) == DATA,
            "read-15": lambda: pread_uncached(held.fileno(), 1 << 20, 0) == TENSORS["t.F64"].data,
            "read-17": lambda: os.statvfs(file).f_bsize > 0,
            "read-22": lambda: os.getxattr(file, "user.color") == b"blue",
            "read-23": lambda: os.listxattr(file) == ["user.color"],
            "read-44": lambda: sorted(os.listdir(mount.path("model"))) == ["file", "link", "weights.safetensors"],
            "open-noted": lambda: read(file) == DATA,
            "open-answered": lambda: read(file) == DATA,
        }
        if mount.engine == "portable":  # the same code: what the engines differ in is how files are opened and read
            calls = {point: calls[point] for point in ("read-14", "read-15", "open-noted", "open-answered")}
        for point, call in calls.items():
            mortal.dies_at(point)
            if point == "read-44":
                write(f"{mount.source}/model/new", b"")  # the folder's mtime: a listing the kernel keeps is of no use
                os.unlink(f"{mount.source}/model/new")
            assert within(20, call), point
            # Where the answer comes before the death, whoever waited for it may be ahead of that.
            wait_until(lambda: mortal.has_died(point), f"the daemon dies at {point}")
    wait_until(lambda: mount.live()["open_inodes"] == 1, "every handle is given back")
    assert mount.live()["deaths"] == len(calls)
    assert mount.live()["requests_poisoned"] == 0


@pytest.mark.parametrize("mortal", ["auto"], indirect=True)
def test_release_under_way(mortal: Mortal) -> None:
    """A daemon that dies with the release of the last handle: nothing stays open, and the file can be opened again."""
    mount = mortal.mount
    for point in ("read-18", "released", "release-answered"):
        held = os.open(mount.path("model/file"), os.O_RDONLY)
        mortal.dies_at(point)
        os.close(held)
        wait_until(lambda: mortal.has_died(point), "its death")
        assert within(20, lambda: read(mount.path("model/file"))) == DATA
        wait_until(lambda: mount.live()["open_inodes"] == 1, f"{point}: the handle is given back")
        assert len(os.listdir(f"/proc/{mount.supervisor.pid}/fd")) < 25


@needs_passthrough
@pytest.mark.alone  # counts the free blocks of the disk
@pytest.mark.parametrize("mortal", ["passthrough"], indirect=True)
def test_backing_id_made_and_not_noted(mortal: Mortal, tmp_path: Path) -> None:
    """Its file is not held for ever: the blocks of a deleted file are freed."""
    mount = mortal.mount
    path = write(f"{mount.source}/model/large", bytes(32 << 20))
    mortal.dies_at("backing-made")
    with open(mount.path("model/large"), "rb", buffering=0) as held:
        assert len(within(20, lambda: held.read(4096))) == 4096
    assert mortal.has_died("backing-made")
    before = os.statvfs(mount.source).f_bfree
    os.unlink(path)
    wait_until(lambda: os.statvfs(mount.source).f_bfree >= before + (30 << 20) // 4096, "its blocks are free")


@pytest.mark.parametrize("mortal", ["auto"], indirect=True)
def test_poison(mortal: Mortal, pool: ThreadPoolExecutor) -> None:
    """A request that kills whoever reads it gets EIO after the second death; the others never notice."""
    mount = mortal.mount
    mount.log_must_be_clean = False
    ends = threading.Event()

    def others() -> int:
        rounds = 0
        while not ends.is_set():
            assert read(mount.path("model/file")) == DATA
            rounds += 1
        return rounds

    going: Future[int] = pool.submit(others)
    standby(mount)
    write(mortal.point("poison"), b"")
    assert errno_from(lambda: os.stat(mount.path("poison"))) == errno.EIO
    seen = mount.live()
    ends.set()
    assert going.result(60) > 0
    assert (seen["deaths"], seen["requests_poisoned"]) == (2, 1)
    os.unlink(mortal.point("poison"))
    assert errno_from(lambda: os.stat(mount.path("poison"))) == errno.ENOENT


@pytest.mark.parametrize("mortal", ["auto"], indirect=True)
def test_daemons_that_die_at_once(mortal: Mortal, pool: ThreadPoolExecutor) -> None:
    """The mount stays, the pauses grow, and it serves again when the cause is gone."""
    mount = mortal.mount
    held = os.open(mount.path("model/file"), os.O_RDONLY)
    write(mortal.point("begin"), b"")
    mount.kill_daemon()
    waiting = pool.submit(read, mount.path("model/file"))
    wait_until(lambda: "daemons died young: the next goes in 0.4" in mount.log_text(), "deaths in a row")
    spent = cpu_s(mount.supervisor.pid)
    started = time.monotonic()
    wait_until(lambda: "the next goes in 0.8" in mount.log_text(), "one more")
    assert cpu_s(mount.supervisor.pid) - spent < 0.2 * (time.monotonic() - started) + 0.1
    assert mounts_below(mount.mountpoint) == [mount.mountpoint]
    assert not mount.supervisor.has_ended()
    assert not waiting.done()
    os.unlink(mortal.point("begin"))
    assert waiting.result(60) == DATA
    assert pread_uncached(held, len(DATA), 0) == DATA
    os.close(held)


def cpu_s(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_daemon_that_stands_still(
    source: str, mounter: Mounter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed after ten missed seconds (here two); what waited for it goes on."""
    edits = {"supervision/supervisor.py": [("_STUCK_TICKS: Final = 10", "_STUCK_TICKS: Final = 2")]}
    monkeypatch.setenv("PYTHONPATH", make_version(f"{tmp_path}/impatient", edits))
    mount = mounter(source)
    mount.log_must_be_clean = False
    before = mount.daemon_pid()
    daemon = Daemon(before)
    daemon.signal(signal.SIGSTOP)
    assert within(20, lambda: read(mount.path("model/file"))) == DATA
    assert daemon.has_ended(20)
    daemon.close()
    seen = mount.live()
    assert (seen["deaths"], seen["daemon_pid"] != before) == (1, True)


def test_request_that_a_stopped_daemon_never_read(source: str, mounter: Mounter, pool: ThreadPoolExecutor) -> None:
    mount = mounter(source)
    daemon = Daemon(mount.daemon_pid())
    daemon.signal(signal.SIGSTOP)
    threads: list[int] = []

    def ask() -> bytes:
        threads.append(threading.get_native_id())
        return read(mount.path("model/file"))

    asking = [pool.submit(ask) for _ in range(3)]
    wait_until(lambda: "request_wait_answer" in map(waits, threads), "one is under way, which the others wait for")
    daemon.signal(signal.SIGKILL)
    assert [one.result(60) for one in asking] == 3 * [DATA]
    daemon.close()


def test_sigterm_to_the_daemon_hands_over(source: str, mounter: Mounter) -> None:
    mount = mounter(source)
    before = mount.daemon_pid()
    with open(mount.path("model/file"), "rb", buffering=0) as held:
        os.kill(before, signal.SIGTERM)
        assert within(20, lambda: pread_uncached(held.fileno(), len(DATA), 0)) == DATA
        wait_until(lambda: mount.daemon_pid() != before, "another one serves")
        assert mount.live()["deaths"] == 0
        assert within(20, lambda: pread_uncached(held.fileno(), len(DATA), 0)) == DATA


@both_engines
def test_killed_supervisor_takes_the_mount_away(source: str, mounter: Mounter, engine: str) -> None:
    mount = mounter(source, engine)
    daemon, spare = Daemon(mount.daemon_pid()), Daemon(standby(mount))
    with open(mount.path("model/file"), "rb", buffering=0) as held:
        mount.supervisor.signal(signal.SIGKILL)
        wait_until(lambda: not mounts_below(mount.mountpoint), "the mount is gone")
        assert within(20, lambda: os.listdir(mount.mountpoint)) == []
        again = mounter(source, engine, at=mount.mountpoint, state_dir=mount.state_dir)
        assert within(20, lambda: read(again.path("model/file"))) == DATA
        errno_from(lambda: os.pread(held.fileno(), 4096, 0))  # an answer, whichever: a hang would fail
    for process in (daemon, spare):
        assert process.has_ended(20)
        process.close()


def test_killed_standby_is_followed(source: str, mounter: Mounter) -> None:
    mount = mounter(source)
    serving, spare = mount.daemon_pid(), Daemon(standby(mount))
    spare.signal(signal.SIGKILL)
    assert spare.has_ended(20)
    spare.close()
    assert mount.daemon_pid() == serving
    mount.kill_daemon()  # with nobody in reserve
    assert within(20, lambda: read(mount.path("model/file"))) == DATA
    assert mount.live()["deaths"] == 1


def test_status_tells_of_deaths(source: str, mounter: Mounter) -> None:
    mount = mounter(source)
    assert mount.status()["deaths"] == 0
    mount.kill_daemon()
    seen = mount.status()
    assert (seen["deaths"], seen["supervisor_pid"]) == (1, mount.supervisor.pid)
    done = weightfs("status", mount.mountpoint)
    assert done.returncode == 0
    assert "1 daemon has died" in done.stdout
    assert json.loads(weightfs("status", "--json").stdout)["mounts"]
