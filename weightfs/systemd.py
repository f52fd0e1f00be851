"""What is said to systemd, and what it keeps: sd_notify(3), sd_listen_fds(3), the descriptor store.

Without systemd every call does nothing.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import subprocess
from collections.abc import Mapping, Sequence
from typing import Final

_FIRST_FD: Final = 3
_ANSWER_S: Final = 3.0
_SEND_S: Final = 1.0


def notify(state: str, fds: Sequence[int] = ()) -> None:
    """Send assignments such as `READY=1`; descriptors go with `FDSTORE=1` and stay the caller's."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as outlet, contextlib.suppress(OSError):
        outlet.settimeout(_SEND_S)  # a manager that reads nothing must hold up nobody
        outlet.connect("\0" + address[1:] if address.startswith("@") else address)
        outlet.sendmsg([state.encode()], rights)


def keep(name: str, fd: int) -> None:
    """Have the service manager hold a descriptor beyond this process, under a name without `:`."""
    notify(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", [fd])


def discard(name: str) -> None:
    """Have it close what it holds under a name."""
    notify(f"FDSTOREREMOVE=1\nFDNAME={name}")


def is_stopping(unit: str) -> bool:
    """Whether systemd is stopping a unit for good, and not in order to start it again.

    Where it can't be asked, yes: a mount that nobody serves would hold up whoever touches it.
    """
    try:
        done = subprocess.run(
            ["systemctl", "list-jobs", "--no-legend", "--no-pager", "--plain", "--", unit],
            capture_output=True,
            text=True,
            timeout=_ANSWER_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return True
    jobs = [line.split() for line in done.stdout.splitlines()]  # id, unit, type, state
    return done.returncode != 0 or any(job[1:3] == [unit, "stop"] for job in jobs)


def kept(environment: Mapping[str, str], pid: int) -> dict[str, int]:
    """The descriptors that were kept for this process, by name; inheritable no more. The caller owns them."""
    if environment.get("LISTEN_PID") != str(pid):
        return {}
    count = int(environment.get("LISTEN_FDS", "0"))
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    found = {}
    for position in range(count):
        fd = _FIRST_FD + position
        os.set_inheritable(fd, False)
        found[names[position] if position < len(names) else f"unnamed-{position}"] = fd
    return found
