"""`mount --replace`: another version takes over under running programs, or says why not and the old one goes on."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.load import Load, write_samples
from tests.helpers.models import every_dtype, write, write_safetensors
from tests.helpers.mounting import (
    WEIGHTFS,
    Daemon,
    Mount,
    Mounter,
    both_engines,
    errno_from,
    mounts_below,
    wait_until,
    wait_until_settled,
    weightfs,
    within,
)
from tests.helpers.versions import make_version

DATA = random.Random(9).randbytes(2_000_000)
TENSORS = every_dtype()
SLOWEST_S = 5.0

SAYS = {"service.py": [('            "uptime_s":', '            "version": "the other one",\n            "uptime_s":')]}
"""A version that can be told from this one by its status."""
PREPARED = '        self._link.say({"prepared": {"canary": canary.native_id}})\n'
LATE = {"service.py": [(PREPARED, "        await trio.sleep(2)\n" + PREPARED)]}
DYING = {"service.py": [(PREPARED, "        os.kill(os.getpid(), signal.SIGKILL)\n")]}
OTHER_INIT = {"channel.py": [("    max_background: int = 64\n", "    max_background: int = 65\n")]}
NEXT_SCHEMA = {
    "index/schema.py": [
        ("SCHEMA: Final = 1\n", "SCHEMA: Final = 2\n"),
        ("Callable[[bytes, bytes], bytes]]] = {}\n",
         "Callable[[bytes, bytes], bytes]]] = {1: lambda room, value: value + b'\\xc0' * (room == b'keys')}\n"),
    ],
    "index/store.py": [
        ('        return int.from_bytes(value, "big") if value is not None else None\n',
         "        return int.from_bytes(value[:8], 'big') if value is not None else None\n"),
        ('{key: int.from_bytes(value, "big") for key, value in values',
         '{key: int.from_bytes(value[:8], "big") for key, value in values'),
        ('inode.to_bytes(8, "big"))\n\n    def file(', 'inode.to_bytes(8, "big") + b"\\xc0")\n\n    def file('),
    ],
}  # fmt: skip
"""A version that keeps a byte more behind each number."""


@pytest.fixture
def source(tmp_path: Path) -> str:
    write(f"{tmp_path}/source/model/file", DATA)
    write_safetensors(f"{tmp_path}/source/model/weights.safetensors", TENSORS)
    return f"{tmp_path}/source"


@pytest.fixture
def mount(source: str, mounter: Mounter) -> Mount:
    return mounter(source)


Edits = Mapping[str, Sequence[tuple[str, str]]]


class Versions:
    """Makes versions, and asks a mount to be replaced by one."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._count = 0

    def make(self, edits: Edits) -> str:
        self._count += 1
        return make_version(os.path.join(self._folder, f"version-{self._count}"), edits)

    def command(self, mount: Mount, **changed: str) -> list[str]:
        given = {"source": mount.source, "state_dir": mount.state_dir, "engine": mount.engine, **changed}
        return [
            WEIGHTFS, "mount", "--replace", given["source"], mount.mountpoint, "--state-dir", given["state_dir"],
            "--engine", given["engine"], "--json",
        ]  # fmt: skip

    def start(self, mount: Mount, path: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(mount),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )

    def replace(self, mount: Mount, path: str | None = None, **changed: str) -> tuple[int, dict[str, Any]]:
        """Exit status and document."""
        done = subprocess.run(
            self.command(mount, **changed),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=os.environ if path is None else {**os.environ, "PYTHONPATH": path},
        )
        return done.returncode, json.loads(done.stdout)


@pytest.fixture
def versions(tmp_path: Path) -> Versions:
    return Versions(str(tmp_path))


def read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), 1 << 24, 0)


def numbers(mount: Mount) -> dict[str, int]:
    """The inode number of everything below the mount, views included."""
    found = {}
    for folder, _, names in [*os.walk(mount.mountpoint), *os.walk(mount.path("model/.tensors"))]:
        found.update({os.path.join(folder, name): os.lstat(os.path.join(folder, name)).st_ino for name in names})
        found[folder] = os.stat(folder).st_ino
    return found


def goes_on(mount: Mount, before: int) -> None:
    """The daemon that served still does, and can be replaced."""
    assert mount.daemon_pid() == before
    assert within(20, lambda: read(mount.path("model/file"))) == DATA


@both_engines
def test_replaced_under_load(tmp_path: Path, mounter: Mounter, versions: Versions, engine: str) -> None:
    write_samples(f"{tmp_path}/source", rows=512)
    wait_until_settled(f"{tmp_path}/source/single/model.safetensors")
    mount = mounter(f"{tmp_path}/source", engine)
    with Load(mount.source, mount.mountpoint, threads=4) as load:
        for _ in range(3):
            before = mount.daemon_pid()
            status, document = versions.replace(mount)
            assert status == 0, document
            assert document["daemon_pid"] == mount.daemon_pid() != before
            assert document["supervisor_pid"] == mount.supervisor.pid
    load.must_be_spotless(SLOWEST_S)
    assert mount.live()["deaths"] == 0
    wait_until(lambda: mount.live()["open_inodes"] == 1, "handles are given back")


USER = """
import mmap, os, sys
os.chdir(sys.argv[1])
fd = os.open("file", os.O_RDONLY)
mapped = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
view = os.open(".tensors/weights/t.F64", os.O_RDONLY)
want, tensor = open(sys.argv[2], "rb").read(), os.pread(view, 1 << 20, 0)
print("ready", flush=True)
for line in sys.stdin:
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.posix_fadvise(view, 0, 0, os.POSIX_FADV_DONTNEED)
    assert os.pread(fd, 1 << 24, 0) == want
    assert mapped[:] == want
    assert os.pread(view, 1 << 20, 0) == tensor
    assert sorted(os.listdir(".")) == ["weights.safetensors"]
    assert os.fstat(fd).st_size == len(want)
    print(os.getcwd(), flush=True)
"""


def test_users_of_the_version_before_go_on(mount: Mount, versions: Versions, tmp_path: Path) -> None:
    """With a file open whose name is gone, a mapping, a view and a working folder, to the next version and back."""
    wait_until_settled(f"{mount.source}/model/weights.safetensors")
    kept = write(f"{tmp_path}/kept", DATA)
    with subprocess.Popen(
        [sys.executable, "-c", USER, mount.path("model"), kept],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as user:
        assert user.stdin is not None
        assert user.stdout is not None
        assert user.stdout.readline() == "ready\n"
        os.unlink(f"{mount.source}/model/file")
        wait_until(lambda: not os.path.exists(mount.path("model/file")), "the name is gone")
        for path, version in ((versions.make(SAYS), "the other one"), (None, None)):
            status, document = versions.replace(mount, path)
            assert status == 0, document
            assert mount.live().get("version") == version
            print("go", file=user.stdin, flush=True)
            assert within(20, user.stdout.readline) == mount.path("model") + "\n"
        user.stdin.close()
        assert user.wait(30) == 0


def test_supervisor_becomes_the_new_version(mount: Mount, versions: Versions) -> None:
    """The standby, too: it is what serves when the new daemon dies."""
    path = versions.make(SAYS)
    assert versions.replace(mount, path)[0] == 0
    wait_until(lambda: path.split(":")[0] in environment(mount.supervisor.pid), "the supervisor's exec")
    mount.kill_daemon()
    assert mount.live()["version"] == "the other one"
    assert mount.live()["deaths"] == 1
    assert mount.umount().returncode == 0
    assert mount.supervisor.has_ended(20)


def environment(pid: int) -> str:
    with open(f"/proc/{pid}/environ") as file:
        return file.read()


def test_other_settings_are_refused(mount: Mount, versions: Versions, tmp_path: Path) -> None:
    os.mkdir(f"{tmp_path}/other")
    before = mount.daemon_pid()
    status, document = versions.replace(mount, source=f"{tmp_path}/other")
    assert (status, document["error"]["code"]) == (3, "unfit")
    assert "another source" in document["error"]["message"]
    # Its supervisor is found through the state folder.
    status, document = versions.replace(mount, state_dir=f"{tmp_path}/elsewhere")
    assert status != 0
    assert "state" in json.dumps(document["error"])
    goes_on(mount, before)


def test_another_engine_is_refused(mounter: Mounter, source: str, versions: Versions) -> None:
    """INIT would be answered differently."""
    mount = mounter(source, "portable")
    mount.log_must_be_clean = False
    before = mount.daemon_pid()
    status, document = versions.replace(mount, engine="passthrough")
    assert (status, document["error"]["code"]) == (3, "unfit")
    goes_on(mount, before)


def test_another_init_is_refused(mount: Mount, versions: Versions) -> None:
    mount.log_must_be_clean = False
    before = mount.daemon_pid()
    status, document = versions.replace(mount, versions.make(OTHER_INIT))
    assert (status, document["error"]["code"]) == (3, "unfit")
    assert "negotiate" in document["error"]["message"]
    goes_on(mount, before)
    assert versions.replace(mount)[0] == 0


def test_candidate_that_dies(mount: Mount, versions: Versions) -> None:
    before = mount.daemon_pid()
    status, document = versions.replace(mount, versions.make(DYING))
    assert status == 1
    assert "signal 9" in document["error"]["message"]
    goes_on(mount, before)
    mount.kill_daemon()
    assert within(20, lambda: read(mount.path("model/file"))) == DATA
    assert mount.live()["deaths"] == 1


def test_daemon_dies_while_a_candidate_prepares(mount: Mount, versions: Versions) -> None:
    """Somebody serves meanwhile or soon, and the client gets an answer."""
    path = versions.make({"service.py": [*SAYS["service.py"], *LATE["service.py"]]})
    with versions.start(mount, path) as asked:
        wait_until(lambda: "a new version is to take over" in mount.log_text(), "it is asked")
        mount.kill_daemon()
        assert within(20, lambda: read(mount.path("model/file"))) == DATA
        said, _ = asked.communicate(timeout=30)
    assert asked.returncode == 0, said
    assert mount.live()["version"] == "the other one"
    assert mount.live()["deaths"] == 1


def test_two_at_once(mount: Mount, versions: Versions) -> None:
    with versions.start(mount, versions.make(LATE)) as first:
        wait_until(lambda: "a new version is to take over" in mount.log_text(), "it is asked")
        status, document = versions.replace(mount)
        assert (status, document["error"]["code"]) == (75, "busy")
        assert "already" in document["error"]["message"]
        said, _ = first.communicate(timeout=30)
    assert first.returncode == 0, said
    assert mount.live()["daemon_pid"] == json.loads(said)["daemon_pid"]


def test_client_that_goes_away(mount: Mount, versions: Versions) -> None:
    """The replacement it asked for takes place all the same; the next one is not busy for ever."""
    before = mount.daemon_pid()
    with versions.start(mount, versions.make(LATE)) as first:
        wait_until(lambda: "a new version is to take over" in mount.log_text(), "it is asked")
        first.kill()
    wait_until(lambda: mount.daemon_pid() != before, "the new one serves")
    wait_until(lambda: versions.replace(mount)[0] == 0, "the next replacement")


def test_the_next_schema_keeps_every_number(mount: Mount, versions: Versions) -> None:
    """And the version before, which can't read it, does not take over."""
    mount.log_must_be_clean = False
    wait_until_settled(f"{mount.source}/model/weights.safetensors")
    with open(mount.path("model/file"), "rb", buffering=0) as held:
        before = numbers(mount)
        assert len(before) > 10
        status, document = versions.replace(mount, versions.make(NEXT_SCHEMA))
        assert status == 0, document
        assert mount.live()["index"]["set_aside"] is None
        assert numbers(mount) == before
        assert within(20, lambda: os.pread(held.fileno(), len(DATA), 0)) == DATA
        write(f"{mount.source}/model/new", b"new")
        assert read(mount.path("model/new")) == b"new"

        serving = mount.daemon_pid()
        status, document = versions.replace(mount)
        assert (status, document["error"]["code"]) == (3, "unfit")
        assert "schema 2" in document["error"]["message"]
        goes_on(mount, serving)
        after = numbers(mount)
        assert {path: after[path] for path in before} == before


def test_nobody_to_ask(source: str, mounter: Mounter, versions: Versions) -> None:
    """Without a mount there, --replace mounts; with a dead one it says what to do."""
    mount = mounter(source)
    mount.kill_all()
    status, document = versions.replace(mount)
    assert status == 1
    assert "nobody listens" in document["error"]["message"]
    assert document["error"]["mend"]
    assert errno_from(lambda: os.statvfs(mount.mountpoint)) in (errno.ENOTCONN, errno.ECONNABORTED)
    assert weightfs("umount", mount.mountpoint).returncode == 0
    status, document = versions.replace(mount)
    assert status == 0, document
    supervisor = Daemon(document["supervisor_pid"])
    assert mounts_below(mount.mountpoint) == [mount.mountpoint]
    supervisor.signal(signal.SIGTERM)
    assert supervisor.has_ended(20)
    supervisor.close()
