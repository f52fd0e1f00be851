"""A user who mounts for himself, through fusermount3: in a mount namespace with a /dev/fuse that is open to users."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.models import every_dtype, safetensors_bytes
from tests.helpers.mounting import WEIGHTFS, Daemon
from tests.helpers.namespaces import Namespace
from tests.helpers.users import STRANGER, User

pytestmark = pytest.mark.alone  # a mount namespace keeps copies of the mounts of other tests

HIM = User(65534, 65534)
PLACE = "/srv"  # hidden below a tmpfs in the namespace alone
SOURCE, MOUNTPOINT, STATE = f"{PLACE}/source", f"{PLACE}/mount", f"{PLACE}/state"
DENIED = b"Permission denied"
CHECKOUT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

TENSORS = every_dtype()


def open_the_way(space: Namespace, folders: set[str]) -> None:
    """Let other users, in the namespace, come to these folders: one above them may be root's home."""
    shut: dict[str, list[str]] = {}
    for folder in folders:
        above = [folder[:at] for at in range(1, len(folder)) if folder[at] == "/"]
        if barrier := next((path for path in above if not os.stat(path).st_mode & stat.S_IXOTH), None):
            shut.setdefault(barrier, []).append(folder)
    for barrier, behind in shut.items():
        kept = {f"{PLACE}/kept-{number}": folder for number, folder in enumerate(behind)}
        for place, folder in kept.items():
            space.must("sh", "-c", 'mkdir "$1" && mount --bind "$2" "$1"', "sh", place, folder)
        space.must("mount", "-t", "tmpfs", "-o", "mode=755", "none", barrier)
        for place, folder in kept.items():
            space.must("sh", "-c", 'mkdir -p "$2" && mount --bind "$1" "$2"', "sh", place, folder)


@pytest.fixture(scope="module")
def space() -> Iterator[Namespace]:
    try:
        held = Namespace("--mount", "--propagation", "private")
    except OSError as e:
        pytest.skip(f"this machine lacks mount namespaces: {e}")
    with held as space:
        space.must("mount", "-t", "tmpfs", "-o", "mode=755", "none", PLACE)
        if space.run("sh", "-c", "exec 3<>/dev/fuse", user=HIM).returncode:
            made = space.run("sh", "-c", f"mknod -m 666 {PLACE}/fuse c 10 229 && mount --bind {PLACE}/fuse /dev/fuse")
            if made.returncode or space.run("sh", "-c", "exec 3<>/dev/fuse", user=HIM).returncode:
                pytest.skip(f"this machine lacks a /dev/fuse for users: {made.stderr.decode().strip()}")
        helper = space.run("sh", "-c", "command -v fusermount3").stdout.decode().strip()
        if not helper or not os.stat(helper).st_mode & stat.S_ISUID:
            pytest.skip("this machine lacks a setuid fusermount3")
        open_the_way(space, {sys.prefix, sys.base_prefix, CHECKOUT})
        if space.run(sys.executable, WEIGHTFS, "--help", user=HIM).returncode:
            pytest.skip(f"this machine lacks a Python that other users may run: {WEIGHTFS}")
        yield space


def weightfs(space: Namespace, *arguments: str, user: User = HIM) -> tuple[int, dict[str, Any]]:
    done = space.run("env", f"XDG_STATE_HOME={STATE}", sys.executable, WEIGHTFS, *arguments, "--json", user=user)
    return done.returncode, json.loads(done.stdout)


@pytest.fixture(scope="module")
def mount(space: Namespace) -> Iterator[dict[str, Any]]:
    data = f"/proc/{os.getpid()}/fd"
    content = os.memfd_create("model")
    try:
        os.write(content, safetensors_bytes(TENSORS))
        for folder in (SOURCE, MOUNTPOINT, STATE):
            space.must("install", "-d", "-o", str(HIM.uid), "-g", str(HIM.gid), "-m", "755", folder)
        space.must("install", "-m", "644", f"{data}/{content}", f"{SOURCE}/model.safetensors")
    finally:
        os.close(content)
    code, document = weightfs(space, "mount", SOURCE, MOUNTPOINT)
    assert code == 0, document
    yield document
    space.run("umount", "--lazy", MOUNTPOINT)


def test_the_engine_is_the_portable_one_and_says_why(mount: dict[str, Any]) -> None:
    assert mount["engine"] == "portable"
    assert mount["reason"] == "passthrough needs CAP_SYS_ADMIN"


def test_he_reads_files_and_tensors(space: Namespace, mount: dict[str, Any]) -> None:
    assert space.must("cat", f"{MOUNTPOINT}/model.safetensors", user=HIM) == safetensors_bytes(TENSORS)
    for name in ("t.F32", "t.U8"):
        assert space.must("cat", f"{MOUNTPOINT}/.tensors/model/{name}", user=HIM) == TENSORS[name].data
        npy = space.must("cat", f"{MOUNTPOINT}/.npy/model/{name}.npy", user=HIM)
        assert npy.startswith(b"\x93NUMPY")
        assert npy.endswith(TENSORS[name].data)


def test_nobody_else_does(space: Namespace, mount: dict[str, Any]) -> None:
    """Not even root: the kernel keeps a mount without allow_other for whoever made it."""
    for user in (None, STRANGER):
        for path in ("model.safetensors", ".weightfs/status.json", ".tensors/model/t.F32"):
            done = space.run("cat", f"{MOUNTPOINT}/{path}", user=user)
            assert done.returncode
            assert DENIED in done.stderr


def test_it_shows_as_his_and_read_only(space: Namespace, mount: dict[str, Any]) -> None:
    (line,) = [line for line in space.must("cat", "/proc/self/mountinfo").decode().splitlines() if MOUNTPOINT in line]
    before, after = line.split(" - ")
    assert {"ro", "nosuid", "nodev"} <= set(before.split(" ")[5].split(","))
    assert after.split(" ")[:2] == ["fuse.weightfs", SOURCE]
    assert {f"user_id={HIM.uid}", "default_permissions"} <= set(after.split(" ")[2].split(","))
    assert "allow_other" not in after


def test_status_and_state(space: Namespace, mount: dict[str, Any]) -> None:
    code, document = weightfs(space, "status", MOUNTPOINT)
    assert code == 0
    (shown,) = document["mounts"]
    assert shown["daemon_pid"] == mount["daemon_pid"]
    (folder,) = space.must("ls", f"{STATE}/weightfs").decode().split()
    assert stat.S_IMODE(int(space.must("stat", "-c", "%f", f"{STATE}/weightfs/{folder}"), 16)) == 0o700


def test_for_others_only_where_the_administrator_lets_him(space: Namespace, mount: dict[str, Any]) -> None:
    if "\nuser_allow_other" in "\n" + space.run("cat", "/etc/fuse.conf").stdout.decode():
        pytest.skip("this machine lacks a restriction: /etc/fuse.conf has user_allow_other")
    space.must("install", "-d", "-o", str(HIM.uid), f"{PLACE}/second")
    code, document = weightfs(space, "mount", SOURCE, f"{PLACE}/second", "--allow-other")
    assert code == 3
    assert "user_allow_other" in str(document["error"])


def test_not_on_a_folder_that_is_not_his(space: Namespace, mount: dict[str, Any]) -> None:
    space.must("install", "-d", "-m", "755", f"{PLACE}/roots")
    code, document = weightfs(space, "mount", SOURCE, f"{PLACE}/roots")
    assert code == 3
    assert "fusermount3 failed" in str(document["error"])


def test_he_unmounts_and_no_other_user_does(space: Namespace, mount: dict[str, Any]) -> None:
    daemon = Daemon(int(str(mount["daemon_pid"])))
    code, _ = weightfs(space, "umount", MOUNTPOINT, user=STRANGER)
    assert code == 1
    assert weightfs(space, "umount", MOUNTPOINT)[0] == 0
    assert MOUNTPOINT not in space.must("cat", "/proc/self/mountinfo").decode()
    assert daemon.end() is None
