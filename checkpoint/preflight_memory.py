"""How much memory and room a snapshot takes, against what there is."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Final

from checkpoint.findings import Finding
from checkpoint.processes import PROC, Process

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


def available_bytes(*, proc: str = PROC) -> int:
    """What can be had without swapping, by the kernel's own estimate."""
    with open(f"{proc}/meminfo") as file:
        return int(next(line for line in file if line.startswith("MemAvailable:")).split()[1]) << 10


def memory_findings(
    processes: Sequence[Process], *, store: str | None, gpu_bytes: int, in_memory: bool = False, proc: str = PROC
) -> Iterator[Finding]:
    """Too little room for the images, too little memory for them and for what comes from the GPU.

    Args:
        processes: the whole tree.
        store: where the images go, or what is made of them; None where that is not known.
        gpu_bytes: what the driver moves to host memory.
        in_memory: CRIU dumps into memory, and the store takes what is new to it, compressed.
        proc: where /proc is.
    """
    images = private_bytes(processes, proc=proc) + gpu_bytes
    root = processes[0].pid if processes else 0
    if store is not None:
        status = os.statvfs(store)
        free = status.f_bavail * status.f_frsize
        if SPARE_BYTES + (0 if in_memory else images) > free:
            yield Finding(
                code="store-space",
                pid=root,
                what=f"its memory is up to {images >> 20} MiB, and {store} has {free >> 20} MiB free",
                why="the images would not fit" if not in_memory else "there is no room for a snapshot",
                mend="make room (weightfs snapshot prune), or name another store with --store",
                fatal=True,
            )
    available = available_bytes(proc=proc)
    if gpu_bytes + SPARE_BYTES > available:
        yield Finding(
            code="memory",
            pid=root,
            what=f"{gpu_bytes >> 20} MiB of GPU memory have to be held, and {available >> 20} MiB of memory are free",
            why="the driver keeps it in host memory while the process is dumped",
            mend="release weights before the snapshot, or end something else",
            fatal=True,
        )
    elif in_memory and images + gpu_bytes + SPARE_BYTES > available:
        yield Finding(
            code="memory",
            pid=root,
            what=f"its memory is up to {images >> 20} MiB, and {available >> 20} MiB of memory are free",
            why="it is dumped into memory, to be taken into the store from there",
            mend="end something else, or have CRIU write to the disk (--plain, which is not encrypted)",
            fatal=True,
        )
