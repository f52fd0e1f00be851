"""Programs of other users: what each may do in a folder, on the mount and on the bare folder alike."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

UNDEFINED_ID = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class User:
    """Whom a child runs as; `groups` are the supplementary ones."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


OWNER = User(1234, 1234)
MEMBER = User(1235, 1235, (4321,))
STRANGER = User(1236, 1236)
ROOT = User(0, 0)
FILES_GROUP = 4321

# The folder is entered and every module imported before the privileges go: both may lie where only root can look.
_CHILD = """
import hashlib, json, os, socket, stat, subprocess, sys
folder, uid, gid, groups, code = json.loads(sys.argv[1])
os.fchdir(folder)
os.setgroups(groups)
os.setresgid(gid, gid, gid)
os.setresuid(uid, uid, uid)

def answer(call, *arguments):
    try:
        return call(*arguments)
    except OSError as e:
        return f"errno {e.errno}"

def content(path):
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return hashlib.sha256(os.read(fd, 1 << 20)).hexdigest()
    finally:
        os.close(fd)

def attributes(path):
    s = os.lstat(path)
    return [stat.filemode(s.st_mode), s.st_uid, s.st_gid, s.st_size]

exec(code)
json.dump(result, sys.stdout)
"""


def as_user(user: User, folder: str, code: str) -> Any:
    """Run Python in `folder` as `user`; gives what it leaves in `result`, as JSON carries it.

    The code may use `answer(call, *arguments)`, which gives `errno N` for an OSError, `content`,
    `attributes`, and the modules imported above.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _CHILD, json.dumps([fd, user.uid, user.gid, user.groups, code])],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            pass_fds=[fd],
            timeout=60,
            check=False,
        )
    finally:
        os.close(fd)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 1, 2, 4, 8, 16, 32
"""Tags of `linux/posix_acl.h`."""


def access_list(path: str, *entries: tuple[int, int] | tuple[int, int, int], default: bool = False) -> None:
    """Set a POSIX ACL: (tag, permission bits[, id]) each, in the order of the tags."""
    data = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", entry[0], entry[1], entry[2] if len(entry) == 3 else UNDEFINED_ID) for entry in entries
    )
    os.setxattr(path, f"system.posix_acl_{'default' if default else 'access'}", data)
