"""A second instance of a snapshot: pid, mount and network namespaces in which its pids and ports are free.

    unshare                        in the namespaces outside; waits for
    └── instance_program.py        pid 1 inside
        └── the restored root      a child of pid 1 once CRIU, which `nsenter` runs inside, has ended

Mounts made outside later, such as a weightfs mount that is restarted, show inside. The network is a loopback of its own
and the ports that are published; there is no way out.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from checkpoint import instance_program
from checkpoint.errors import CheckpointError, MisfitError, RetryError
from checkpoint.processes import PROC, tree_of
from weightfs import linux

_READY_S: Final = 20.0
_UNSHARE: Final = (
    *("--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--propagation", "slave", "--net"),
    "--",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """A port outside that leads to one inside.

    Attributes:
        host: the address outside.
        port: outside.
        inside: the port inside.
    """

    host: str
    port: int
    inside: int


class Instance:
    """The namespaces, before and after a process is restored into them. See `made`.

    Attributes:
        init: pid of the process that is pid 1 inside.
    """

    def __init__(self, init: int, held: socket.socket) -> None:
        self.init = init
        self._held = held

    @property
    def enter(self) -> tuple[str, ...]:
        """The command before a command that is to run inside."""
        return ("nsenter", "--target", str(self.init), "--pid", "--mount", "--net", "--")

    def pids(self) -> dict[int, int]:
        """By the pid inside, the pid outside of every process."""
        return {_inside(one.pid): one.pid for one in tree_of(self.init)}

    def keep(self, root: int) -> None:
        """It stays, until the process with this pid inside ends."""
        self._held.sendall(f"{root}\n".encode())

    @contextlib.contextmanager
    def network(self) -> Iterator[None]:
        """This thread is in its network, for as long as the context."""
        with open("/proc/thread-self/ns/net", "rb") as before, open(f"{PROC}/{self.init}/ns/net", "rb") as there:
            linux.enter_network(there.fileno())
            try:
                yield
            finally:
                linux.enter_network(before.fileno())


@contextlib.contextmanager
def made(ports: Sequence[Published] = ()) -> Iterator[Instance]:
    """Make namespaces; whatever is in them ends with the context, unless `Instance.keep` was called.

    Raises:
        MisfitError: unshare(1) and nsenter(1) are missing.
        RetryError: a port is taken.
        CheckpointError: they can't be made.
    """
    if missing := [one for one in ("unshare", "nsenter") if shutil.which(one) is None]:
        raise MisfitError(f"{missing[0]} is missing", mend="apt-get install util-linux")
    with contextlib.ExitStack() as held:
        listeners = [(held.enter_context(_listener(one)), one.inside) for one in ports]
        ours, theirs = socket.socketpair()
        held.enter_context(ours)
        held.enter_context(theirs)
        arguments = [str(theirs.fileno()), *(f"{one.fileno()}:{port}" for one, port in listeners)]
        outer = subprocess.Popen(
            ["unshare", *_UNSHARE, sys.executable, "-I", "-S", instance_program.__file__, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            pass_fds=[theirs.fileno(), *(one.fileno() for one, _ in listeners)],
        )
        assert outer.stderr is not None
        held.enter_context(outer.stderr)
        theirs.close()
        try:
            instance = Instance(_init(outer, ours), ours)
            yield instance
        except BaseException:
            outer.kill()  # and pid 1 with it, and all of the namespace with that
            outer.wait()
            raise
        # It outlives this command, whose child it is: nobody is to wait for it here.
        outer.returncode = 0


def _init(outer: subprocess.Popen[bytes], ours: socket.socket) -> int:
    """Wait until pid 1 inside is ready; gives its pid outside."""
    ours.settimeout(_READY_S)
    try:
        said = ours.recv(16)
    except TimeoutError:
        raise CheckpointError(f"a pid namespace was not ready within {_READY_S:g} s") from None
    if not said:
        assert outer.stderr is not None
        outer.wait()
        reason = outer.stderr.read().decode(errors="replace").strip().splitlines()
        raise CheckpointError(f"namespaces can't be made: {reason[-1] if reason else 'unshare gives no reason'}")
    return tree_of(outer.pid)[1].pid


def _listener(one: Published) -> socket.socket:
    try:
        return socket.create_server((one.host, one.port), backlog=128)
    except OSError as e:
        raise RetryError(
            f"port {one.port} of {one.host} can't be listened to: {os.strerror(e.errno or 0)}",
            mend="publish another one",
        ) from e


def _inside(pid: int) -> int:
    """The pid that a process has in the innermost pid namespace it is in."""
    with open(f"{PROC}/{pid}/status", encoding="utf-8", errors="replace") as file:
        return next(int(line.split()[-1]) for line in file if line.startswith("NSpid:"))
