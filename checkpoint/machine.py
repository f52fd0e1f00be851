"""What of this machine counts for a restore, asked of CRIU and of the kernel."""

from __future__ import annotations

from collections.abc import Iterable

from checkpoint.criu import find_criu
from checkpoint.fingerprint import Fingerprint


def fingerprint_here(*, mountpoint: str | None = None, command: Iterable[str] = (), root: str = "/") -> Fingerprint:
    """This machine's fingerprint.

    Args:
        mountpoint, command, root: see `Fingerprint.here`.

    Raises:
        MisfitError: there is no CRIU that could restore anything.
    """
    criu = find_criu(check=False)
    return Fingerprint.here(criu=".".join(map(str, criu.version)), mountpoint=mountpoint, command=command, root=root)
