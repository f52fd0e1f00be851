"""Writes of every kind answer EROFS, on entries of the source and on those that exist only on the mount."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Callable

import pytest

from tests.helpers.models import every_dtype, write, write_safetensors
from tests.helpers.mounting import ENGINES, Mount, Mounter, refused

WRITES: dict[str, Callable[[str], object]] = {
    "open for writing": lambda root: os.open(f"{root}/file", os.O_WRONLY),
    "open for both": lambda root: os.open(f"{root}/file", os.O_RDWR),
    "open to append": lambda root: os.open(f"{root}/file", os.O_WRONLY | os.O_APPEND),
    "open to truncate": lambda root: os.open(f"{root}/file", os.O_RDONLY | os.O_TRUNC),
    "create": lambda root: os.open(f"{root}/new", os.O_WRONLY | os.O_CREAT, 0o600),
    "create exclusively": lambda root: os.open(f"{root}/new", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600),
    "create by tmpfile": lambda root: os.open(root, os.O_TMPFILE | os.O_RDWR, 0o600),
    "mkdir": lambda root: os.mkdir(f"{root}/new"),
    "rmdir": lambda root: os.rmdir(f"{root}/folder"),
    "unlink": lambda root: os.unlink(f"{root}/file"),
    "rename": lambda root: os.rename(f"{root}/file", f"{root}/new"),
    "link": lambda root: os.link(f"{root}/file", f"{root}/new"),
    "symlink": lambda root: os.symlink("file", f"{root}/new"),
    "mkfifo": lambda root: os.mkfifo(f"{root}/new"),
    "mknod": lambda root: os.mknod(f"{root}/new", 0o600),
    "bind a socket": lambda root: bind(f"{root}/new"),
    "chmod": lambda root: os.chmod(f"{root}/file", 0o600),
    "chown": lambda root: os.chown(f"{root}/file", 1, 1),
    "truncate": lambda root: os.truncate(f"{root}/file", 0),
    "utime": lambda root: os.utime(f"{root}/file", (1, 1)),
    "setxattr": lambda root: os.setxattr(f"{root}/file", "user.new", b"x"),
    "removexattr": lambda root: os.removexattr(f"{root}/file", "user.here"),
    "open a tensor for writing": lambda root: os.open(f"{root}/.tensors/model/t.F32", os.O_WRONLY),
    "chmod a tensor": lambda root: os.chmod(f"{root}/.tensors/model/t.F32", 0o600),
    "unlink a tensor": lambda root: os.unlink(f"{root}/.tensors/model/t.F32"),
    "create a tensor": lambda root: os.open(f"{root}/.tensors/model/new", os.O_WRONLY | os.O_CREAT, 0o600),
    "write to the state": lambda root: os.open(f"{root}/.weightfs/status.json", os.O_WRONLY),
}


def bind(path: str) -> None:
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        # A short way to the same place: a socket's path has 108 bytes at most.
        with socket.socket(socket.AF_UNIX) as unix:
            unix.bind(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
    finally:
        os.close(folder)


@pytest.fixture(scope="module", params=ENGINES)
def mount(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, module_mounter: Mounter) -> Mount:
    root = str(tmp_path_factory.mktemp("source"))
    os.setxattr(write(f"{root}/file", b"content"), "user.here", b"x")
    os.mkdir(f"{root}/folder")
    write_safetensors(f"{root}/model.safetensors", every_dtype())
    return module_mounter(root, request.param)


@pytest.mark.parametrize("what", WRITES)
def test_is_refused(mount: Mount, what: str) -> None:
    with refused(errno.EROFS):
        WRITES[what](mount.mountpoint)


def test_source_is_untouched(mount: Mount) -> None:
    assert sorted(os.listdir(mount.source)) == ["file", "folder", "model.safetensors"]
    with open(f"{mount.source}/file", "rb") as file:
        assert file.read() == b"content"


def test_read_only_descriptor_refuses_to_write(mount: Mount) -> None:
    """As any descriptor that was opened for reading: EBADF, or EINVAL for ftruncate."""
    fd = os.open(mount.path("file"), os.O_RDONLY)
    try:
        for write_it in (
            lambda: os.write(fd, b"x"),
            lambda: os.pwrite(fd, b"x", 0),
            lambda: os.posix_fallocate(fd, 0, 100),
            lambda: os.ftruncate(fd, 0),
        ):
            with refused(errno.EBADF, errno.EINVAL):
                write_it()
        with refused(errno.EROFS):
            os.fchmod(fd, 0o600)
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.syncfs(fd) == 0  # not a write
        os.fsync(fd)
    finally:
        os.close(fd)


def test_create_of_an_existing_file_opens_it(mount: Mount) -> None:
    """O_CREAT on what exists is no write, on the bare read-only folder either."""
    fd = os.open(mount.path("file"), os.O_RDONLY | os.O_CREAT)
    try:
        assert os.read(fd, 100) == b"content"
    finally:
        os.close(fd)
