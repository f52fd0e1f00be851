"""What the two processes of a mount hold on to."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from typing import Any


def live(mountpoint: str) -> dict[str, Any]:
    """What a mount says of itself, read through it."""
    with open(os.path.join(mountpoint, ".weightfs", "status.json"), "rb") as file:
        return dict(json.loads(file.read()))


def anonymous_kib(pid: int) -> int:
    """Memory of a process that is no file's."""
    with open(f"/proc/{pid}/status") as status:
        found = re.search(r"RssAnon:\s+(\d+) kB", status.read())
    assert found is not None
    return int(found[1])


def descriptors(pid: int) -> int:
    """How many a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


@dataclass(frozen=True, slots=True)
class Footprint:
    """At one moment; `open_inodes` counts files that are open through the mount, each of which has a backing id."""

    daemon_pid: int
    daemon_fds: int
    daemon_anon_kib: int
    supervisor_fds: int
    supervisor_anon_kib: int
    open_inodes: int
    deaths: int

    @classmethod
    def of(cls, mountpoint: str) -> Footprint:
        """Of a mount that serves."""
        said = live(mountpoint)
        daemon, supervisor = said["daemon_pid"], said["supervisor_pid"]
        return cls(
            daemon,
            descriptors(daemon),
            anonymous_kib(daemon),
            descriptors(supervisor),
            anonymous_kib(supervisor),
            said["open_inodes"],
            said["deaths"],
        )
