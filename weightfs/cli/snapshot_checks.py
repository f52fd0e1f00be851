"""What `weightfs doctor` says of snapshots: none of it is needed for a mount."""

from __future__ import annotations

import os
import struct
from typing import Final

from checkpoint.criu import find_criu
from checkpoint.errors import MisfitError
from weightfs import linux
from weightfs.checks import Check

_TMPFS_MAGIC: Final = 0x01021994


def checks() -> list[Check]:
    """Every check of this module."""
    return [criu(), run_folder()]


def criu() -> Check:
    """Whether there is a CRIU that is new enough, and what `criu check` says."""
    try:
        found = find_criu()
    except MisfitError as e:
        return Check("criu", "missing", f"{e}; mounts do not need it", e.mend)
    version = ".".join(map(str, found.version))
    if not found.can_dump_inet:
        return Check(
            "criu",
            "degraded",
            f"{version} ({found.path}): since Linux 6.16 it can dump no process with a TCP or UDP socket; 4.2 can",
            "tools/install-criu",
        )
    return Check("criu", "ok", f"{version} ({found.path})")


def run_folder(path: str = "/run") -> Check:
    """Whether CRIU can remember what the kernel can do: it does so in /run, and only where that is a tmpfs."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as e:
        return Check("run", "degraded", f"{path}: {os.strerror(e.errno or 0)}", f"mount -t tmpfs tmpfs {path}")
    try:
        (magic,) = struct.unpack_from("=q", linux.statfs_raw(fd))
    finally:
        os.close(fd)
    if magic == _TMPFS_MAGIC:
        return Check("run", "ok", "CRIU remembers here what the kernel can do")
    return Check(
        "run",
        "degraded",
        f"{path} is not a tmpfs: CRIU asks the kernel anew what it can do at each dump and restore, about 40 ms",
        f"have {path} be a tmpfs, as systemd does (of a container: --tmpfs {path})",
    )
