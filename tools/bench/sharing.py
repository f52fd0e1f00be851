"""What 1, 2 and 4 restores of one snapshot take together on one host: memory, page cache, time, and what was read.

The process has mapped `--size` MiB of weights from the mount (512 by default; `--gigabytes` says it in GiB), has copied
a quarter of them into memory of its own, and has a heap of `--heap` MiB, half of it compressible as a Python heap is
and half random. It is snapshotted once, encrypted, and then restored by so many commands at once, each into namespaces
of its own, as a second instance is. Before each time the packs are dropped from the page cache, and nothing else is.

PSS is the kernel's (smaps_rollup): a page that several processes have mapped counts for each of them in part. "Read" is
what block devices were asked for by the commands and all their children (read_bytes in /proc/PID/io): 1 x the packs is
each chunk read once, however many restores there are. A filesystem without a block device counts nothing there. Needs
root, CRIU and userfaultfd.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from _harness import MIB, Report, drop, resident
from _snapshotting import begun, call, finished, new_key, run, start

from checkpoint.processes import start_ticks, tree_of

PROGRAM: Final = """
import mmap, os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
fd = os.open(sys.argv[1], os.O_RDONLY)
weights = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
for at in range(0, len(weights), 4096):
    weights[at]
copied = mmap.mmap(-1, len(weights) // 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
copied[:] = weights[:len(copied)]
half = int(sys.argv[2]) << 19
words = [os.urandom(5).hex().encode() for _ in range(4096)]
heap = bytearray(b" ".join(words[i % 4096] + b"%d" % i for i in range(half // 16)))
noise = bytearray(os.urandom(half))
while True:
    open(sys.argv[3], "w").close()
    signal.sigwait({signal.SIGUSR1})
    for at in range(0, len(weights), 4096):
        weights[at]
"""
"""Touches its weights again whenever it is asked to, as a server does at a request."""
_TOGETHER: Final = (1, 2, 4)
_READ: Final = 1.1
"""Of what the packs take: what is read ahead around them included."""
_TOUCHED_S: Final = 60


class Bench:
    """A snapshot and its restores.

    Args:
        place: a folder for all of it.
        weights: path of the weight file on the mount.
        heap_mib: of the process, beside the weights.
    """

    def __init__(self, place: str, weights: str, heap_mib: int) -> None:
        self._place = place
        self._weights = weights
        self._log = os.path.join(place, "process.log")
        self._common = ["--store", os.path.join(place, "snapshots"), *new_key(place)]
        process = begun(PROGRAM, [weights, heap_mib], place, self._log)
        self.made = call(place, ["create", "warm", "--pid", str(process.pid), *self._common])
        process.wait()

    @property
    def packs(self) -> list[str]:
        """The files of the store's chunks."""
        folder = os.path.join(self._place, "snapshots", ".chunks")
        return [os.path.join(folder, name) for name in sorted(os.listdir(folder))]

    @contextmanager
    def restored(self, count: int) -> Iterator[list[dict[str, Any]]]:
        """Restores at once; they end with the block. Each document has the seconds it `took`."""
        began = time.perf_counter()
        arguments = ["restore", "warm", "--new-pidns", "--log", self._log, *self._common]
        waiting = [start(self._place, arguments) for _ in range(count)]
        documents: list[dict[str, Any]] = []
        failed: SystemExit | None = None
        while waiting:
            for command in [each for each in waiting if each.poll() is not None]:
                waiting.remove(command)
                try:
                    documents.append({**finished(command), "took": time.perf_counter() - began})
                except SystemExit as e:
                    failed = e
            time.sleep(0.001)
        try:
            if failed is not None:
                raise failed
            yield documents
        finally:
            for one in documents:
                os.kill(one["pid"], signal.SIGKILL)
            while any(start_ticks(one["pid"]) is not None for one in documents):
                time.sleep(0.005)

    def touch(self, pids: list[int]) -> None:
        """Have processes look at all of their weights."""
        ready = os.path.join(self._place, "ready")
        for pid in pids:
            os.kill(pid, signal.SIGUSR1)
            until = time.monotonic() + _TOUCHED_S
            while not os.path.exists(ready):
                if time.monotonic() > until:
                    raise SystemExit(f"process {pid} does not answer: see {self._log}")
                time.sleep(0.001)
            os.unlink(ready)


def pss(pids: list[int]) -> dict[str, int]:
    """Bytes that processes and their descendants take together: all, and those of files."""
    found = dict.fromkeys(("Pss", "Pss_File"), 0)
    for pid in pids:
        for one in tree_of(pid):
            with open(f"/proc/{one.pid}/smaps_rollup") as file:
                for line in file:
                    name, _, rest = line.partition(":")
                    if name in found:
                        found[name] += int(rest.split()[0]) << 10
    return found


def read_bytes() -> int:
    """What block devices were asked for by this process and all its children that have ended."""
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("read_bytes:"))


def cached(paths: list[str]) -> int:
    """How many bytes of files are in memory."""
    return round(sum(resident(path) * os.stat(path).st_size for path in paths))


def measured(report: Report, given: argparse.Namespace, place: str, weights: str) -> None:
    """All rows."""
    it = Bench(place, weights, given.heap)
    source = os.path.join(place, "source", "weights.bin")
    packs = sum(os.stat(path).st_size for path in it.packs)
    with it.restored(1):  # what is compiled and looked up once
        pass
    for count in _TOGETHER:
        took: list[float] = []
        read, memory, files, inserted = [], [], [], []
        for _ in range(given.rounds):
            report.residency(f"{count} restores: packs", [], share=max(drop(path) for path in it.packs))
            before = read_bytes(), cached(it.packs)
            with it.restored(count) as documents:
                read.append((read_bytes() - before[0]) / packs)
                inserted.append((cached(it.packs) - before[1]) / packs)
                took += [one["took"] for one in documents]
                pids = [one["pid"] for one in documents]
                it.touch(pids)
                total = pss(pids)
                memory.append(total["Pss"] / MIB)
                files.append(total["Pss_File"] / MIB)
        what = f"{count} at once"
        report.record(f"{what}: seconds each", took, "s", None)
        report.record(f"{what}: total PSS", memory, "MiB", None)
        report.record(f"{what}: of which files, weights above all", files, "MiB", None)
        report.value(f"{what}: page cache, packs", cached(it.packs) / MIB, "MiB")
        report.value(f"{what}: page cache, weights", cached([source]) / MIB, "MiB")
        report.record(f"{what}: read from disks by packs", read, "x", _READ)
        report.record(f"{what}: packs' bytes that came into the page cache", inserted, "x", None)
    report.extra["sizes"] = {"packs": packs, "images": it.made["bytes"]}


def gigabytes(options: argparse.ArgumentParser) -> None:
    """Another way to say how large the weights are."""
    options.add_argument(
        "--gigabytes", dest="size", type=lambda text: round(float(text) * 1024), help="as --size, in GiB"
    )


if __name__ == "__main__":
    run("sharing", __doc__ or "", measured, size=512, heap=128, options=gigabytes)
