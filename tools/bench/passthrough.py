"""The passthrough engine against the bare file: warm reads, mmap, direct I/O, and what still reaches user space.

Bare and mount alternate, half a second each, on one CPU (with passthrough the reader's own thread does all the work).
"""

from __future__ import annotations

import functools
import mmap
import os
from collections.abc import Callable

import numpy as np
from _harness import (
    MIB,
    Mount,
    Report,
    alternate,
    mounted,
    parser,
    rate,
    read_through,
    same_bytes,
    touched,
    workplace,
    write_file,
)

_SCAN_BYTES = 4 * MIB
_RANDOM_BYTES = 64 << 10
_DIRECT_BYTES = 64 * MIB


def scan(fd: int) -> int:
    """Map the file anew and add it up: every page is faulted in, and every byte looked at."""
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapping:
        words = np.frombuffer(mapping, dtype=np.uint64)
        step = _SCAN_BYTES // words.itemsize
        for at in range(0, len(words), step):
            words[at : at + step].sum()
        size = words.nbytes
        del words
    return size


def read_randomly(fd: int, offsets: list[int], buffer: memoryview) -> int:
    """64 KiB from each offset."""
    parts = [buffer]
    return sum(os.preadv(fd, parts, offset) for offset in offsets)


def direct_reader(path: str) -> Callable[[], int]:
    """Each call reads the next part of the file past the page cache."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    size = os.fstat(fd).st_size
    buffer = touched(MIB)
    at = 0

    def one_pass() -> int:
        nonlocal at
        length = min(_DIRECT_BYTES, size - at)
        moved = read_through(fd, buffer, offset=at, nbytes=length)
        at = (at + length) % size
        return moved

    return one_pass


def send(path: str) -> None:
    """The whole file, by sendfile(2)."""
    with open(path, "rb") as file, open(os.devnull, "wb") as sink:
        at, size = 0, os.fstat(file.fileno()).st_size
        while at < size:
            at += os.sendfile(sink.fileno(), file.fileno(), at, size - at)


def measure(report: Report, mount: Mount, bare: str, through: str, rounds: int) -> None:
    """All rows."""
    buffer = touched(MIB)
    bare_fd, mount_fd = os.open(bare, os.O_RDONLY), os.open(through, os.O_RDONLY)
    size = os.fstat(bare_fd).st_size
    offsets = [int(block) * _RANDOM_BYTES for block in np.random.default_rng(3).permutation(size // _RANDOM_BYTES)]
    small = buffer[:_RANDOM_BYTES]
    ways: dict[str, Callable[[int], int]] = {
        "warm sequential read, 1 MiB": lambda fd: read_through(fd, buffer),
        "warm mmap scan": scan,
        "warm random reads, 64 KiB": lambda fd: read_randomly(fd, offsets, small),
    }
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cpus)})
    for what, way in ways.items():
        report.residency(what, [bare])
        of_bare, of_mount = functools.partial(way, bare_fd), functools.partial(way, mount_fd)
        samples = alternate(functools.partial(rate, of_bare), functools.partial(rate, of_mount), rounds)
        report.compare(what, samples, "GB/s", 0.97, "at least")
    report.residency("O_DIRECT", [bare])
    read_bare, read_mount = direct_reader(bare), direct_reader(through)
    samples = alternate(lambda: rate(read_bare, at_least_s=0.5), lambda: rate(read_mount, at_least_s=0.5), rounds)
    report.compare("O_DIRECT read, 1 MiB", samples, "GB/s", 0.95, "at least")
    os.sched_setaffinity(0, cpus)
    os.close(bare_fd)
    os.close(mount_fd)

    def read() -> None:
        with open(through, "rb", buffering=0) as file:
            read_through(file.fileno(), buffer)

    def map_it() -> None:
        with open(through, "rb") as file:
            scan(file.fileno())

    actions: dict[str, Callable[[], None]] = {"read": read, "mmap": map_it, "sendfile": lambda: send(through)}
    report.extra["requests"] = {}
    for what, action in actions.items():
        found = mount.requests_of(action)
        hints = found.get("hints", 0)
        report.count(f"READs in user space during {what}", found.get("read", 0) - hints, note=f"hints {hints}")
        report.extra["requests"][what] = found


def main() -> None:
    """Run it."""
    options = parser(__doc__ or "").parse_args()
    report = Report("passthrough", options)
    with workplace(options.folder) as place:
        source = os.path.join(place, "source")
        os.mkdir(source)
        bare = os.path.join(source, "weights.bin")
        write_file(bare, options.size * MIB)
        with mounted(source, place, engine="passthrough") as mount:
            report.describe(mount)
            through = os.path.join(mount.path, "weights.bin")
            if not same_bytes(bare, through):
                raise SystemExit("the mount gives other bytes than the bare file")
            measure(report, mount, bare, through, options.rounds)
    report.finish()


if __name__ == "__main__":
    main()
