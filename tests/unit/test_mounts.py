"""What /proc says is mounted, and how failures to mount and unmount are told."""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from weightfs import linux, mounts
from weightfs.errors import BusyError, UnfitError, UsageError, WeightfsError
from weightfs.mounts import Mounted

TABLE = r"""
22 29 0:20 / /sys rw,nosuid shared:7 - sysfs sysfs rw
30 29 0:50 / /models ro,nosuid,nodev shared:9 - fuse.weightfs /srv/models ro,user_id=0
31 29 0:51 / /mnt/a\040b\011c\012d\134e ro - fuse.weightfs /srv/my\040models\134x ro
32 29 0:52 / /mnt/ü ro shared:1 master:2 propagate_from:3 - fuse.weightfs /srv/ü ro
33 29 0:53 / /other ro - fuse.sshfs fuse.weightfs ro
34 30 0:54 / /models ro - fuse.weightfs /srv/newer ro
35 30 0:55 / /mnt/\0406 ro - fuse.weightfs - ro
36 30 0:56 / /mnt/none ro - fuse.weightfs  ro
"""


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    def use(content: bytes) -> None:
        real = builtins.open

        def fake(path: Any, *arguments: Any, **options: Any) -> Any:
            if path == "/proc/self/mountinfo":
                return io.TextIOWrapper(io.BytesIO(content), **options)
            return real(path, *arguments, **options)

        monkeypatch.setattr(mounts, "open", fake, raising=False)

    return use


def test_the_table_is_read_with_its_escapes(table: Callable[[bytes], None]) -> None:
    table(TABLE.strip().encode() + b"\n37 1 0:57 / /mnt/\xff ro - fuse.weightfs /srv/\xff ro\n")
    assert mounts.mounted() == [
        Mounted("/models", "/srv/models", "0:50"),
        Mounted("/mnt/a b\tc\nd\\e", "/srv/my models\\x", "0:51"),
        Mounted("/mnt/ü", "/srv/ü", "0:52"),
        Mounted("/models", "/srv/newer", "0:54"),
        Mounted("/mnt/ 6", "-", "0:55"),
        Mounted("/mnt/none", "", "0:56"),
        Mounted("/mnt/\udcff", "/srv/\udcff", "0:57"),
    ]
    found = mounts.find("/models")
    assert found is not None
    assert found.source == "/srv/newer", "the topmost"
    assert mounts.find("/other") is None


def test_the_real_table_can_be_read() -> None:
    assert isinstance(mounts.mounted(), list)
    assert mounts.find("/proc/nowhere") is None


# A folder to mount on


def test_a_plain_folder_is_fine(tmp_path: Path) -> None:
    assert mounts.clear_stale(str(tmp_path)) is False


def test_no_folder_or_no_folder_at_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for name in ("file", "nowhere", "file/below"):
        with pytest.raises(UsageError) as caught:
            mounts.clear_stale(str(tmp_path / name))
        assert caught.value.mend


@pytest.fixture
def unmounted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    seen: list[tuple[str, bool]] = []
    monkeypatch.setattr(mounts, "unmount", lambda path, lazy=False: seen.append((path, lazy)))
    return seen


@pytest.mark.parametrize("number", [errno.ENOTCONN, errno.ECONNABORTED])
def test_a_dead_mount_is_taken_away_if_it_is_ours(
    table: Callable[[bytes], None], unmounted: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def dead(path: object, **_: object) -> os.stat_result:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "stat", dead)
    table(TABLE.strip().encode())
    assert mounts.clear_stale("/models") is True
    assert unmounted == [("/models", True)]
    with pytest.raises(UsageError):
        mounts.clear_stale("/other")
    assert len(unmounted) == 1


@pytest.mark.parametrize(("status", "outcome"), [(0, "lives"), (1, "dead"), (None, "hangs")])
def test_a_mount_that_stat_finds_is_asked(
    table: Callable[[bytes], None],
    unmounted: list[tuple[str, bool]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    status: int | None,
    outcome: str,
) -> None:
    table(f"30 29 0:50 / {tmp_path} ro - fuse.weightfs /srv ro\n".encode())

    def asked(command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        if status is None:
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(subprocess, "run", asked)
    if outcome == "dead":
        assert mounts.clear_stale(str(tmp_path)) is True
        assert unmounted == [(str(tmp_path), True)]
        return
    kind = BusyError if outcome == "hangs" else WeightfsError
    with pytest.raises(kind) as caught:
        mounts.clear_stale(str(tmp_path))
    assert type(caught.value) is kind
    mend = f"weightfs umount --lazy {tmp_path}" if outcome == "hangs" else f"weightfs umount {tmp_path}, or --replace"
    assert caught.value.mend == mend
    assert not unmounted


# mount(2) and umount(2)


@pytest.fixture
def privileged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "is_privileged", lambda: True)


@pytest.mark.usefixtures("privileged")
@pytest.mark.parametrize("for_others", [True, False])
def test_mount_asks_the_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, for_others: bool) -> None:
    device = tmp_path / "fuse"
    device.write_bytes(b"")
    opened, calls, real = [], [], os.open

    def fake_open(path: str, flags: int, *rest: int) -> int:
        assert flags & os.O_NONBLOCK
        opened.append(path)
        return real(device, os.O_RDWR)

    monkeypatch.setattr(os, "open", fake_open)
    monkeypatch.setattr(linux, "mount", lambda *arguments: calls.append(arguments))
    fd = mounts.mount("/srv/models", "/models", for_others=for_others)
    os.close(fd)
    assert opened == ["/dev/fuse"]
    ((source, target, fstype, flags, options),) = calls
    assert (source, target, fstype) == ("/srv/models", "/models", "fuse.weightfs")
    assert flags & linux.MS_RDONLY
    assert f"fd={fd}," in options
    assert "default_permissions" in options
    assert options.endswith(",allow_other") is for_others

    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, "no")

    monkeypatch.setattr(linux, "mount", refused)
    with pytest.raises(UnfitError) as caught:
        mounts.mount("/srv/models", "/models", for_others=for_others)
    assert caught.value.path == "/models"
    with pytest.raises(OSError, match="Bad file"):
        os.close(fd)


@pytest.mark.usefixtures("privileged")
def test_a_machine_without_fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> int:
        raise FileNotFoundError(errno.ENOENT, "no")

    monkeypatch.setattr(os, "open", missing)
    with pytest.raises(UnfitError) as caught:
        mounts.mount("/srv", "/models", for_others=True)
    assert (caught.value.path, caught.value.mend) == ("/dev/fuse", "modprobe fuse")


@pytest.mark.usefixtures("privileged")
@pytest.mark.parametrize(("number", "kind"), [(errno.EBUSY, BusyError), (errno.EINVAL, WeightfsError)])
def test_a_refused_unmount(monkeypatch: pytest.MonkeyPatch, number: int, kind: type[WeightfsError]) -> None:
    def refused(*_: object) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(linux, "umount", refused)
    with pytest.raises(WeightfsError) as caught:
        mounts.unmount("/models")
    assert type(caught.value) is kind
    assert caught.value.path == "/models"


@pytest.mark.usefixtures("privileged")
@pytest.mark.parametrize("lazy", [True, False])
def test_unmount_lazily_or_not(monkeypatch: pytest.MonkeyPatch, lazy: bool) -> None:
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(linux, "umount", lambda *arguments: calls.append(arguments))
    mounts.unmount("/models", lazy=lazy)
    assert calls == [("/models", linux.MNT_DETACH if lazy else 0)]


def test_users_of_a_mount_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(os.getpid()) in mounts._by_whom(str(tmp_path)).removeprefix(" by pid ").split(", ")
    assert mounts._by_whom(str(tmp_path) + "x") == ""


# Without privileges


@pytest.fixture
def helper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A fusermount3 of our own, first in PATH."""
    monkeypatch.setattr(mounts, "is_privileged", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return tmp_path / "fusermount3"


def script(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_fusermount_hands_the_descriptor_back(helper: Path, tmp_path: Path) -> None:
    (tmp_path / "device").write_bytes(b"the device")
    send = (
        "import array, os, socket, sys; s = socket.socket(fileno=int(os.environ['_FUSE_COMMFD'])); "
        f"f = os.open('{tmp_path}/device', os.O_RDONLY); "
        "s.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [f]))])"
    )
    python = shutil.which("python3")
    script(helper, f'printf "%s\\n" "$@" > {tmp_path}/arguments\nexec "{python}" -c "{send}"')
    fd = mounts.mount("/srv/a,b\\c", "/models", for_others=True)
    assert os.pread(fd, 100, 0) == b"the device"
    assert not os.get_blocking(fd)
    assert not os.get_inheritable(fd)
    os.close(fd)
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments[0] == "-o"
    assert arguments[2:] == ["--", "/models"]
    assert "fsname=/srv/a\\,b\\\\c," in arguments[1]
    assert arguments[1].endswith(",allow_other")


def test_a_refusing_fusermount_is_quoted(helper: Path) -> None:
    script(helper, "echo 'user has no write access to mountpoint' >&2; exit 1")
    with pytest.raises(UnfitError, match="no write access"):
        mounts.mount("/srv", "/models", for_others=False)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("exit 0", None),
        ("echo 'target is busy' >&2; exit 1", BusyError),
        ("echo 'not mounted' >&2; exit 1", WeightfsError),
    ],
)
def test_fusermount_unmounts(helper: Path, tmp_path: Path, body: str, kind: type[WeightfsError] | None) -> None:
    script(helper, f'printf "%s\\n" "$@" > {tmp_path}/arguments\n{body}')
    if kind is None:
        mounts.unmount("/models", lazy=True)
        assert (tmp_path / "arguments").read_text().splitlines() == ["-u", "-z", "--", "/models"]
        return
    with pytest.raises(WeightfsError) as caught:
        mounts.unmount("/models")
    assert type(caught.value) is kind


def test_neither_rights_nor_fusermount(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "is_privileged", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    for call in (lambda: mounts.mount("/srv", "/m", for_others=False), lambda: mounts.unmount("/m")):
        with pytest.raises(UnfitError) as caught:
            call()
        assert caught.value.mend == "apt-get install fuse3"


def test_readahead_that_may_not_be_set() -> None:
    assert mounts.raise_readahead(Mounted("/m", "/s", "999:999"), 4096) is False


@pytest.mark.parametrize("busy", [False, True])
def test_one_mount_is_taken_away_and_no_other_at_its_place(monkeypatch: pytest.MonkeyPatch, busy: bool) -> None:
    asked: list[bool] = []

    def unmount(mountpoint: str, *, lazy: bool = False, tell_users: bool = True) -> None:
        asked.append(lazy)
        if busy and not lazy:
            raise BusyError("is in use", path=mountpoint)

    monkeypatch.setattr(mounts, "find", lambda mountpoint: mounts.Mounted(mountpoint, "/srv", "0:44"))
    monkeypatch.setattr(mounts, "unmount", unmount)
    assert mounts.take_away("/models", "0:45") is False
    assert asked == [], "another one is there by now"
    assert mounts.take_away("/models", "0:44") is busy
    assert asked == ([False, True] if busy else [False])
