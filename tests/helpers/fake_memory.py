"""A /proc and /sys of our own, for what reads memory and control groups."""

from __future__ import annotations

import os
from pathlib import Path

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

V1 = "9:name=systemd:/\n4:memory:/a/b\n0::/\n"
V2 = "0::/a/b\n"
MOUNTED_V1 = "31 23 0:27 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n"
MOUNTED_V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:8 - cgroup2 cgroup2 rw,nsdelegate\n"


class FakeMachine:
    """Files below a folder, as `root` of the readers."""

    def __init__(self, folder: Path) -> None:
        self.root = str(folder)

    def say(self, path: str, text: str | int) -> None:
        place = Path(self.root, path.lstrip("/"))
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"{text}\n" if isinstance(text, int) else text)

    def meminfo(self, total_bytes: int, available_bytes: int) -> None:
        self.say(
            "/proc/meminfo",
            f"MemTotal:       {total_bytes // KIB} kB\nMemFree:         1 kB\n"
            f"MemAvailable:   {available_bytes // KIB} kB\n",
        )

    def groups(self, of_process: str, mounted: str) -> None:
        self.say("/proc/self/cgroup", of_process)
        self.say("/proc/self/mountinfo", "22 1 254:0 / / rw - ext4 /dev/vda rw\n" + mounted)

    def version_2(self, place: str, used: int, inactive: int = 0, **limits: int | str) -> None:
        """A group below /sys/fs/cgroup; `max` and `high` are its limits."""
        folder = f"/sys/fs/cgroup{place}"
        self.say(f"{folder}/memory.current", used)
        self.say(f"{folder}/memory.stat", f"anon 5\ninactive_file {inactive}\nactive_file 7\n")
        for name in ("max", "high"):
            self.say(f"{folder}/memory.{name}", limits.get(name, "max\n"))

    def version_1(self, place: str, used: int, inactive: int = 0, limit: int = 9223372036854771712) -> None:
        """A group below /sys/fs/cgroup/memory."""
        folder = f"/sys/fs/cgroup/memory{place}"
        self.say(f"{folder}/memory.usage_in_bytes", used)
        self.say(f"{folder}/memory.limit_in_bytes", limit)
        self.say(f"{folder}/memory.stat", f"inactive_file 3\ntotal_inactive_file {inactive}\n")

    def path(self, path: str) -> str:
        return os.path.join(self.root, path.lstrip("/"))
