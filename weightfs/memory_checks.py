"""How much memory prefetch may fill and lock: two checks for `weightfs doctor`."""

from __future__ import annotations

import resource
from typing import Final

from weightfs import linux
from weightfs.checks import Check
from weightfs.memory import budget_of, read_memory

_SMALL_BYTES: Final = 4 << 30
"""A limit below it holds no model worth a server."""
_PINNED_BYTES: Final = 1 << 30


def checks() -> list[Check]:
    """Every check of this module."""
    return [memory_budget(), memory_lock()]


def memory_budget(asked_bytes: int | None = None, *, root: str = "/") -> Check:
    """What a mount started from here may prefetch, and which control group its page cache is charged to.

    Args:
        asked_bytes: the budget asked for; None is the default, half of the available memory.
        root: holds `proc` and the mounts of `sys`.
    """
    memory = read_memory(root)
    budget = budget_of(asked_bytes, memory)
    wished = memory.available_bytes // 2 if asked_bytes is None else asked_bytes
    group = "no memory control group"
    if budget.cgroup is not None:
        limit = "no limit" if budget.cgroup_limit_bytes is None else f"limit {budget.cgroup_limit_bytes >> 20} MiB"
        group = f"{budget.cgroup} ({limit})"
    said = f"{budget.nbytes >> 20} MiB, {budget.limited_by}; page cache is charged to {group}"
    if memory.total_bytes == 0:
        return Check("memory-budget", "degraded", said, "mount -t proc proc /proc")
    if budget.cgroup_limit_bytes is not None and budget.cgroup_limit_bytes < max(wished, _SMALL_BYTES):
        return Check(
            "memory-budget",
            "degraded",
            said,
            "raise that limit (systemd: MemoryMax= and MemoryHigh= of the unit; docker: --memory), or ask for less: "
            "--memory-budget",
        )
    return Check("memory-budget", "ok", said)


def memory_lock() -> Check:
    """How much may be locked in memory: layers that are pinned, buffers that a GPU reads from."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if linux.has_capability(linux.CAP_IPC_LOCK) and linux.in_initial_user_namespace():
        return Check("memory-lock", "ok", "CAP_IPC_LOCK: as much may be locked as there is")
    if hard == resource.RLIM_INFINITY or hard >= _PINNED_BYTES:
        amount = "as much as there is" if hard == resource.RLIM_INFINITY else f"{hard >> 20} MiB"
        return Check("memory-lock", "ok", f"{amount} may be locked; a daemon raises its soft limit to that by itself")
    return Check(
        "memory-lock",
        "degraded",
        f"at most {hard >> 10} KiB may be locked (soft limit {soft >> 10} KiB): pinned layers (--pin-layers) and "
        "pinned buffers must fit in that",
        "LimitMEMLOCK=infinity in the unit; in a shell, as root: ulimit -l unlimited; "
        "for users: `* - memlock unlimited` in /etc/security/limits.d/weightfs.conf; docker: --ulimit memlock=-1",
    )
