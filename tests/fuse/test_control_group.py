"""The control socket of a real mount: who may ask, which mode, and that it goes with the mount."""

from __future__ import annotations

import errno
import grp
import json
import os
import stat
from pathlib import Path

import pytest

from tests.helpers.mounting import Mounter, weightfs
from tests.helpers.users import OWNER, ROOT, STRANGER, User, as_user
from weightfs.config import MountConfig

ASK = """
with socket.socket(socket.AF_UNIX) as client:
    result = answer(client.connect, {place!r})
    if result is None:
        client.sendall(b'{{"command": "status"}}\\n')
        result = json.loads(client.makefile("rb").readline())["mountpoint"]
"""


def ask(folder: Path, state: str, mountpoint: str, source: str, user: User) -> object:
    settings = MountConfig(source=source, mountpoint=mountpoint, state_dir=state)
    place = os.path.relpath(settings.control_socket, folder)
    return as_user(user, str(folder), ASK.format(place=place))


@pytest.mark.parametrize("with_group", [False, True])
def test_who_may_ask(tmp_path: Path, mounter: Mounter, with_group: bool) -> None:
    group = next(entry for entry in grp.getgrall() if entry.gr_gid)
    tmp_path.chmod(0o755)
    (tmp_path / "source").mkdir()
    state = f"{tmp_path}/made/on/the/way/state"  # every folder of it is new, as below /var/lib on a fresh machine
    options = ("--control-group", group.gr_name) if with_group else ()
    mount = mounter(f"{tmp_path}/source", "auto", *options, state_dir=state)
    member = User(1235, 1235, (group.gr_gid,))
    denied = f"errno {errno.EACCES}"
    for user, may in ((ROOT, True), (member, with_group), (OWNER, False), (STRANGER, False)):
        said = ask(tmp_path, state, mount.mountpoint, mount.source, user)
        assert said == (mount.mountpoint if may else denied), user
    for name in os.listdir(state):
        mode = stat.S_IMODE(os.lstat(f"{state}/{name}").st_mode)
        assert mode & 0o077 in ((0, 0o060) if name.startswith("control") else (0,)), name


def test_a_group_that_does_not_exist_is_a_usage_error(tmp_path: Path) -> None:
    for name in ("source", "mount"):
        (tmp_path / name).mkdir()
    done = weightfs(
        "mount", f"{tmp_path}/source", f"{tmp_path}/mount", "--state-dir", f"{tmp_path}/state",
        "--control-group", "no-such-group", "--json",
    )  # fmt: skip
    assert done.returncode == 2
    assert "no group" in json.loads(done.stdout)["error"]["message"]
    assert not os.path.exists(f"{tmp_path}/state")
