"""What a snapshot of a Python process costs that has a heap and weights mapped from a mount, beside CRIU alone.

The process holds `--heap` MiB of random bytes and has mapped, and touched, `--size` MiB of weights (3072 by default)
from the mount. Bare is the criu program run with the same options on the same process or images; beside it, in turns,
runs `weightfs snapshot create --leave-running --replace` or `weightfs snapshot restore --no-verify`, as a user would,
so its time holds the start of an interpreter, which finds its bytecode compiled. A command's overhead is its time less
the phases of CRIU, of memory and of verification. Needs root and CRIU.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from _harness import Report, Samples, alternate
from _snapshotting import begun, call, run

from checkpoint import control, criu_command
from checkpoint.criu import find_criu
from checkpoint.processes import start_ticks, tree_of
from checkpoint.store import Store

PROGRAM: Final = """
import mmap, os, signal, sys
heap = bytearray(os.urandom(int(sys.argv[2]) << 20))
weights = mmap.mmap(os.open(sys.argv[1], os.O_RDONLY), 0, access=mmap.ACCESS_READ)
for at in range(0, len(weights), 4096):
    weights[at]
with open(sys.argv[3], "w"):
    pass
while True:
    signal.pause()
"""
_NAME: Final = "bench"
_DUMP_S: Final = 0.5
_RESTORE_S: Final = 0.5
_SIZE: Final = 1.1
_OVERHEAD_MS: Final = 150
_NOT_OURS: Final = ("criu restore", "memory", "verify")


class Bench:
    """The process, its snapshot and the two ways to make and restore it.

    Args:
        place: a folder for all of it.
        weights: path of the weight file on the mount.
        heap_mib: of the process.
    """

    def __init__(self, place: str, weights: str, heap_mib: int) -> None:
        self._place = place
        self._store = os.path.join(place, "snapshots")
        self._log = os.path.join(place, "process.log")
        self._criu = find_criu()
        self.created: list[dict[str, Any]] = []
        self.restored: list[dict[str, Any]] = []
        self._process = begun(PROGRAM, [weights, heap_mib], place, self._log)
        self.pid = self._process.pid

    def close(self) -> None:
        """End the process, the original or the restored."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self.end()

    def private_bytes(self) -> int:
        """What of its memory is nowhere else: anonymous pages."""
        with open(f"/proc/{self.pid}/smaps_rollup") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Anonymous:"))

    def dump_bare(self) -> float:
        """Seconds that CRIU takes."""
        with tempfile.TemporaryDirectory(dir=self._place) as images, tempfile.TemporaryDirectory() as work:
            tree = tree_of(self.pid)
            options = replace(criu_command.options_for(tree), leave_stopped=True)
            took = _timed(criu_command.dump_argv(self._criu, self.pid, images, options, work=work))
            control.resume(control.tree(tree))
        return took

    def create(self) -> float:
        """Seconds that the command takes."""
        arguments = ["create", _NAME, "--pid", str(self.pid), "--leave-running", "--replace", "--plain"]
        return self._command(arguments, self.created)

    def leave(self) -> None:
        """The process ends; its snapshot stays."""
        self._process.kill()
        self._process.wait()

    def restore_bare(self) -> float:
        """Seconds that CRIU takes."""
        snapshot = Store(self._store).open(_NAME)
        with tempfile.TemporaryDirectory() as work, open(self._log, "ab") as log:
            inherit = tuple((log.fileno(), resource) for _, resource, _ in snapshot.manifest.replaced)
            options = replace(
                criu_command.options_kept(snapshot.manifest.criu_options), leave_stopped=True, inherit=inherit
            )
            argv = criu_command.restore_argv(self._criu, snapshot.images, options, work=work)
            took = _timed(argv, pass_fds=(log.fileno(),))
        self.end()
        return took

    def restore(self, *options: str) -> float:
        """Seconds that the command takes."""
        took = self._command(["restore", _NAME, "--log", self._log, *options], self.restored)
        self.end()
        return took

    def end(self) -> None:
        """End a restored process, and wait until its pid is free."""
        if (since := start_ticks(self.pid)) is not None:
            control.end([(self.pid, since)])
        while start_ticks(self.pid) is not None:
            time.sleep(0.005)

    def _command(self, arguments: list[str], into: list[dict[str, Any]]) -> float:
        into.append(call(self._place, [*arguments, "--store", self._store, "--no-encrypt"]))
        return float(into[-1]["took"])


def _timed(argv: list[str], pass_fds: tuple[int, ...] = ()) -> float:
    started = time.perf_counter()
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, pass_fds=pass_fds, check=False)
    took = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(argv)}: status {done.returncode}: {done.stderr.decode(errors='replace')}")
    return took


@contextlib.contextmanager
def bench(place: str, weights: str, heap_mib: int) -> Iterator[Bench]:
    """One whose process ends with the block."""
    made = Bench(place, weights, heap_mib)
    try:
        yield made
    finally:
        made.close()


def phases(documents: list[dict[str, Any]], name: str) -> list[float]:
    """One phase's seconds in each document."""
    return [one["phases"][name] for one in documents]


def overhead(restored: dict[str, Any]) -> float:
    """Seconds of a command that were none of CRIU's, nor of filling memory in, nor of verification."""
    spent: dict[str, float] = restored["phases"]
    return float(restored["took"] - sum(spent.get(name, 0.0) for name in _NOT_OURS))


def dumps(report: Report, it: Bench, rounds: int) -> None:
    """Rows of making a snapshot."""
    private = it.private_bytes()
    whole = alternate(it.dump_bare, it.create, rounds)
    made = it.created[-rounds:]
    ours = Samples(whole.a, phases(made, "criu dump"))
    report.measure("dump, CRIU's part", ours, "s", _DUMP_S, "at most")
    report.record("dump, the images brought to the disk and digested", phases(made, "store"), "s", None)
    report.value("the weights' digests, the first time", it.created[0]["phases"]["weights"], "s")
    report.record("the weights' digests, from the cache", phases(made, "weights"), "s", None)
    report.measure("snapshot create, the whole command", whole, "s", None, "at most")
    report.value("images by private memory", made[-1]["bytes"]["logical"] / private, "x", _SIZE)
    report.extra["private bytes"] = {"process": private, "images": made[-1]["bytes"]["logical"]}


def restores(report: Report, it: Bench, rounds: int) -> None:
    """Rows of restoring it."""
    whole = alternate(it.restore_bare, lambda: it.restore("--no-verify"), rounds)
    back = it.restored[-rounds:]
    ours = Samples(whole.a, phases(back, "criu restore"))
    report.measure("restore, CRIU's part", ours, "s", _RESTORE_S, "at most")
    over = [1e3 * (command - bare) for bare, command in zip(whole.a, whole.b, strict=True)]
    report.record("snapshot restore over CRIU alone, unverified", over, "ms", None, note="whole command")
    begun = len(it.restored)
    both = alternate(lambda: it.restore("--no-verify"), it.restore, rounds)
    taken = it.restored[begun + 2 :]
    report.record("snapshot restore, its own overhead", [1e3 * overhead(one) for one in taken], "ms", _OVERHEAD_MS)
    report.record("of which before its first line", [1e3 * one["phases"]["start"] for one in taken], "ms", None)
    report.measure("snapshot restore, verified beside unverified", both, "s", None, "at most")
    verified = [one for one in taken if one["verified"] is not None]
    rates = [one["verified"]["nbytes"] / one["verified"]["seconds"] / 1e9 for one in verified]
    report.record(f"verification of images, {os.cpu_count()} processors", rates, "GB/s", None)
    report.record("verification, waited for", [1e3 * one["phases"]["verify"] for one in verified], "ms", None)
    report.extra["phases"] = {"create": it.created[-1]["phases"], "restore": verified[-1]["phases"]}


def measured(report: Report, given: argparse.Namespace, place: str, weights: str) -> None:
    """All rows, with a process of their own."""
    with bench(place, weights, given.heap) as it:
        dumps(report, it, given.rounds)
        it.leave()
        restores(report, it, given.rounds)


if __name__ == "__main__":
    run("snapshots", __doc__ or "", measured, size=3072)
