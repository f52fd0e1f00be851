"""A large library: 1,000 folders, 10,000 weight files, 1,000,000 tensors by default, as sparse files.

How long `weightfs mount` takes until it serves (without an index, with one, with one whose daemon was killed), how
long indexing behind it takes, what the daemon's memory and the index grow to, and what requests cost meanwhile. The
library's names and headers are in memory; `RssAnon` is the daemon's memory that is no page of a file.

    python tools/bench/scale.py --churn [--opens 1000000] [--days 30]

measures instead what grows over time: memory, descriptors and latency over many opens of one mount, and memory, index
and dropped rows over days on each of which models come, change and go. A day is a crawl here, and look-ups of every
tensor of some folders; it runs in this process, on the parts that a mount is made of.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from typing import Any, Final

from _harness import MIB, WEIGHTFS, Mount, Report, mounted, parser, unmount, workplace
from metadata import stat_open_close_us

from weightfs.filesystem import Filesystem, FilesystemConfig
from weightfs.handles import HandleTable
from weightfs.index.schema import ROOT_INODE
from weightfs.index.store import IndexStore
from weightfs.indexing import Indexer
from weightfs.source.local import LocalSource

_TOOL: Final = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "make_library.py")
_KNOWN: Final = 500
_INDEXING_S: Final = 120


def make(root: str, folders: int, files: int, tensors: int) -> None:
    """Make the library, or a part of one."""
    numbers = ["--folders", str(folders), "--files", str(files), "--tensors", str(tensors)]
    subprocess.run([sys.executable, _TOOL, root, *numbers], stdout=sys.stderr, check=True)


def rss_anon_mib(pid: int | str) -> float:
    """Memory of a process that is no page of a file."""
    with open(f"/proc/{pid}/status") as status:
        return int(next(line.split()[1] for line in status if line.startswith("RssAnon:"))) / 1024


def indexing(mount: Mount) -> dict[str, Any]:
    """What the mount says of its crawl."""
    return dict(mount.status()["indexing"])


def wait_until_indexed(mount: Mount) -> dict[str, Any]:
    """The crawl once it has ended."""
    ends = time.monotonic() + _INDEXING_S
    while not (now := indexing(mount))["done"]:
        if time.monotonic() > ends:
            raise SystemExit(f"indexing takes over {_INDEXING_S} s: {now}")
        time.sleep(0.2)
    return now


def weight_files(root: str) -> list[str]:
    """Relative to the root."""
    return sorted(
        os.path.relpath(os.path.join(folder, name), root)
        for folder, _, names in os.walk(root)
        for name in names
        if name.endswith(".safetensors")
    )


def disk_mib(folder: str) -> float:
    """What the files in a state folder take on the disk."""
    return sum(os.stat(entry.path).st_blocks * 512 for entry in os.scandir(folder)) / MIB


def percentile(values: list[float], share: int) -> float:
    """The value that `share` percent are not above."""
    return statistics.quantiles(values, n=100)[share - 1]


def measure_start(report: Report, source: str, place: str, rounds: int) -> None:
    """From the command to the return of `weightfs mount`."""
    seconds: dict[str, list[float]] = {"no index": [], "known index": [], "index of a killed daemon": []}
    crawled = []
    for number in range(rounds):
        state = f"state-{number}"
        with mounted(source, place, state=state) as mount:
            seconds["no index"].append(mount.start_s)
            report.describe(mount)
            crawled.append(wait_until_indexed(mount)["seconds"])
        with mounted(source, place, state=state) as mount:
            seconds["known index"].append(mount.start_s)
            wait_until_indexed(mount)
            os.kill(mount.document["daemon_pid"], signal.SIGKILL)
            unmount(mount.path, [WEIGHTFS, "umount", "--lazy", mount.path], ["umount", "-l", mount.path])
        with mounted(source, place, state=state) as mount:
            seconds["index of a killed daemon"].append(mount.start_s)
            aside = mount.status()["index"]["set_aside"]
            assert aside is None, aside
        if number < rounds - 1:
            shutil.rmtree(os.path.join(place, state))
    for which, values in seconds.items():
        report.record(f"from the command to serving, {which}", values, "s", 1.5)
    report.record("indexing, from serving on", crawled, "s", 60)
    report.record("index on the disk", [disk_mib(os.path.join(place, f"state-{rounds - 1}"))], "MiB", None)


def measure_requests(report: Report, source: str, place: str, rounds: int) -> None:
    """What stat + open + close costs while headers are read, and after; memory at the end of each step."""
    chosen = random.Random(4).sample(files := weight_files(source), min(_KNOWN, len(files)))
    during: list[float] = []
    after: list[float] = []
    memory: dict[str, list[float]] = {"indexed": [], "every tensor listed": []}
    slowed = []
    for number in range(rounds):
        with mounted(source, place, state=f"requests-{number}") as mount:
            through = [os.path.join(mount.path, file) for file in chosen]
            daemon = mount.document["daemon_pid"]
            while not indexing(mount)["done"]:
                for path in through:
                    os.stat(path)
                found = stat_open_close_us(through)
                if not (now := indexing(mount))["done"] and now["headers"]:
                    during += found
            slowed.append(indexing(mount)["seconds"])
            memory["indexed"].append(rss_anon_mib(daemon))
            for _ in range(10):
                for path in through:
                    os.stat(path)
                after += stat_open_close_us(through)
            for folder in sorted(os.listdir(mount.path)):
                os.listdir(os.path.join(mount.path, folder, ".tensors", "model"))
            memory["every tensor listed"].append(rss_anon_mib(daemon))
        shutil.rmtree(os.path.join(place, f"requests-{number}"))
    for when, values in (("while indexing", during), ("after it", after)):
        if len(values) >= 100:
            for share in (50, 99):
                report.record(f"stat + open + close {when}, p{share}", [percentile(values, share)], "us", None)
            report.extra.setdefault("slowest stat + open + close, us", {})[when] = round(max(values))
    report.record("indexing while these requests are served", slowed, "s", 60)
    for when, values in memory.items():
        report.record(f"RssAnon of the daemon, {when}", values, "MiB", 200)


# Over time


def measure_opens(report: Report, source: str, place: str, opens: int) -> None:
    """Many opens of one mount."""
    files = weight_files(source)
    order = random.Random(5)
    steps: dict[str, Any] = {}
    with mounted(source, place, state="opens") as mount:
        wait_until_indexed(mount)
        daemon = mount.document["daemon_pid"]
        paths = [os.path.join(mount.path, file) for file in files]
        memory, descriptors, latency = [], [], []
        step = max(opens // 10, 1)
        for number in range(10):
            took = [one for _ in range(step // 100) for one in opens_us(order.choices(paths, k=100))]
            memory.append(rss_anon_mib(daemon))
            time.sleep(0.2)  # the kernel sends RELEASE after close(2) has returned
            descriptors.append(len(os.listdir(f"/proc/{daemon}/fd")))
            latency.append(statistics.median(took))
            steps[f"{(number + 1) * step} opens"] = (
                f"RssAnon {memory[-1]:.1f} MiB, {descriptors[-1]} descriptors, "
                f"p50 {latency[-1]:.0f} us, p99 {percentile(took, 99):.0f} us"
            )
        served = mount.status()["opens"]
    report.extra["opens"] = steps
    report.record(f"RssAnon after {served} opens", [memory[-1]], "MiB", 200)
    report.record("RssAnon, last tenth of the opens against the second", [memory[-1] - memory[1]], "MiB", 5)
    report.record("descriptors, the same", [float(descriptors[-1] - descriptors[1])], "more", 0)
    report.record("open + close, last tenth of the opens by the first", [latency[-1] / latency[0]], "x", 1.2)


def opens_us(paths: list[str]) -> list[float]:
    """Microseconds of each open + close."""
    found = []
    for path in paths:
        started = time.perf_counter_ns()
        os.close(os.open(path, os.O_RDONLY))
        found.append((time.perf_counter_ns() - started) / 1e3)
    return found


class Days:
    """A library that changes from day to day, and the parts of a mount that live through it."""

    def __init__(self, place: str, folders: int) -> None:
        self.root = os.path.join(place, "changing")
        self._fresh = os.path.join(place, "fresh")
        self._folders = folders
        self._made = 0
        self._random = random.Random(6)
        os.makedirs(self.root)
        self._add(folders)
        self.source = LocalSource(self.root)
        self.index = IndexStore(os.path.join(place, "days"), self.root)
        handles = HandleTable()
        self.filesystem = Filesystem(self.source, self.index, handles, {}, FilesystemConfig())
        self.indexer = Indexer(self.source, self.index, handles, self.filesystem)

    def _add(self, folders: int) -> None:
        make(self._fresh, folders, 10 * folders, 1000 * folders)
        for name in os.listdir(self._fresh):
            self._made += 1
            os.rename(os.path.join(self._fresh, name), os.path.join(self.root, f"model-{self._made:06}"))

    def change(self) -> None:
        """Replace a tenth of the folders; touch, which changes identity, a tenth of the files."""
        names = sorted(os.listdir(self.root))
        for name in self._random.sample(names, len(names) // 10):
            shutil.rmtree(os.path.join(self.root, name))
        self._add(len(names) // 10)
        files = weight_files(self.root)
        for file in self._random.sample(files, len(files) // 10):
            os.utime(os.path.join(self.root, file))

    async def use(self) -> None:
        """Look every folder up and list it; list the tensors of some."""
        names = sorted(os.listdir(self.root))
        chosen = set(self._random.sample(names, max(len(names) // 5, 1)))
        for name in names:
            folder = await self.filesystem.lookup(ROOT_INODE, os.fsencode(name))
            for entry in await self.filesystem.readdir(folder.inode, 0):
                self.filesystem.listed(entry)
                self.filesystem.forget(entry.attributes.inode, 1)
            if name in chosen:
                views = await self.filesystem.lookup(folder.inode, b".tensors")
                for entry in await self.filesystem.readdir(views.inode, 0):
                    list(await self.filesystem.readdir(entry.attributes.inode, 0))
                self.filesystem.forget(views.inode, 1)
            self.filesystem.forget(folder.inode, 1)


def measure_days(report: Report, place: str, days: int, folders: int) -> None:
    """What grows while a library changes."""
    import trio

    world = Days(place, folders)
    sizes, memory, taken = [], [], []
    report.extra["days"] = {}
    for day in range(days + 1):
        if day:
            world.change()
        world.indexer.crawl()
        trio.run(world.use)
        world.index.flush()
        done = world.indexer.status()
        sizes.append(os.path.getsize(os.path.join(place, "days", "index.lmdb")) / MIB)
        memory.append(rss_anon_mib("self"))
        taken.append(done["seconds"])
        report.extra["days"][str(day)] = (
            f"index {sizes[-1]:.1f} MiB, {done['headers']} headers, {done['dropped']} rows dropped in "
            f"{done['seconds']:.1f} s; RssAnon of this process {memory[-1]:.1f} MiB; failure {done['failure']}"
        )
        print(f"  day {day}: {report.extra['days'][str(day)]}", file=sys.stderr, flush=True)
    world.index.close()
    world.source.close()
    tenth = max(days // 3, 1)
    report.record(f"index after {days} days by that after {tenth}", [sizes[-1] / sizes[tenth]], "x", 1.1)
    report.record(f"memory after {days} days less that after {tenth}", [memory[-1] - memory[tenth]], "MiB", 10)


def main() -> None:
    """Run it."""
    options = parser(__doc__ or "")
    options.set_defaults(rounds=3)
    options.add_argument("--folders", type=int, default=1000)
    options.add_argument("--files", type=int, default=10_000)
    options.add_argument("--tensors", type=int, default=1_000_000)
    options.add_argument("--churn", action=argparse.BooleanOptionalAction, default=False, help="what grows over time")
    options.add_argument("--opens", type=int, default=1_000_000, help="with --churn; 0 leaves them out")
    options.add_argument("--days", type=int, default=30, help="with --churn; 0 leaves them out")
    chosen = options.parse_args()
    report = Report("scale", chosen)
    with workplace(chosen.folder) as place:
        source = os.path.join(place, "source")
        if not chosen.churn or chosen.opens:
            make(source, chosen.folders, chosen.files, chosen.tensors)
        if not chosen.churn:
            measure_start(report, source, place, chosen.rounds)
            measure_requests(report, source, place, chosen.rounds)
        else:
            if chosen.opens:
                measure_opens(report, source, place, chosen.opens)
            if chosen.days:
                measure_days(report, place, chosen.days, max(chosen.folders // 10, 10))
    report.finish()


if __name__ == "__main__":
    main()
