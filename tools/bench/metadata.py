"""Names: `find` over a library of 1,000 folders with 10 files each, and stat + open + close of known files.

Each round mounts anew (the index knows the library, except in the row that says otherwise) and runs
`find MOUNT -type f` twice in a row; the bare folders were listed before, so that all of it is in memory. Times are of
the whole `find` process.
"""

from __future__ import annotations

import functools
import os
import random
import statistics
import subprocess
import time

from _harness import Mount, Report, Samples, alternate, mounted, parser, workplace

_FILES = 10
_FILE_BYTES = 100
_KNOWN = 1000
_TIMEOUT_S = 1.0
"""How long the kernel believes names and attributes of folders that are not watched."""


def make_library(root: str, folders: int) -> list[str]:
    """The files, relative to the root."""
    files = []
    for folder in range(folders):
        os.makedirs(os.path.join(root, f"model-{folder:04}"))
        for number in range(_FILES):
            files.append(os.path.join(f"model-{folder:04}", f"file-{number}.txt"))
            with open(os.path.join(root, files[-1]), "wb") as file:
                file.write(bytes(_FILE_BYTES))
    return files


def find(root: str) -> float:
    """Seconds of `find ROOT -type f`."""
    started = time.perf_counter()
    subprocess.run(["find", root, "-type", "f"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started


def find_ms(root: str) -> float:
    """The same in ms."""
    return find(root) * 1e3


def stat_open_close_us(paths: list[str]) -> list[float]:
    """Microseconds of each stat + open + close."""
    found = []
    for path in paths:
        started = time.perf_counter_ns()
        os.stat(path)
        os.close(os.open(path, os.O_RDONLY))
        found.append((time.perf_counter_ns() - started) / 1e3)
    return found


def measure_find(report: Report, source: str, place: str, rounds: int) -> None:
    """First, second and later runs of `find`."""
    find(source)
    new, first, second, later, asked = (Samples([], []) for _ in range(5))
    for number in range(rounds):
        for state, into in ((f"new-{number}", new), ("known", first)):
            with mounted(source, place, state=state) as mount:
                report.describe(mount)
                bare_first = number % 2 == 0
                if bare_first:
                    into.a.append(find_ms(source))
                into.b.append(find_ms(mount.path))
                if into is first:
                    second.b.append(find_ms(mount.path))
                    second.a.append(find_ms(source))
                    time.sleep(1.2 * _TIMEOUT_S)
                    later.b.append(find_ms(mount.path))
                    later.a.append(find_ms(source))
                if not bare_first:
                    into.a.append(find_ms(source))
        with mounted(source, place, state="known", watch="off") as mount:
            find(mount.path)
            time.sleep(1.2 * _TIMEOUT_S)
            asked.b.append(find_ms(mount.path))
            asked.a.append(find_ms(source))
    report.compare("find, first, new index", new, "ms", 40, "at most")
    report.compare("find, first, known index", first, "ms", 40, "at most")
    report.compare("find, second", second, "ms", 3, "at most")
    note = f"{1.2 * _TIMEOUT_S:g} s later"
    report.compare("find, again", later, "ms", 3, "at most", note=note)
    report.compare("the same with --watch off", asked, "ms", None, "at most", note=note)


def measure_placed(report: Report, source: str, place: str, rounds: int) -> None:
    """The first run again, with `find` on the CPU of the daemon and on another one.

    Each request wakes the daemon and then the asker. On a virtual machine, waking an idle CPU costs more than the work.
    """
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        return
    for where, cpu in (("on the daemon's CPU", cpus[0]), ("on another CPU", cpus[1])):
        placed = Samples([], [])
        for _ in range(rounds):
            with mounted(source, place, state="known") as mount:
                daemon = mount.document["daemon_pid"]
                for thread in os.listdir(f"/proc/{daemon}/task"):
                    os.sched_setaffinity(int(thread), {cpus[0]})
                os.sched_setaffinity(0, {cpu})
                try:
                    placed.a.append(find_ms(source))
                    placed.b.append(find_ms(mount.path))
                finally:
                    os.sched_setaffinity(0, cpus)
        report.compare(f"find, first, known index, {where}", placed, "ms", None, "at most")


def measure_open(report: Report, mount: Mount, files: list[str], rounds: int) -> None:
    """stat + open + close of files looked up before, and of files whose look-up has timed out since."""
    chosen = random.Random(4).sample(files, min(_KNOWN, len(files)))
    bare = [os.path.join(mount.source, file) for file in chosen]
    through = [os.path.join(mount.path, file) for file in chosen]
    everything: dict[str, list[float]] = {"known": [], "timed out": []}

    def known() -> float:
        # In portions, so that each is used well within the time the kernel believes a name.
        found = []
        for at in range(0, len(through), 100):
            portion = through[at : at + 100]
            for path in portion:
                os.stat(path)
            found += stat_open_close_us(portion)
        everything["known"] += found
        return statistics.median(found)

    def timed_out() -> float:
        for path in through:
            os.stat(path)
        time.sleep(1.1 * _TIMEOUT_S)
        found = stat_open_close_us(through)
        everything["timed out"] += found
        return statistics.median(found)

    of_bare = lambda: statistics.median(stat_open_close_us(bare))  # noqa: E731
    report.measure("stat + open + close of a known file", alternate(of_bare, known, rounds), "us", 300, "at most")
    report.measure("the same, after its name timed out", alternate(of_bare, timed_out, rounds), "us", None, "at most")
    report.extra["percentiles, us"] = {}
    for name, found in everything.items():
        steps = statistics.quantiles(found, n=100)
        report.extra["percentiles, us"][name] = {"p50": round(steps[49], 1), "p99": round(steps[98], 1)}


def main() -> None:
    """Run it."""
    options = parser(__doc__ or "")
    options.add_argument("--folders", type=int, default=1000, help="folders of 10 files each (default 1000)")
    chosen = options.parse_args()
    report = Report("metadata", chosen)
    with workplace(chosen.folder) as place:
        source = os.path.join(place, "source")
        files = make_library(source, chosen.folders)
        with mounted(source, place, state="known") as mount:  # the index gets to know the library here
            find(mount.path)
        measure_find(report, source, place, chosen.rounds)
        measure_placed(report, source, place, chosen.rounds)
        with mounted(source, place, state="known") as mount:
            report.extra["requests"] = {
                f"find, {which}": mount.requests_of(functools.partial(find, mount.path))
                for which in ("first", "second")
            }
            known = [os.path.join(mount.path, file) for file in files[:100]]
            report.extra["requests"]["look-up, then stat + open + close, of 100 files"] = mount.requests_of(
                lambda: [os.stat(path) for path in known] and stat_open_close_us(known)
            )
            measure_open(report, mount, files, chosen.rounds)
    report.finish()


if __name__ == "__main__":
    main()
