"""How much memory there is and who limits it: /proc/meminfo, the memory control group, and the budget that follows.

Page cache is charged to the control group of the process that touches it first, so what prefetch may fill is bounded by
the group of the daemon, whoever reads it later (Documentation/admin-guide/cgroup-v2.rst, "Memory Ownership").

Every reader takes `root`, the folder that holds `proc` and the mounts of `sys`, so that it can be pointed elsewhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Final, Literal

import msgspec

_UNLIMITED_BYTES: Final = 1 << 60
"""Limits above it are the kernel's way to say that there is none (version 1 says 2^63, less a page)."""
_LIMITS: Final = {1: ("memory.limit_in_bytes",), 2: ("memory.max", "memory.high")}
_USED: Final = {1: "memory.usage_in_bytes", 2: "memory.current"}
_CACHED: Final = {1: ("total_inactive_file", "total_active_file"), 2: ("inactive_file", "active_file")}


class MemoryGroup(msgspec.Struct, frozen=True, kw_only=True):
    """A control group that memory is charged to.

    Attributes:
        path: its folder.
        top: the folder its hierarchy is mounted at; what lies above that can't be seen.
        version: of control groups.
    """

    path: str
    top: str
    version: Literal[1, 2]

    def upwards(self) -> Iterator[str]:
        """Its folder and those above it that limit it too, the nearest first."""
        place = self.path
        while True:
            yield place
            if place == self.top or len(place) <= len(self.top):
                return
            place = os.path.dirname(place)


class Limit(msgspec.Struct, frozen=True):
    """What a control group may hold.

    Attributes:
        path: the group's folder.
        nbytes: the limit.
        free_bytes: what is left under it, inactive file pages counted as free.
        obtainable_bytes: the same with all of the page cache counted as free: what memory of processes can take of it.
    """

    path: str
    nbytes: int
    free_bytes: int
    obtainable_bytes: int


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """What a process may fill, as far as it can be read.

    Attributes:
        total_bytes: MemTotal; 0 where /proc/meminfo can't be read.
        available_bytes: MemAvailable: free, or taken from page cache without loss.
        group: what this process's page cache is charged to; None where that is nobody but the machine.
        limits: of the group and those above it.
    """

    total_bytes: int
    available_bytes: int
    group: MemoryGroup | None = None
    limits: tuple[Limit, ...] = ()

    @property
    def lowest(self) -> Limit | None:
        """The smallest of the limits, if there are any."""
        return min(self.limits, key=lambda limit: limit.nbytes, default=None)

    @property
    def tightest(self) -> Limit | None:
        """The limit that leaves the least."""
        return min(self.limits, key=lambda limit: limit.free_bytes, default=None)


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """How many bytes of page cache prefetch may fill.

    Attributes:
        nbytes: the budget.
        asked_bytes: what the user asked for; None is the default.
        available_bytes: MemAvailable.
        cgroup: folder of the memory control group that the page cache is charged to, or None.
        cgroup_limit_bytes: the smallest limit of that group and those above it, or None.
        cgroup_free_bytes: what is left under these limits, or None.
        limited_by: in words, what made it as small as it is.
    """

    nbytes: int
    asked_bytes: int | None
    available_bytes: int
    cgroup: str | None
    cgroup_limit_bytes: int | None
    cgroup_free_bytes: int | None
    limited_by: str


def budget_of(asked_bytes: int | None, memory: Memory) -> Budget:
    """The budget: what was asked for, as far as it can be had; else half of what is left. Pure.

    What was asked for is held against the group's limit and not against what is left under it, which shrinks as the
    budget is spent.
    """
    lowest, tightest = memory.lowest, memory.tightest
    if asked_bytes is None:
        nbytes, limited_by = memory.available_bytes // 2, "half of the available memory"
        if tightest is not None and tightest.free_bytes // 2 < nbytes:
            nbytes, limited_by = tightest.free_bytes // 2, f"half of what the limit of {tightest.path} leaves"
    else:
        nbytes, limited_by = asked_bytes, "what was asked for"
        if nbytes > memory.available_bytes:
            nbytes, limited_by = memory.available_bytes, "the available memory, which is less than was asked for"
        if lowest is not None and lowest.nbytes < nbytes:
            nbytes, limited_by = lowest.nbytes, f"the limit of {lowest.path}, which is less than was asked for"
    if memory.total_bytes == 0:
        nbytes, limited_by = 0, "/proc/meminfo, which can't be read"
    return Budget(
        nbytes=nbytes,
        asked_bytes=asked_bytes,
        available_bytes=memory.available_bytes,
        cgroup=None if memory.group is None else memory.group.path,
        cgroup_limit_bytes=None if lowest is None else lowest.nbytes,
        cgroup_free_bytes=None if tightest is None else tightest.free_bytes,
        limited_by=limited_by,
    )


def read_memory(root: str = "/") -> Memory:
    """What this process may fill now. Never raises: what can't be read counts as not there."""
    text = read_text(os.path.join(root, "proc/meminfo"))
    available = meminfo_bytes(text, "MemAvailable")
    if available is None:  # a /proc that is emulated may lack it
        available = meminfo_bytes(text, "MemFree") or 0
    group = memory_group(root)
    return Memory(
        total_bytes=meminfo_bytes(text, "MemTotal") or 0,
        available_bytes=available,
        group=group,
        limits=() if group is None else tuple(_limits(group)),
    )


def meminfo_bytes(text: str, name: str) -> int | None:
    """A row of /proc/meminfo, in bytes; None where it has none of that name."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) << 10 if found else None


def memory_group(root: str = "/") -> MemoryGroup | None:
    """The control group that this process's memory is charged to; None in the topmost one, or where none is mounted."""
    path, version = _own_path(root)
    if path is None:
        return None
    for mounted, point, fstype, options in _mounts(root):
        if fstype != ("cgroup" if version == 1 else "cgroup2") or (version == 1 and "memory" not in options.split(",")):
            continue
        top = os.path.normpath(os.path.join(root, point.lstrip("/")))
        # A container may see its own group as the topmost one while the path is told from further up.
        inner = os.path.relpath(path, mounted) if (path + "/").startswith(mounted.rstrip("/") + "/") else "."
        group = MemoryGroup(path=os.path.normpath(os.path.join(top, inner)), top=top, version=version)
        for place in group.upwards():  # version 2: the nearest one above for which the controller is on
            if os.path.exists(os.path.join(place, _USED[version])):
                return MemoryGroup(path=place, top=top, version=version)
    return None


def read_text(path: str) -> str:
    """A file of /proc or /sys; empty where it can't be read."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return ""


def _own_path(root: str) -> tuple[str | None, Literal[1, 2]]:
    unified = None
    for line in read_text(os.path.join(root, "proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return path, 1
        if controllers == "":
            unified = path
    return unified, 2


def _mounts(root: str) -> Iterator[tuple[str, str, str, str]]:
    """Root, mountpoint, type and options of each mount that could be a hierarchy of control groups."""
    for line in read_text(os.path.join(root, "proc/self/mountinfo")).splitlines():
        before, _, after = line.partition(" - ")
        fstype, _, rest = after.partition(" ")
        if fstype in ("cgroup", "cgroup2"):
            _, _, _, mounted, point, *_ = before.split(" ")
            yield mounted, point, fstype, rest.rpartition(" ")[2]


def _limits(group: MemoryGroup) -> Iterator[Limit]:
    for place in group.upwards():
        limits = [_number(place, name) for name in _LIMITS[group.version]]
        here = min((limit for limit in limits if limit is not None and limit < _UNLIMITED_BYTES), default=None)
        if here is not None:
            used = _number(place, _USED[group.version]) or 0
            inactive, active = _cached(place, group.version)
            free, obtainable = (max(0, min(here, here - used + cached)) for cached in (inactive, inactive + active))
            yield Limit(place, here, free, obtainable)


def _number(place: str, name: str) -> int | None:
    text = read_text(os.path.join(place, name)).strip()
    return int(text) if text.isdecimal() else None


def _cached(place: str, version: int) -> tuple[int, int]:
    """Bytes of the page cache, inactive and active."""
    text = read_text(os.path.join(place, "memory.stat"))
    found = (re.search(rf"^{name} (\d+)$", text, re.MULTILINE) for name in _CACHED[version])
    inactive, active = (int(one[1]) if one else 0 for one in found)
    return inactive, active
