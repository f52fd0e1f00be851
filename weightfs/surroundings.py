"""What a mount finds around it: namespaces, control groups, limits. One check each for `weightfs doctor`.

Everything is read from /proc and /sys, nothing is tried: see doctor for what can only be found out by trying.
"""

from __future__ import annotations

import os
import resource
from typing import Final

from weightfs import linux, memory, mounts
from weightfs.checks import Check

_FILES: Final = 65536
"""Files that may be open through one mount before a limit is worth a word: each costs its daemon a descriptor."""
_WATCHES: Final = 65536
_IDMAP_SINCE: Final = (6, 12)


def checks() -> list[Check]:
    """Every check of this module."""
    return [propagation(), user_namespace(), idmapped_mounts(), open_files(), oom(), memory_cgroup(), watches()]


def propagation() -> Check:
    """Whether containers that run already will see a new mount: `docker -v /models:/models:ro,rslave`."""
    table = mounts.mount_table()
    standing = {mount.mountpoint: mount for mount in table}
    # What a mount stands on is named by its parent's number; a mount to come stands on the root, as far as we know.
    grounds = {mount.parent for mount in table if mount.fstype == mounts.FSTYPE}
    private = sorted(
        mount.mountpoint
        for mount in table
        if not mount.is_shared and (mount.number in grounds or standing.get("/") is mount)
    )
    if not private:
        return Check("propagation", "ok", "mounts reach containers that run already, if they bind with rslave")
    return Check(
        "propagation",
        "degraded",
        f"{', '.join(private)}: not shared, so a container sees only what was mounted before it started",
        "mount --make-rshared /",
    )


def user_namespace() -> Check:
    """Whether this is the machine's own user namespace: passthrough needs it."""
    if linux.in_initial_user_namespace():
        return Check(
            "user-namespace", "ok", "the machine's own; others read a mount that is for everyone (allow_other)"
        )
    return Check(
        "user-namespace", "degraded", "not the machine's own: portable engine", "mount outside of the container"
    )


def idmapped_mounts() -> Check:
    """Whether a container's runtime can map owners on the mount (Kubernetes with user namespaces does)."""
    if linux.kernel_version() >= _IDMAP_SINCE:
        return Check("idmapped-mounts", "ok", "owners can be mapped for a container, on the source and on the mount")
    return Check(
        "idmapped-mounts",
        "degraded",
        f"{os.uname().release}: FUSE mounts can't be idmapped before 6.12; containers see the owners of the source",
        "install a newer kernel",
    )


def open_files() -> Check:
    """How many files may be open through one mount: its daemon raises the soft limit to the hard one by itself."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard >= _FILES:
        return Check("open-files", "ok", f"{hard} descriptors for a daemon")
    return Check(
        "open-files",
        "degraded",
        f"a daemon may have {hard} descriptors: about as many files can be open through a mount",
        "ulimit -Hn 1048576 (systemd: LimitNOFILE=)",
    )


def oom() -> Check:
    """Whether a daemon can keep the kernel from choosing it when memory runs out."""
    if linux.has_capability(linux.CAP_SYS_RESOURCE) and linux.in_initial_user_namespace():
        return Check("oom", "ok", f"daemons set their score to {linux.OOM_SCORE}: others are ended first")
    return Check(
        "oom",
        "degraded",
        "without CAP_SYS_RESOURCE a daemon may be ended when memory runs out, and its mount with it",
        "run it by systemd: weightfs setup",
    )


def memory_cgroup(root: str = "/") -> Check:
    """Whether a limit on memory evicts what a daemon started from here reads ahead; `root` holds `proc` and `sys`."""
    found = memory.read_memory(root)
    lowest = found.lowest
    if lowest is None:
        return Check("cgroup", "ok", "no limit on memory")
    if lowest.nbytes >= found.total_bytes:
        return Check("cgroup", "ok", "no limit on memory below what the machine has")
    return Check(
        "cgroup",
        "degraded",
        f"{lowest.path} allows {lowest.nbytes >> 20} MiB: what a daemon from here reads ahead is charged to that and "
        "evicted beyond it; what programs read through passthrough is charged to them",
        "start it outside of that group, or without MemoryMax and MemoryHigh",
    )


def watches() -> Check:
    """How many folders can be watched for changes."""
    try:
        with open("/proc/sys/fs/inotify/max_user_watches") as setting:
            count = int(setting.read())
    except OSError:
        return Check("watches", "degraded", "no inotify: changes are noticed by asking, once a second")
    if count >= _WATCHES:
        return Check("watches", "ok", f"{count} folders")
    return Check(
        "watches",
        "degraded",
        f"{count} folders: in larger sources changes are noticed by asking, once a second",
        "sysctl -w fs.inotify.max_user_watches=1048576",
    )
