"""What users of a mount notice of daemons that die, are replaced or stand still, of a dead supervisor, of churn.

Eight threads open, pread, mmap, stat, list and close, views included, and compare every byte with the source; beside
them a process loads a file with safetensors over and over. Meanwhile the daemon is killed with SIGKILL `--kills` times,
or replaced by `mount --replace` `--replaces` times, within `--seconds`. There is nothing to compare with: the bare
folder has no daemon.

The threads share one interpreter, so a call's time holds what it waits for the interpreter's lock: some milliseconds.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from _harness import MIB, Mount, Report, mounted, parser, workplace, write_file

from tests.helpers.footprint import Footprint, live
from tests.helpers.load import Load, Loader, write_samples
from tests.helpers.mounting import Daemon, mounts_below, weightfs

_SLOWEST_S: Final = 0.5
_FREED_S: Final = 1.0
_STUCK_S: Final = 15.0
_GIVEN_UP_S: Final = 60.0
_ENGINES: Final = ("passthrough", "portable")


def kill_daemon(mount: Mount) -> None:
    """SIGKILL to whoever serves."""
    daemon = Daemon(live(mount.path)["daemon_pid"])
    daemon.signal(signal.SIGKILL)
    daemon.has_ended(5)
    daemon.close()


def replace(mount: Mount, state: str) -> None:
    """`weightfs mount --replace`, as an upgrade does it."""
    engine = mount.document["engine"]
    done = weightfs("mount", "--replace", mount.source, mount.path, "--engine", engine, "--state-dir", state, "--json")
    if done.returncode:
        raise SystemExit(f"--replace: status {done.returncode}: {done.stdout}{done.stderr}")


def time_until(condition: Callable[[], bool]) -> float:
    """Seconds until it holds; a minute when it does not hold by then."""
    started = time.monotonic()
    while not condition() and time.monotonic() - started < _GIVEN_UP_S:
        time.sleep(0.002)
    return time.monotonic() - started


def spread(times: int, seconds: float, act: Callable[[], None]) -> None:
    """Call `act` `times` times, spread over `seconds`."""
    started = time.monotonic()
    for number in range(times):
        time.sleep(max(0.0, started + (number + 0.5) * seconds / times - time.monotonic()))
        act()
    time.sleep(max(0.0, started + seconds - time.monotonic()))


def under_load(report: Report, mount: Mount, name: str, disturb: Callable[[], None]) -> None:
    """Disturb while eight threads and a loader work, and count what they notice."""
    weights = os.path.join("single", "model.safetensors")
    with (
        Loader(os.path.join(mount.source, weights), os.path.join(mount.path, weights)) as loader,
        Load(mount.source, mount.path) as load,
    ):
        disturb()
    report.count(f"{name}: errors", sum(load.errors.values()), note=f"{load.operations} calls")
    report.count(f"{name}: wrong bytes", len(load.wrong))
    report.value(f"{name}: slowest call", load.slowest_s, "s", _SLOWEST_S)
    report.count(f"{name}: loader's faults", int(bool(loader.fault)), note=f"{len(loader.rounds_s)} loads")
    report.value(f"{name}: slowest load", max(loader.rounds_s, default=0.0), "s")
    figures: dict[str, Any] = {
        operation: f"{len(times)} calls, p50 {load.quantile(operation, 0.5) * 1e3:.3g} ms, "
        f"p99 {load.quantile(operation, 0.99) * 1e3:.3g} ms, slowest {max(times) * 1e3:.3g} ms"
        for operation, times in sorted(load.latencies.items())
    }
    figures |= {f"error: {what}": count for what, count in load.errors.items()}
    figures |= {f"wrong {number}": what for number, what in enumerate(load.wrong[:20])}
    if loader.fault:
        figures["loader"] = loader.fault
    report.extra[name] = figures


def churn(report: Report, mount: Mount, cycles: int) -> None:
    """Open, read, close, many times, and what is left of it."""
    names = [os.path.join(mount.path, "many", f"folder-{n % 5}", f"file-{n}") for n in range(40)]

    def turn(times: int) -> None:
        for number in range(times):
            fd = os.open(names[number % len(names)], os.O_RDONLY)
            os.pread(fd, 4096, 0)
            os.close(fd)

    turn(2000)
    before = Footprint.of(mount.path)
    turn(cycles)
    time.sleep(1)  # RELEASE comes after close(2) has returned
    after = Footprint.of(mount.path)
    name = f"{mount.document['engine']}, {cycles} times open, read, close"
    report.value(f"{name}: descriptors of the daemon", after.daemon_fds - before.daemon_fds, "more", 0)
    report.value(f"{name}: descriptors of the supervisor", after.supervisor_fds - before.supervisor_fds, "more", 0)
    report.value(f"{name}: open inodes and backing ids", after.open_inodes - before.open_inodes, "more", 0)
    daemon_kib = after.daemon_anon_kib - before.daemon_anon_kib
    supervisor_kib = after.supervisor_anon_kib - before.supervisor_anon_kib
    report.value(f"{name}: RssAnon of the daemon", daemon_kib, "KiB more", 256)
    report.value(f"{name}: RssAnon of the supervisor", supervisor_kib, "KiB more", 256)
    report.extra[name] = {"before": str(before), "after": str(after)}


@contextlib.contextmanager
def small_filesystem(place: str) -> Iterator[str]:
    """A tmpfs whose free blocks change with nothing but what is done here."""
    source = os.path.join(place, "small")
    os.makedirs(source, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "weightfs-bench", source], check=True)
    try:
        yield source
    finally:
        subprocess.run(["umount", "-l", source], check=True)


def freed(report: Report, place: str, engine: str) -> None:
    """How long the blocks of a deleted file stay taken that was opened through the mount, and closed again."""
    state = os.path.join(place, "state-small")

    def once(mount: Mount, what: str, meanwhile: Callable[[], None]) -> None:
        path = os.path.join(mount.source, "weights.bin")
        empty = os.statvfs(mount.source).f_bfree
        write_file(path, 64 * MIB)
        with open(os.path.join(mount.path, "weights.bin"), "rb", buffering=0) as file:
            file.read(4096)
            meanwhile()
            file.read(4096)
        os.unlink(path)
        took = time_until(lambda: os.statvfs(mount.source).f_bfree >= empty)
        report.value(f"{engine}: blocks free after unlink of a file {what}", took, "s", _FREED_S)

    with small_filesystem(place) as source:
        write_file(os.path.join(source, "other"), 1)
        with mounted(source, place, engine=engine, state="state-small") as mount:
            once(mount, "opened and closed", lambda: None)
            once(mount, "open while its daemon died", lambda: kill_daemon(mount))
            once(mount, "open while it was replaced", lambda: replace(mount, state))


def supervisor_killed(report: Report, source: str, place: str, engine: str) -> None:
    """How long until the mount is gone, and until the next one serves."""
    with mounted(source, place, engine=engine) as mount:
        os.listdir(mount.path)
        os.kill(mount.document["supervisor_pid"], signal.SIGKILL)
        took = time_until(lambda: not mounts_below(mount.path))
        report.value(f"{engine}: supervisor killed, until the mount is gone", took, "s", 1.0)
        if os.listdir(mount.path):
            raise SystemExit("the mountpoint is no empty folder after that")
        started = time.monotonic()
        state = os.path.join(place, "state")
        done = weightfs("mount", source, mount.path, "--engine", engine, "--state-dir", state, "--json")
        if done.returncode:
            raise SystemExit(f"no mount after that: {done.stdout}{done.stderr}")
        os.listdir(mount.path)
        report.value(f"{engine}: supervisor killed, until the next mount serves", time.monotonic() - started, "s", 3.0)


def stopped(report: Report, mount: Mount) -> None:
    """How long a request waits for a daemon that stands still."""
    os.kill(live(mount.path)["daemon_pid"], signal.SIGSTOP)
    started = time.monotonic()
    live(mount.path)
    took = time.monotonic() - started
    report.value(f"{mount.document['engine']}: daemon stopped, until a request is answered", took, "s", _STUCK_S)


def main() -> None:
    """Run it."""
    options = parser(__doc__ or "")
    options.add_argument("--seconds", type=float, default=60, help="of each time under load (default 60)")
    options.add_argument("--kills", type=int, default=20, help="0 leaves this out")
    options.add_argument("--replaces", type=int, default=20, help="0 leaves this out")
    options.add_argument("--cycles", type=int, default=10_000, help="of open, read, close; 0 leaves this out")
    options.add_argument("--engine", choices=_ENGINES, default=None, help="both when left out")
    options.add_argument("--only-load", action="store_true", help="leave out what is not measured under load")
    given = options.parse_args()
    report = Report("survival", given)
    with workplace(given.folder) as place:
        source, state = os.path.join(place, "source"), os.path.join(place, "state")
        write_samples(source)
        for engine in (given.engine,) if given.engine else _ENGINES:
            with mounted(source, place, engine=engine) as mount:
                report.describe(mount)
                if given.cycles:
                    churn(report, mount, given.cycles)
                if given.kills:
                    kill = functools.partial(spread, given.kills, given.seconds, functools.partial(kill_daemon, mount))
                    under_load(report, mount, f"{engine}, {given.kills} kills in {given.seconds:g} s", kill)
                if given.replaces:
                    swap = functools.partial(
                        spread, given.replaces, given.seconds, functools.partial(replace, mount, state)
                    )
                    under_load(
                        report, mount, f"{engine}, {given.replaces} times --replace in {given.seconds:g} s", swap
                    )
                report.extra[f"{engine}, at the end"] = {"footprint": str(Footprint.of(mount.path))}
                if not given.only_load:
                    stopped(report, mount)
            if not given.only_load:
                supervisor_killed(report, source, place, engine)
                freed(report, place, engine)
    report.finish()


if __name__ == "__main__":
    main()
