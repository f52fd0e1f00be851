"""Mount and user namespaces for tests: what is done in one is seen nowhere else and ends with it."""

from __future__ import annotations

import os
import subprocess
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
