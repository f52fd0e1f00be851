"""Mount and user namespaces for tests: what is done in one is seen nowhere else and ends with it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import subprocess
from collections.abc import Iterator
from types import TracebackType

from tests.helpers.users import User


class Namespace:
    """A process that does nothing in namespaces of its own, and a way to run programs beside it.

    Args:
        unshare: options of unshare(1) that say which.
    """

    def __init__(self, *unshare: str) -> None:
        self._holder = subprocess.Popen(
            ["unshare", *unshare, "--", "sh", "-c", "echo ready; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self._holder.stdout is not None
        assert self._holder.stderr is not None
        if self._holder.stdout.readline() != b"ready\n":
            raise OSError(self._holder.stderr.read().decode().strip())

    @property
    def pid(self) -> int:
        return self._holder.pid

    def run(
        self, *command: str, user: User | None = None, kinds: str = "-m", timeout_s: float = 60
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a program in the namespaces of these kinds (options of nsenter(1)), as a user of this machine."""
        become = ["setpriv", f"--reuid={user.uid}", f"--regid={user.gid}", "--clear-groups"] if user else []
        return subprocess.run(
            ["nsenter", f"--target={self.pid}", *kinds.split(), "--", *become, *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            env={**os.environ, "LC_ALL": "C"},
            check=False,
        )

    def must(self, *command: str, user: User | None = None, kinds: str = "-m") -> bytes:
        """What a program prints that may not fail."""
        done = self.run(*command, user=user, kinds=kinds)
        assert done.returncode == 0, f"{command}: {done.returncode}: {done.stderr.decode()}"
        return done.stdout

    def __enter__(self) -> Namespace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._holder.communicate()


class _UserNamespace:
    """A user namespace whose ids 0 to 999 are `first` and those behind it on this machine."""

    def __init__(self, first: int) -> None:
        self._holder = subprocess.Popen(
            ["unshare", "--user", "--", "sh", "-c", "echo ready; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"ready\n":
            raise OSError("no user namespace")
        for kind in ("uid", "gid"):
            with open(f"/proc/{self._holder.pid}/{kind}_map", "w") as table:
                table.write(f"0 {first} 1000")
        self.fd = os.open(f"/proc/{self._holder.pid}/ns/user", os.O_RDONLY)

    def close(self) -> None:
        os.close(self.fd)
        self._holder.communicate()


_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_CLONE, _EMPTY_PATH, _FROM_EMPTY_PATH = 1 | os.O_CLOEXEC, 0x1000, 4
_ATTR_IDMAP = 0x00100000


@contextlib.contextmanager
def idmapped(what: str, where: str, first: int) -> Iterator[None]:
    """Show the mount at `what` at `where` as well, with owners 0 to 999 as `first` and those behind it.

    Raises:
        OSError: the kernel won't, EINVAL if the filesystem does not let it.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def call(number: int, *arguments: object) -> int:
        done: int = libc.syscall(number, *arguments)
        if done < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), what)
        return done

    space = _UserNamespace(first)
    try:
        tree = call(_OPEN_TREE, -100, os.fsencode(what), _CLONE)
        try:
            attributes = struct.pack("QQQQ", _ATTR_IDMAP, 0, 0, space.fd)
            call(_MOUNT_SETATTR, tree, b"", _EMPTY_PATH, attributes, len(attributes))
            call(_MOVE_MOUNT, tree, b"", -100, os.fsencode(where), _FROM_EMPTY_PATH)
        finally:
            os.close(tree)
    finally:
        space.close()
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", where], check=True)
