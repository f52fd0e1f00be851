"""How much memory and room a snapshot takes, against what there is."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from checkpoint.findings import Finding
from checkpoint.processes import PROC, Process
from weightfs.memory import read_memory

SPARE_BYTES: Final = 64 << 20
"""What CRIU itself, its page maps and the small images take; more than was ever seen."""


def private_bytes(processes: Sequence[Process], *, proc: str = PROC) -> int:
    """What a dump has to save: memory that is in no file with a name, shared memory once.

    An upper bound: pages that are zero, and holes in shared memory, are not saved.
    """
    total = 0
    shared: dict[tuple[int, int], int] = {}
    for process in processes:
        total += _anonymous(process.pid, proc)
        for one in process.mappings:
            if "s" in one.perms and (one.is_deleted or one.is_memory):
                key = (one.device, one.inode)
                shared[key] = max(shared.get(key, 0), one.offset + one.nbytes)
    return total + sum(shared.values())


def _anonymous(pid: int, proc: str) -> int:
    try:
        with open(f"{proc}/{pid}/smaps_rollup") as file:
            lines = file.read().splitlines()
    except OSError:  # it ended, or it is a kernel thread
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("Anonymous:", "Swap:")))


class Available(NamedTuple):
    """Memory that can be had without swapping.

    Attributes:
        nbytes: how much.
        where: in words, where there is no more of it.
    """

    nbytes: int
    where: str

    def __str__(self) -> str:
        return f"{self.nbytes >> 20} MiB are free {self.where}"


def available(*, root: str = "/") -> Available:
    """What this process and what it starts can have: by the kernel's own estimate, and by the limits of its group."""
    memory = read_memory(root)
    found = [Available(one.obtainable_bytes, f"under the limit of {one.path}") for one in memory.limits]
    return min([Available(memory.available_bytes, "on this machine"), *found])


def memory_findings(
    processes: Sequence[Process], *, store: str | None, gpu_bytes: int, in_memory: bool = False, root: str = "/"
) -> Iterator[Finding]:
    """Too little room for the images, too little memory for them and for what comes from the GPU.

    Args:
        processes: the whole tree.
        store: where the images go, or what is made of them; None where that is not known.
        gpu_bytes: what the driver moves to host memory.
        in_memory: CRIU dumps into memory, and the store takes what is new to it, compressed.
        root: the folder that holds `proc` and the mounts of `sys`.
    """
    images = private_bytes(processes, proc=os.path.join(root, "proc")) + gpu_bytes
    first = processes[0].pid if processes else 0
    if store is not None:
        status = os.statvfs(store)
        free = status.f_bavail * status.f_frsize
        if SPARE_BYTES + (0 if in_memory else images) > free:
            yield Finding(
                code="store-space",
                pid=first,
                what=f"its memory is up to {images >> 20} MiB, and {store} has {free >> 20} MiB free",
                why="the images would not fit" if not in_memory else "there is no room for a snapshot",
                mend="make room (weightfs snapshot prune), or name another store with --store",
                fatal=True,
            )
    found = available(root=root)
    if gpu_bytes + SPARE_BYTES > found.nbytes:
        yield Finding(
            code="memory",
            pid=first,
            what=f"{gpu_bytes >> 20} MiB of GPU memory have to be held in memory, and {found}",
            why="the driver keeps it in host memory while the process is dumped",
            mend="release weights before the snapshot, or end something else",
            fatal=True,
        )
    elif in_memory and images + gpu_bytes + SPARE_BYTES > found.nbytes:
        yield Finding(
            code="memory",
            pid=first,
            what=f"its memory is up to {images >> 20} MiB, and {found}",
            why="it is dumped into memory, to be taken into the store from there",
            mend="end something else, or have CRIU write to the disk (--plain, which is not encrypted)",
            fatal=True,
        )
