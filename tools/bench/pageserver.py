"""How long a process with `--size` MiB of anonymous memory takes to come back, its images in the page cache.

Four ways, one after the other in every round: CRIU alone; `criu lazy-pages`; the page server of `checkpoint`, the
process running meanwhile; the same with the process stopped until all is there, as `snapshot restore` has it. From the
start of the restore to the last page; and to the first instruction of the process, which is a loop of half a
millisecond's sleep that notes when it has not run for long. After each restore it compares its memory's digest.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from _harness import Report, Samples, parser, workplace

from checkpoint import control, processes
from checkpoint.criu import dump, find_criu, options_for, restore, restore_options_of
from checkpoint.criu_command import Criu, RestoreOptions
from checkpoint.pageserver import SOCKET, PageServer
from tests.helpers.targets import end, target

_TARGET: Final = """
import hashlib
ballast = bytearray(os.urandom(16 << 20)) * (int(sys.argv[2]) // 16)
want = hashlib.blake2b(ballast).digest()
tell("ready")
last = time.time()
while True:
    time.sleep(0.0005)
    now = time.time()
    if now - last > 0.1:
        tell(now)
    last = now
    if signal.sigpending():
        wait()
        tell("same" if hashlib.blake2b(ballast).digest() == want else "other")
        last = time.time()
"""
_LIMIT_S: Final = 120.0


@dataclass
class Times:
    """What a way of restoring took, in seconds, a value a round."""

    first: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A dumped process."""

    criu: Criu
    images: str
    options: RestoreOptions
    threads: int | None


def alone(place: Place, work: str) -> float:
    """CRIU reads memory back."""
    restore(place.criu, place.images, place.options, _LIMIT_S, work=work)
    return time.monotonic()


def lazily(place: Place, work: str) -> float:
    """CRIU's page server."""
    command = [place.criu.path, "lazy-pages", "--no-default-config", "--images-dir", place.images, "--work-dir", work]
    with subprocess.Popen([*command, "--log-file", "lazy.log"], stdin=subprocess.DEVNULL) as daemon:
        while not os.path.exists(os.path.join(work, SOCKET)):
            if daemon.poll() is not None:
                raise SystemExit(f"criu lazy-pages ended with {daemon.returncode}")
            time.sleep(0.0005)
        restore(place.criu, place.images, replace(place.options, lazy_pages=True), _LIMIT_S, work=work)
        if status := daemon.wait(_LIMIT_S):
            raise SystemExit(f"criu lazy-pages ended with {status}")
    return time.monotonic()


def running(place: Place, work: str) -> float:
    """Our page server; the process goes on as soon as it can."""
    return _served(place, work, replace(place.options, lazy_pages=True))


def stopped(place: Place, work: str) -> float:
    """Our page server; the process goes on once all is there."""
    return _served(place, work, replace(place.options, lazy_pages=True, leave_stopped=True))


def _served(place: Place, work: str, options: RestoreOptions) -> float:
    with PageServer(place.images, work, threads=place.threads) as server:
        pid = restore(place.criu, place.images, options, _LIMIT_S, work=work, check=server.check)
        server.finish(_LIMIT_S)
        done = time.monotonic()
        if options.leave_stopped:
            control.resume(processes.family(pid))
    return done


WAYS: Final[dict[str, Callable[[Place, str], float]]] = {
    "CRIU alone": alone,
    "criu lazy-pages": lazily,
    "page server, running": running,
    "page server, stopped": stopped,
}


@contextlib.contextmanager
def dumped(folder: str, mib: int, threads: int | None) -> Iterator[tuple[Place, Callable[[], str], str, int]]:
    """A process in images: how to restore it, how to ask it whether its memory is the same, where it tells, its pid."""
    criu = find_criu()
    images = os.path.join(folder, "images")
    os.mkdir(images, 0o700)
    with target(_TARGET, Path(folder), str(mib)) as one:
        if one.said(timeout_s=_LIMIT_S) != "ready":
            raise SystemExit("the process to be dumped is not ready")
        options = options_for(processes.tree_of(one.pid))
        dump(criu, one.pid, images, options, _LIMIT_S)
        one.process.wait(10)
        yield (
            Place(criu=criu, images=images, options=restore_options_of(options), threads=threads),
            one.ask,
            one.told,
            one.pid,
        )


def measure(options: argparse.Namespace, folder: str) -> dict[str, Times]:
    """All rounds, after one of each way that does not count."""
    times = {name: Times() for name in WAYS}
    with dumped(folder, options.size, options.threads) as (place, ask, told, pid):
        for number in range(options.rounds + 1):
            for name, way in WAYS.items():
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(told)
                with tempfile.TemporaryDirectory(dir=folder) as work:
                    began = time.monotonic()
                    since = time.time()
                    last = way(place, work) - began
                first = _first(told) - since
                if ask() != "same":
                    raise SystemExit(f"{name}: memory is not what it was")
                _ended(pid)
                if number:
                    times[name].first.append(first)
                    times[name].last.append(last)
    return times


def _first(told: str) -> float:
    until = time.monotonic() + _LIMIT_S
    while time.monotonic() < until:
        with contextlib.suppress(FileNotFoundError):
            return float(Path(told).read_text())
        time.sleep(0.001)
    raise SystemExit("the process did not run")


def _ended(pid: int) -> None:
    end(pid)
    while processes.start_ticks(pid) is not None:  # until whoever it belongs to has waited for it
        time.sleep(0.001)


def main() -> None:
    """Run it."""
    options = parser(__doc__ or "")
    options.set_defaults(size=1024)
    options.add_argument("--threads", type=int, default=None, help="that copy (default: one a processor, 16 at most)")
    given = options.parse_args()
    report = Report("pageserver", given)
    with workplace(given.folder) as folder:
        times = measure(given, folder)
    target_x = 8.0 if len(os.sched_getaffinity(0)) >= 16 else 1.5
    ours = times["page server, running"]
    for name in ("CRIU alone", "criu lazy-pages"):
        for way in ("page server, running", "page server, stopped"):
            wanted = target_x if name == "criu lazy-pages" else None
            faster = Samples(
                [given.size / 1024 / one for one in times[name].last],
                [given.size / 1024 / one for one in times[way].last],
            )
            report.compare(f"restore to the last page, {way}, against {name}", faster, "GiB/s", wanted, "at least")
    report.record("first instruction, page server, running", [1000 * one for one in ours.first], "ms", 150)
    report.record(
        "first instruction, criu lazy-pages", [1000 * one for one in times["criu lazy-pages"].first], "ms", None
    )
    report.record("last page, page server, running", [1000 * one for one in ours.last], "ms", None)
    report.value(
        "peak memory of the process that serves", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "MiB", 256
    )
    report.finish()


if __name__ == "__main__":
    main()
