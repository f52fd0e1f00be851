"""The portable engine, source in memory: reads from the mount's own cache, and first reads, which go through us.

A first read is one after the kernel was made to forget the mount's file (POSIX_FADV_DONTNEED on it; the source stays in
memory). Its peer is a stock pyfuse3 filesystem with one `os.pread` handler (`_plain_pyfuse3.py`), which alternates with
the mount; in its rows `bare` is that peer. It is measured as it comes (read_ahead_kb 128, all that the kernel gives
a FUSE mount by itself) and with the read_ahead_kb that weightfs sets for itself.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import time
from collections.abc import Iterator

from _harness import (
    MIB,
    Report,
    alternate,
    drop,
    mounted,
    parser,
    rate,
    read_ahead_kb,
    read_through,
    same_bytes,
    touched,
    unmount,
    workplace,
    write_file,
)

_START_S = 20
_PLAIN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_plain_pyfuse3.py")


@contextlib.contextmanager
def plain_mount(path: str, place: str) -> Iterator[str]:
    """Serve `path` by the peer; gives the folder it is in."""
    point = os.path.join(place, "plain")
    os.mkdir(point)
    peer = subprocess.Popen([sys.executable, _PLAIN, path, point], stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        ends = time.monotonic() + _START_S
        while not os.path.ismount(point):
            if peer.poll() is not None or time.monotonic() > ends:
                raise SystemExit("the pyfuse3 peer does not start")
            time.sleep(0.05)
        yield point
    finally:
        unmount(point, ["umount", point], ["fusermount3", "-u", point], ["umount", "--lazy", point])
        try:
            peer.wait(_START_S)
        except subprocess.TimeoutExpired:
            peer.kill()
            peer.wait()


def set_read_ahead(path: str, kib: int) -> bool:
    """Set a mount's read-ahead; False where that is not permitted."""
    device = os.stat(path).st_dev
    try:
        with open(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb", "w") as setting:
            setting.write(str(kib))
    except OSError:
        return False
    return True


def read_whole(path: str, buffer: memoryview) -> int:
    """Open, read, close."""
    with open(path, "rb", buffering=0) as file:
        return read_through(file.fileno(), buffer)


def first_read(path: str, buffer: memoryview) -> float:
    """GB/s of one read after the kernel forgot the file."""
    if (left := drop(path)) > 0:
        raise SystemExit(f"{left:.1%} of {path} stay in memory: not a first read")
    return rate(lambda: read_whole(path, buffer), at_least_s=0)


def main() -> None:
    """Run it."""
    options = parser(__doc__ or "").parse_args()
    report = Report("portable", options)
    with workplace(options.folder) as place:
        source = os.path.join(place, "source")
        os.mkdir(source)
        bare = os.path.join(source, "weights.bin")
        write_file(bare, options.size * MIB)
        buffer = touched(MIB)
        with mounted(source, place, engine="portable") as mount, plain_mount(bare, place) as plain:
            report.describe(mount)
            through, peer = os.path.join(mount.path, "weights.bin"), os.path.join(plain, "weights.bin")
            if not same_bytes(bare, through) or not same_bytes(bare, peer):
                raise SystemExit("a mount gives other bytes than the bare file")

            report.residency("second read: source", [bare])
            report.residency("second read: mount", [through])
            samples = alternate(
                lambda: rate(functools.partial(read_whole, bare, buffer)),
                lambda: rate(functools.partial(read_whole, through, buffer)),
                options.rounds,
            )
            report.compare("portable, second read against the bare file", samples, "GB/s", 0.4, "at least")

            ours = read_ahead_kb(mount.path)
            for kib in dict.fromkeys((read_ahead_kb(plain), ours)):
                if kib is None or (kib != read_ahead_kb(plain) and not set_read_ahead(plain, kib)):
                    continue
                phase = f"portable, first read against plain pyfuse3 with read_ahead_kb {kib}"
                report.residency(f"{phase}: source", [bare])
                report.residency(f"{phase}: mount", [through], share=drop(through))
                samples = alternate(
                    functools.partial(first_read, peer, buffer),
                    functools.partial(first_read, through, buffer),
                    options.rounds,
                )
                report.compare(phase, samples, "GB/s", 1.2, "at least")
    report.finish()


if __name__ == "__main__":
    main()
