"""What a snapshot takes in the store, and its restore from there, beside CRIU's images as they are.

The process has `--size` MiB of weights (1024 by default), which it has copied from a mount into memory of its own, and
`--heap` MiB of which half are compressible as a Python heap is, a quarter are zeros, and a quarter are random. It is
snapshotted three times: plain, not encrypted, encrypted; and two are restored in turns: first CRIU reading plain images
back (bare) and the encrypted one, then the one that is not encrypted (bare) and the encrypted one. Commands are run as
a user does, and tell their phases. Needs root, CRIU and userfaultfd.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from typing import Any, Final

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from _harness import Report, alternate
from _snapshotting import begun, call, new_key, run

from checkpoint.processes import start_ticks

PROGRAM: Final = """
import mmap, os, signal, sys
weights = mmap.mmap(-1, os.stat(sys.argv[1]).st_size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
held = open(sys.argv[1], "rb", buffering=0)
view, at = memoryview(weights), 0
while at < len(view):
    at += held.readinto(view[at:at + (64 << 20)])
half = int(sys.argv[2]) << 19
words = [os.urandom(5).hex().encode() for _ in range(4096)]
heap = bytearray(b" ".join(words[i % 4096] + b"%d" % i for i in range(half // 16)))
noise = bytearray(os.urandom(half // 2))
zeros = mmap.mmap(-1, half // 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for at in range(0, len(zeros), 4096):
    zeros[at] = 1
    zeros[at] = 0
with open(sys.argv[3], "w"):
    pass
while True:
    signal.pause()
"""
_ENCRYPTION: Final = 1.1
_PLAIN: Final = round(1 / 3, 2)


class Bench:
    """A process and its snapshots.

    Args:
        place: a folder for all of it.
        weights: path of the weight file on the mount.
        heap_mib: of the process, beside the weights.
    """

    def __init__(self, place: str, weights: str, heap_mib: int) -> None:
        self._place = place
        self._store = os.path.join(place, "snapshots")
        self._log = os.path.join(place, "process.log")
        self._keys = {"encrypted": new_key(place)}
        self._process = begun(PROGRAM, [weights, heap_mib], place, self._log)

    def close(self) -> None:
        """End the process, the original or the restored."""
        if start_ticks(self._process.pid) is not None:
            os.kill(self._process.pid, signal.SIGKILL)
        if self._process.returncode is None:
            self._process.wait()
        while start_ticks(self._process.pid) is not None:
            time.sleep(0.005)

    def create(self, kind: str, name: str) -> dict[str, Any]:
        """Snapshot it; it goes on."""
        plain = ["--plain"] if kind == "plain" else []
        return self._command("create", name, kind, "--pid", str(self._process.pid), "--leave-running", *plain)

    def restore(self, kind: str, *options: str) -> dict[str, Any]:
        """Restore the snapshot of that kind, and end it."""
        try:
            return self._command("restore", kind, kind, "--log", self._log, *options)
        finally:
            self.close()

    def _command(self, action: str, name: str, kind: str, *arguments: str) -> dict[str, Any]:
        keys = self._keys.get(kind, ["--no-encrypt"])
        return call(self._place, [action, name, *arguments, *keys, "--store", self._store])


def whole(document: dict[str, Any]) -> float:
    """Seconds of a command."""
    return float(sum(document["phases"].values()))


def measure(report: Report, it: Bench, rounds: int) -> None:
    """All rows."""
    made = {kind: it.create(kind, kind) for kind in ("plain", "open", "encrypted")}
    again = it.create("encrypted", "again")
    it.close()
    logical = made["encrypted"]["bytes"]["logical"]
    for kind, one in made.items():
        report.value(f"stored by images, {kind}", one["bytes"]["stored"] / logical, "x")
    report.value("a second snapshot of the same process adds", again["bytes"]["stored"] / logical, "x")
    report.record(
        "ingest", [logical / one["phases"]["ingest"] / 1e9 for one in (made["encrypted"], again)], "GB/s", None
    )
    restored: dict[str, list[dict[str, Any]]] = {}

    def restore(kind: str, *options: str) -> float:
        found = it.restore(kind, *options)
        restored.setdefault(kind, []).append(found)
        return whole(found)

    both = alternate(lambda: restore("plain", "--plain", "--no-verify"), lambda: restore("encrypted"), rounds)
    report.compare("restore, encrypted, beside CRIU reading plain images", both, "s", _PLAIN, "at most")
    both = alternate(lambda: restore("open"), lambda: restore("encrypted"), rounds)
    report.compare("encryption's cost: restore, encrypted, beside one that is not", both, "s", _ENCRYPTION, "at most")
    last = restored["encrypted"][-rounds:]
    rates = [one["memory"]["bytes_copied"] / one["memory"]["seconds"] / 1e9 for one in last]
    report.record("page server, from recipes, encrypted", rates, "GB/s", None)
    report.extra["phases"] = {"create": made["encrypted"]["phases"], "restore": last[-1]["phases"]}
    report.extra["memory"] = last[-1]["memory"]


def measured(report: Report, given: argparse.Namespace, place: str, weights: str) -> None:
    """All rows, with a process of their own."""
    it = Bench(place, weights, given.heap)
    try:
        measure(report, it, given.rounds)
    finally:
        it.close()


if __name__ == "__main__":
    run("stored", __doc__ or "", measured, size=1024)
