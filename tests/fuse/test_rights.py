"""Who may read what: the kernel checks the caller against the source's owner, mode and access list."""

from __future__ import annotations

import os
import struct
import subprocess

import pytest

from tests.helpers.models import write
from tests.helpers.mounting import ENGINES, Mount, Mounter

OWNER, MEMBER, STRANGER = (1234, 99), (99, 4321), (99, 99)


def reads(mount: Mount, name: str, user: tuple[int, int]) -> bool:
    """Whether that user and group can read a file; by descriptor, since the folders above belong to root."""
    folder = os.open(mount.mountpoint, os.O_RDONLY)
    try:
        done = subprocess.run(
            ["cat", f"/proc/self/fd/{folder}/{name}"],
            pass_fds=[folder],
            user=user[0],
            group=user[1],
            extra_groups=[],
            capture_output=True,
            check=False,
        )
    finally:
        os.close(folder)
    assert done.returncode == 0 or b"Permission denied" in done.stderr
    return done.returncode == 0


def access_list(path: str, *entries: tuple[int, int, int]) -> None:
    """Sets a POSIX ACL: (tag, permissions, id) each; the tags are those of `linux/posix_acl.h`."""
    data = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", tag, bits, id_ & 0xFFFFFFFF) for tag, bits, id_ in entries
    )
    os.setxattr(path, "system.posix_acl_access", data)


@pytest.fixture(scope="module", params=ENGINES)
def mount(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, module_mounter: Mounter) -> Mount:
    root = str(tmp_path_factory.mktemp("source"))
    os.chmod(root, 0o755)
    for name in ("group", "private", "open", "listed"):
        os.chown(write(f"{root}/{name}", b"x"), 1234, 4321)
    os.chmod(f"{root}/group", 0o640)
    os.chmod(f"{root}/private", 0o600)
    os.chmod(f"{root}/open", 0o644)
    os.chmod(f"{root}/listed", 0o640)
    # owner rw, user 99 nothing, group r, mask r, other nothing: the mode's group bits show the mask.
    access_list(f"{root}/listed", (1, 6, -1), (2, 0, 99), (4, 4, -1), (16, 4, -1), (32, 0, -1))
    return module_mounter(root, request.param)


@pytest.mark.parametrize(
    ("name", "owner", "member", "stranger"),
    [("group", True, True, False), ("private", True, False, False), ("open", True, True, True)],
)
def test_mode(mount: Mount, name: str, owner: bool, member: bool, stranger: bool) -> None:
    assert [reads(mount, name, user) for user in (OWNER, MEMBER, STRANGER)] == [owner, member, stranger]


def test_access_list_denies_a_member(mount: Mount) -> None:
    assert reads(mount, "listed", (1000, 4321))
    assert not reads(mount, "listed", MEMBER)
    assert os.getxattr(mount.path("listed"), "system.posix_acl_access") == os.getxattr(
        os.path.join(mount.source, "listed"), "system.posix_acl_access"
    )


def test_change_of_mode_counts(mount: Mount) -> None:
    path = os.path.join(mount.source, "open")
    number = os.stat(mount.path("open")).st_ino
    os.chmod(path, 0o600)
    try:
        within = os.stat(mount.path("open")).st_ino
        assert within == number
        assert not reads(mount, "private", STRANGER)
    finally:
        os.chmod(path, 0o644)


def test_live_state_is_for_everyone(mount: Mount) -> None:
    assert reads(mount, ".weightfs/status.json", STRANGER)
