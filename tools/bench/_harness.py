"""What every benchmark here shares: a mount that always ends, sample files, alternating rounds, one table.

Honest by construction: bare and mount alternate within one run and swap places each round; what is compared are
medians; each report says on which machine, kernel, engine and read-ahead it was made and how much of the files was in
memory before each phase. A target that is not met prints `no`, and the exit status stays 0: these are no tests.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import mmap
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any, Final, Literal, NoReturn

import numpy as np
from rich.console import Console
from rich.table import Table

WEIGHTFS: Final = os.path.join(os.path.dirname(sys.executable), "weightfs")
MIB: Final = 1 << 20
SCHEMA: Final = 1
_PAGE: Final = mmap.PAGESIZE
_SETTLED_S: Final = 2.2
"""A file changed less than 2 s ago is not recorded in the index."""
_COMMAND_S: Final = 60
_ENDING: Final = (signal.SIGINT, signal.SIGTERM)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


# Options


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all scripts have."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=_positive, default=7, help="rounds to take the median of (default 7)")
    options.add_argument("--size", type=_positive, default=512, metavar="MIB", help="sample data (default 512 MiB)")
    options.add_argument("--folder", default=None, help="where to lay the samples (default: the folder for temp files)")
    options.add_argument("--json", default=None, metavar="FILE", help="write everything, each sample included, there")
    return options


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


# Place, mount


@contextlib.contextmanager
def workplace(folder: str | None) -> Iterator[str]:
    """A temp folder, removed afterwards; Ctrl-C and SIGTERM unwind, so that what was mounted is unmounted."""

    def end(number: int, _: FrameType | None) -> NoReturn:
        for each in _ENDING:  # once is enough: what follows is the cleaning up
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for each in _ENDING:
        signal.signal(each, end)
    if not os.path.exists(WEIGHTFS):
        raise SystemExit(f"{WEIGHTFS} is missing: run this with the Python that weightfs is installed for")
    with tempfile.TemporaryDirectory(prefix="weightfs-bench-", dir=folder) as place:
        yield place


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait: a `mount` that is cut off may leave a daemon that mounts a moment later."""
    came: list[int] = []
    before = {each: signal.signal(each, lambda number, _: came.append(number)) for each in _ENDING}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    if came:
        signal.raise_signal(came[0])


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    with _undisturbed():
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COMMAND_S,
            start_new_session=True,
            check=False,
        )


def _command(*arguments: str) -> dict[str, Any]:
    done = _run(WEIGHTFS, *arguments)
    if done.returncode:
        raise SystemExit(f"weightfs {shlex.join(arguments)}: status {done.returncode}: {done.stdout}{done.stderr}")
    return dict(json.loads(done.stdout))


@dataclass(frozen=True)
class Mount:
    """A weightfs that serves; `start_s` is how long the command took."""

    source: str
    path: str
    document: dict[str, Any]
    start_s: float = 0.0

    def status(self) -> dict[str, Any]:
        """What it says of itself. Asking costs it a few requests: see `requests_of`."""
        return dict(_command("status", self.path, "--json")["mounts"][0])

    def requests_of(self, action: Callable[[], object]) -> dict[str, int]:
        """Requests that reach user space while `action` runs, by name, `hints` among them.

        What `status` itself costs is taken off; name look-ups may be off by one or two, since they depend on time.
        """
        before = self.status(), self.status()
        action()
        after = self.status()
        counts = [{**status["requests"], "hints": status["hints"]} for status in (*before, after)]
        found = {
            name: counts[2][name] - counts[1].get(name, 0) - (counts[1].get(name, 0) - counts[0].get(name, 0))
            for name in counts[2]
        }
        return {name: count for name, count in found.items() if count > 0}


@contextlib.contextmanager
def mounted(
    source: str,
    place: str,
    *,
    engine: str = "auto",
    state: str = "state",
    watch: str = "auto",
    prefetch: str = "layers",
    point: str = "mount",
) -> Iterator[Mount]:
    """Mount `source` in `place` by the command line, and unmount it whatever happens.

    `state` names the folder for the index: a name used before is an index that knows the source.
    """
    point = os.path.join(place, point)
    os.makedirs(point, exist_ok=True)
    youngest = max(
        os.lstat(os.path.join(folder, name)).st_ctime for folder, _, names in os.walk(source) for name in names
    )
    time.sleep(max(0.0, _SETTLED_S - (time.time() - youngest)))
    state_folder = os.path.join(place, state)
    started = time.perf_counter()
    try:
        settings = ["--engine", engine, "--state-dir", state_folder, "--watch", watch]
        settings += ["--prefetch", prefetch, "--predict", "off"]
        document = _command("mount", source, point, *settings, "--json")
        yield Mount(source, point, document, time.perf_counter() - started)
    finally:
        unmount(point, [WEIGHTFS, "umount", point], [WEIGHTFS, "umount", "--lazy", point])


def unmount(point: str, *ways: Sequence[str]) -> None:
    """Try each way until `point` is no mountpoint any more."""
    for way in ways:
        if not _is_mounted(point):
            return
        _run(*way)
    if _is_mounted(point):
        print(f"still mounted: {point}", file=sys.stderr)


def _is_mounted(point: str) -> bool:
    with open("/proc/self/mountinfo") as table:
        return any(line.split(" ")[4] == os.path.realpath(point) for line in table)


# Samples


def write_file(path: str, nbytes: int, *, seed: int = 1) -> None:
    """A file of random bytes on the disk, and in memory: written, synced, read once."""
    random = np.random.default_rng(seed)
    with open(path, "wb") as file:
        left = nbytes
        while left:
            left -= file.write(random.bytes(min(left, 8 * MIB)))
        file.flush()
        os.fsync(file.fileno())
    warm(path)


def warm(path: str) -> None:
    """Read a file once."""
    buffer = bytearray(MIB)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def write_safetensors(path: str, tensors: int, nbytes: int) -> dict[str, tuple[int, int]]:
    """A safetensors file of F32 tensors, on the disk and in memory; gives name -> (offset in the file, bytes)."""
    extents = {f"model.layers.{number}.weight": (number * nbytes, nbytes) for number in range(tensors)}
    header = json.dumps(
        {
            name: {"dtype": "F32", "shape": [nbytes // 4096, 1024], "data_offsets": [at, at + length]}
            for name, (at, length) in extents.items()
        }
    ).encode()
    header += b" " * (-len(header) % 8)
    random = np.random.default_rng(2)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _ in extents:
            left = nbytes
            while left:
                left -= file.write(random.bytes(min(left, 8 * MIB)))
        file.flush()
        os.fsync(file.fileno())
    warm(path)
    start = 8 + len(header)
    return {name: (start + at, length) for name, (at, length) in extents.items()}


def same_bytes(one: str, other: str, *, offset: int = 0, nbytes: int | None = None) -> bool:
    """Whether `other` holds `one`'s bytes (`nbytes` of them from `offset` on), and nothing else."""
    with open(one, "rb", buffering=0) as first, open(other, "rb", buffering=0) as second:
        first.seek(offset)
        left = os.fstat(first.fileno()).st_size - offset if nbytes is None else nbytes
        if os.fstat(second.fileno()).st_size != left:
            return False
        while left:
            part = first.read(min(left, MIB))
            if not part or second.read(len(part)) != part:
                return False
            left -= len(part)
    return True


def resident(path: str) -> float:
    """The share of a file that is in memory, by mincore(2)."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            return 1.0
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
            view = np.frombuffer(mapping, dtype=np.uint8)
            pages = np.zeros(-(-size // _PAGE), dtype=np.uint8)
            failed = _libc.mincore(view.ctypes.data, size, pages.ctypes.data)
            del view
        if failed:
            raise OSError(ctypes.get_errno(), "mincore", path)
    return float((pages & 1).mean())


def drop(path: str) -> float:
    """Let the kernel forget a file of the mount, and that file only; gives the share that is still in memory."""
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return resident(path)


# Settings


def read_ahead_kb(path: str) -> int | None:
    """`read_ahead_kb` of the device that `path` lies on: of a disk, or of a mount's bdi."""
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for setting in (f"/sys/class/bdi/{number}", f"/sys/dev/block/{number}/queue", f"/sys/dev/block/{number}/../queue"):
        with contextlib.suppress(OSError), open(os.path.join(setting, "read_ahead_kb")) as file:
            return int(file.read())
    return None


def machine() -> dict[str, Any]:
    """Where this runs."""
    with open("/proc/meminfo") as file:
        total_kib = int(file.readline().split()[1])
    return {
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "memory_gib": round(total_kib / (1 << 20), 1),
        "python": platform.python_version(),
        "loadavg": [round(load, 2) for load in os.getloadavg()],
    }


# Rounds


@dataclass(frozen=True)
class Samples:
    """What alternating rounds gave: `a[n]` and `b[n]` are of the same round."""

    a: list[float]
    b: list[float]

    @property
    def medians(self) -> tuple[float, float]:
        """Of `a`, of `b`."""
        return statistics.median(self.a), statistics.median(self.b)

    @property
    def ratio(self) -> float:
        """Median of the rounds' own ratios b/a: what drifts from round to round, as on a shared machine, drops out."""
        return statistics.median(b / a for a, b in zip(self.a, self.b, strict=True))

    @property
    def ratio_of_medians(self) -> float:
        """The median of `b` by the median of `a`."""
        a, b = self.medians
        return b / a


def alternate(a: Callable[[], float], b: Callable[[], float], rounds: int, *, warmup: bool = True) -> Samples:
    """Take a sample of each per round, the order swapped every round; `warmup` takes one of each first."""
    samples = Samples([], [])
    if warmup:
        a()
        b()
    for number in range(rounds):
        pair = [(a, samples.a), (b, samples.b)]
        for take, into in pair if number % 2 == 0 else pair[::-1]:
            into.append(take())
    return samples


def rate(one_pass: Callable[[], int], *, at_least_s: float = 0.3) -> float:
    """GB/s (10^9) of a function that moves bytes and says how many, repeated until the sample is long enough."""
    moved = 0
    started = time.perf_counter()
    while True:
        moved += one_pass()
        elapsed = time.perf_counter() - started
        if elapsed >= at_least_s:
            return moved / elapsed / 1e9


def read_through(fd: int, buffer: memoryview, *, offset: int = 0, nbytes: int | None = None) -> int:
    """Read a range (to the end when `nbytes` is None) into `buffer`, over and over the same; gives its length.

    Raises:
        EOFError: the file ended before the range did.
    """
    at, left = offset, nbytes
    while left is None or left > 0:
        part = buffer if left is None or left >= len(buffer) else buffer[:left]
        got = os.preadv(fd, [part], at)
        if not got:
            if left is not None:
                raise EOFError(f"{left} bytes early")
            break
        at += got
        left = None if left is None else left - got
    return at - offset


def touched(nbytes: int) -> memoryview:
    """A page-aligned buffer whose pages exist already."""
    buffer = memoryview(mmap.mmap(-1, nbytes))
    for at in range(0, nbytes, _PAGE):
        buffer[at] = 1
    return buffer


# Report


@dataclass
class Row:
    """One line of the table. `value` and `bare` are medians in `unit`; `compared` is what the target speaks of.

    Without a target it is there to be known.
    """

    what: str
    bare: float | None
    value: float
    unit: str
    compared: float
    target: float | None
    sense: Literal["at least", "at most"]
    target_unit: str
    ratio: float | None = None
    ratio_of_medians: float | None = None
    samples: dict[str, list[float]] = field(default_factory=dict)
    note: str = ""

    @property
    def held(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.target is None:
            return None
        return self.compared >= self.target if self.sense == "at least" else self.compared <= self.target

    def cells(self) -> list[str]:
        """The line as text: what, bare, mount, ratio, target, held."""
        ratio = "-" if self.ratio is None else f"{self.ratio:.3g}"
        if self.ratio_of_medians is not None:
            ratio += f" ({self.ratio_of_medians:.3g})"
        sign = ">=" if self.sense == "at least" else "<="
        return [
            self.what + (f"; {self.note}" if self.note else ""),
            "-" if self.bare is None else _quantity(self.bare, self.unit),
            _quantity(self.value, self.unit),
            ratio,
            "-" if self.target is None else f"{sign} {self.target:g}{self.target_unit}",
            "-" if self.held is None else "yes" if self.held else "no",
        ]


def _quantity(value: float, unit: str) -> str:
    return f"{value:.0f} {unit}" if value >= 100 or unit == "requests" else f"{value:.3g} {unit}"


COLUMNS: Final = ("what", "bare", "mount", "ratio", "target", "held?")
LEGEND: Final = (
    "ratio: median of the rounds' own mount/bare ratios, which a target in x is held against; in brackets the ratio of "
    "the medians."
)


class Report:
    """Rows and settings of one script."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name = name
        self.options = vars(options)
        self.command = f"python tools/bench/{name}.py {shlex.join(sys.argv[1:])}".strip()
        self.settings: dict[str, Any] = {"machine": machine(), "mounts": [], "residency": {}}
        self.rows: list[Row] = []
        self.extra: dict[str, Any] = {}

    def describe(self, mount: Mount) -> None:
        """Note a mount's engine and read-ahead, once for each engine."""
        known = {
            "engine": mount.document["engine"],
            "reason": mount.document["reason"],
            "source_read_ahead_kb": read_ahead_kb(mount.source),
            "mount_read_ahead_kb": read_ahead_kb(mount.path),
        }
        if known not in self.settings["mounts"]:
            self.settings["mounts"].append(known)

    def residency(self, phase: str, paths: Sequence[str], *, share: float | None = None) -> None:
        """Note how much of the backing files (or the `share` found of something else) is in memory before a phase."""
        self.settings["residency"][phase] = share if share is not None else min(resident(path) for path in paths)

    def compare(
        self,
        what: str,
        samples: Samples,
        unit: str,
        target: float | None,
        sense: Literal["at least", "at most"],
        *,
        note: str = "",
    ) -> None:
        """A row whose target is on the ratio mount/bare."""
        bare, value = samples.medians
        row = Row(what, bare, value, unit, samples.ratio, target, sense, "x", samples.ratio, samples.ratio_of_medians)
        row.samples, row.note = {"bare": samples.a, "mount": samples.b}, note
        self._add(row)

    def measure(
        self,
        what: str,
        samples: Samples,
        unit: str,
        target: float | None,
        sense: Literal["at least", "at most"],
        *,
        note: str = "",
    ) -> None:
        """A row whose target is on the mount's own figure; bare is the control."""
        bare, value = samples.medians
        row = Row(what, bare, value, unit, value, target, sense, f" {unit}", samples.ratio, samples.ratio_of_medians)
        row.samples, row.note = {"bare": samples.a, "mount": samples.b}, note
        self._add(row)

    def record(
        self,
        what: str,
        values: list[float],
        unit: str,
        target: float | None,
        *,
        note: str = "",
    ) -> None:
        """A row of the mount's own figures, without anything bare beside it; the target is the most it may be."""
        value = statistics.median(values)
        row = Row(what, None, value, unit, value, target, "at most", f" {unit}", samples={"mount": values}, note=note)
        self._add(row)

    def count(self, what: str, counted: int, *, note: str = "") -> None:
        """A row that counts what must not happen."""
        self._add(Row(what, None, counted, "requests", counted, 0, "at most", "", note=note))

    def value(
        self,
        what: str,
        value: float,
        unit: str,
        target: float | None = None,
        sense: Literal["at least", "at most"] = "at most",
        *,
        note: str = "",
    ) -> None:
        """A row for one figure, compared with nothing but its target."""
        self._add(Row(what, None, value, unit, value, target, sense, f" {unit}", note=note))

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        print(f"  {': '.join(row.cells()[:1])}: {', '.join(row.cells()[1:])}", file=sys.stderr, flush=True)

    def document(self) -> dict[str, Any]:
        """All of it."""
        return {
            "schema": SCHEMA,
            "name": self.name,
            "command": self.command,
            "options": self.options,
            "settings": self.settings,
            "rows": [{**asdict(row), "held": row.held, "cells": row.cells()} for row in self.rows],
            **self.extra,
        }

    def finish(self) -> None:
        """Print the table and the settings; write the JSON file if one was asked for."""
        self.settings["machine"]["loadavg_after"] = machine()["loadavg"]
        console = Console(width=None if sys.stdout.isatty() else 150)
        table = Table(*COLUMNS, title=self.command, title_justify="left")
        for row in self.rows:
            table.add_row(*row.cells())
        console.print(table)
        for line in describe_settings(self.settings):
            console.print(line, highlight=False, markup=False)
        console.print(LEGEND, highlight=False)
        for name, value in self.extra.items():
            console.print(f"{name}:", highlight=False)
            for key, part in value.items():
                console.print(f"  {key}: {part}", highlight=False, markup=False)
        if self.options["json"]:
            with open(self.options["json"], "w") as file:
                json.dump(self.document(), file, indent=1)


def describe_settings(settings: dict[str, Any]) -> list[str]:
    """The settings, as lines of text."""
    where = settings["machine"]
    lines = [
        f"kernel {where['kernel']}, {where['cpus']} CPUs, {where['memory_gib']} GiB, Python {where['python']}, "
        f"load before {where['loadavg'][0]}, after {where['loadavg_after'][0]}"
    ]
    for mount in settings["mounts"]:
        lines.append(
            f"engine {mount['engine']} ({mount['reason']}); read_ahead_kb: source {mount['source_read_ahead_kb']}, "
            f"mount {mount['mount_read_ahead_kb']}"
        )
    lines += [f"in memory before {phase}: {share:.1%}" for phase, share in settings["residency"].items()]
    return lines
