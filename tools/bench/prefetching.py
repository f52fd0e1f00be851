"""Prefetch against the bare folder, cold: what a loader gains, what the filler takes, what others lose.

Each sample begins with nothing in memory (sync, DONTNEED, drop_caches; mincore(2) says 0), bare and mount alternate.
All of it runs with `read_ahead_kb` 128, the stock value, and again with the machine's own. Needs root, fio, torch.
The size is that of a model: there are two.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from _cold import Daemon, Model, Watched, make_cold, read_ahead, write_gpt, write_llama
from _harness import (
    MIB,
    Mount,
    Report,
    Samples,
    alternate,
    mounted,
    parser,
    read_ahead_kb,
    read_through,
    resident,
    touched,
    workplace,
    write_file,
)

from weightfs import linux

STOCK_KB = 128
HEAD_STARTS = {"none": "no head start", "sleep": "1 s before", "imports": "torch imported meanwhile"}
_LOADER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_cold_loader.py")
_LOADER_S = 300
_FILL_S = 60
_TRIES = 3
_SMALL_BYTES = 64 << 10
_SMALL_S = 1.5
_LOOK_S = 0.002
_THERE = 0.98
"""The part of what was read that must be in memory: on a virtual machine some pages vanish within seconds."""


@dataclass(frozen=True)
class Bench:
    """What is measured: `layers` and `whole` mount the same source, each with a daemon of its own."""

    report: Report
    rounds: int
    source: str
    layers: Mount
    whole: Mount
    llama: Model
    gpt: Model
    other: str

    @property
    def files(self) -> list[str]:
        """Everything that must be cold."""
        return [self.llama.weights, self.gpt.weights, self.other]

    def cold(self) -> None:
        """Nothing is in memory, and nothing is being read."""
        for mount in (self.layers, self.whole):
            for name in ("llama", "gpt"):
                daemon_of(mount).wait(name)
        make_cold(self.files)

    def note(self, phase: str) -> None:
        """State the residency from which a phase starts."""
        self.cold()
        self.report.residency(phase, [], share=max(resident(path) for path in self.files))


def daemon_of(mount: Mount) -> Daemon:
    """Who serves it."""
    return Daemon(mount.status()["control_socket"], mount.document["daemon_pid"])


# A loader


def load(bench: Bench, folder: str, head_start: str) -> dict[str, float]:
    """Seconds of a loader in a process of its own, from a cold disk."""
    command = [sys.executable, _LOADER, os.path.join(folder, "llama"), head_start]
    waits = head_start in ("none", "sleep")
    if not waits:
        bench.cold()
    started = time.perf_counter()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            if waits:
                assert child.stdout is not None
                child.stdout.readline()
                bench.cold()
            said, _ = child.communicate("go\n", timeout=_LOADER_S)
        except BaseException:
            child.kill()
            raise
    if child.returncode:
        raise SystemExit(f"the loader ended with status {child.returncode}")
    return {**json.loads(said), "wall_s": time.perf_counter() - started}


def measure_loading(bench: Bench, kb: int, *, is_stock: bool) -> None:
    """The load phase, in GB/s, for each head start."""
    for head_start, told in HEAD_STARTS.items():
        phase = f"cold load_file, {told}; read_ahead_kb {kb}"
        bench.note(phase)
        ahead: list[float] = []

        def rate(folder: str, head_start: str = head_start, ahead: list[float] = ahead) -> float:
            said = load(bench, folder, head_start)
            ahead.append(said["imports_s"])
            return said["bytes"] / said["load_s"] / 1e9

        samples = alternate(
            functools.partial(rate, bench.source),
            functools.partial(rate, bench.layers.path),
            bench.rounds,
            warmup=head_start == "none",
        )
        took_s = bench.llama.nbytes / 1e9 / samples.medians[0]
        is_long = statistics.median(ahead) > took_s / 2
        if is_stock:
            target = 2.0 if head_start == "none" else 3.0
        else:
            target = 1.5 if is_long and head_start != "none" else 0.95
        note = f"bare loads {took_s:.2f} s, {statistics.median(ahead):.2f} s before it"
        bench.report.compare(phase, samples, "GB/s", target, "at least", note=note)


def measure_transformers(bench: Bench, kb: int, pairs: int) -> None:
    """Pairs of from_pretrained, whole process."""
    phase = f"from_pretrained, cold, whole process; read_ahead_kb {kb}"
    bench.note(phase)

    def wall(folder: str) -> float:
        return load(bench, folder, "transformers")["wall_s"]

    of_bare, of_mount = functools.partial(wall, bench.source), functools.partial(wall, bench.layers.path)
    samples = alternate(of_bare, of_mount, pairs, warmup=False)
    bench.report.compare(phase, samples, "s", None, "at most")
    won = sum(b < a for a, b in zip(samples.a, samples.b, strict=True)) / pairs
    bench.report.value(f"share of pairs that the mount won; read_ahead_kb {kb}", won, "", 0.9, "at least")


# The filler


class DisturbedError(Exception):
    """What was read is not in memory: somebody else has the kernel drop its caches."""


def undisturbed(take: Callable[[], float]) -> float:
    """A sample, taken again when something disturbed it."""
    for _ in range(_TRIES):
        with contextlib.suppress(DisturbedError):
            return take()
        print("  taken again: what was read did not stay in memory", file=sys.stderr, flush=True)
    raise SystemExit("what is read ahead does not come into memory, or does not stay there")


def fill(bench: Bench) -> tuple[float, float]:
    """GB/s of reading all of a model ahead, by the timeline, and the daemon's CPU seconds per GB."""
    bench.cold()
    daemon, watched = daemon_of(bench.layers), Watched(bench.llama.weights)
    used = daemon.cpu_s()
    daemon.warm("llama")
    while (took_s := daemon.filled_s()) is None:
        time.sleep(0.1)  # asking takes some of its CPU as well
    if watched.share() < _THERE:
        raise DisturbedError
    gigabytes = bench.llama.nbytes / 1e9
    return gigabytes / took_s, (daemon.cpu_s() - used) / gigabytes


def fio_rate(bench: Bench) -> float:
    """GB/s of fio on the same file: io_uring, direct, 4 MiB, 16 deep."""
    bench.cold()
    options = ["--name=read", "--rw=read", "--bs=4M", "--iodepth=16", "--ioengine=io_uring", "--direct=1", "--readonly"]
    command = ["fio", *options, f"--filename={bench.llama.weights}", "--output-format=json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_LOADER_S, check=False)
    if done.returncode:
        raise SystemExit(f"fio: status {done.returncode}: {done.stderr}")
    return float(json.loads(done.stdout)["jobs"][0]["read"]["bw_bytes"]) / 1e9


def measure_filler(bench: Bench, kb: int) -> None:
    """Against fio, and its CPU."""
    phase = f"filler against fio; read_ahead_kb {kb}"
    bench.note(phase)
    used: list[float] = []

    def filled() -> float:
        rate, cpu = fill(bench)
        used.append(cpu)
        return rate

    of_fio, of_filler = functools.partial(fio_rate, bench), functools.partial(undisturbed, filled)
    samples = alternate(of_fio, of_filler, bench.rounds, warmup=False)
    bench.report.compare(phase, samples, "GB/s", 0.9, "at least", note="the left column is fio")
    bench.report.record(f"daemon CPU while filling; read_ahead_kb {kb}", used, "s/GB", 0.35)


def first_ready(bench: Bench, mount: Mount, name: str, model: Model) -> float:
    """Seconds from opening config.json until the embedding and the first block are in memory."""
    bench.cold()
    watched = Watched(model.weights)
    started = time.perf_counter()
    with open(os.path.join(mount.path, name, "config.json"), "rb") as file:
        file.read()
    while watched.share(model.first) < _THERE:
        if time.perf_counter() - started > _FILL_S:
            raise DisturbedError
        time.sleep(_LOOK_S)
    return time.perf_counter() - started


def first_submitted(bench: Bench) -> float:
    """Milliseconds from opening config.json until the first of a model's pages is being read."""
    bench.cold()
    with open(bench.llama.weights, "rb") as weights:
        started = time.perf_counter()
        with open(os.path.join(bench.layers.path, "llama", "config.json"), "rb") as file:
            file.read()
        while not linux.cachestat(weights.fileno(), 0, bench.llama.nbytes):
            if time.perf_counter() - started > _FILL_S:
                raise DisturbedError
        return (time.perf_counter() - started) * 1000


def measure_order(bench: Bench, kb: int) -> None:
    """Layer order against the order of the file."""
    phase = f"from opening config.json until the first read; read_ahead_kb {kb}"
    bench.note(phase)
    submitted = functools.partial(undisturbed, functools.partial(first_submitted, bench))
    bench.report.record(phase, [submitted() for _ in range(bench.rounds)], "ms", 20.0)
    rows: list[tuple[str, Model, float | None, str]] = [
        ("gpt", bench.gpt, 0.2, "embedding at the end of the file"),
        ("llama", bench.llama, None, "embedding near the front"),
    ]
    for name, model, target, told in rows:
        phase = f"until embedding and first block are there, {told}; read_ahead_kb {kb}"
        bench.note(phase)
        of_whole = functools.partial(first_ready, bench, bench.whole, name, model)
        of_layers = functools.partial(first_ready, bench, bench.layers, name, model)
        samples = alternate(
            functools.partial(undisturbed, of_whole),
            functools.partial(undisturbed, of_layers),
            bench.rounds,
            warmup=False,
        )
        note = "the left column is --prefetch whole"
        bench.report.compare(phase, samples, "s", target, "at most", note=note)


# Others


def beside(bench: Bench, action: Callable[[], float], *, prefetching: bool) -> tuple[float, bool]:
    """A figure of somebody who reads something else, alone or while a model is read ahead; whether it still was."""
    bench.cold()
    daemon = daemon_of(bench.layers)
    if prefetching:
        daemon.warm("gpt")
    value = action()
    return value, prefetching and daemon.is_reading("gpt")


def measure_others(bench: Bench, kb: int) -> None:
    """A second loader's speed, and the p99 of small reads through the mount, beside a prefetch."""
    through = os.path.join(bench.layers.path, os.path.basename(bench.other))
    buffer = touched(MIB)
    size = os.path.getsize(bench.other)
    offsets = np.random.default_rng(5).permutation(size // _SMALL_BYTES) * _SMALL_BYTES

    def speed() -> float:
        with open(bench.other, "rb", buffering=0) as file:
            started = time.perf_counter()
            moved = read_through(file.fileno(), buffer)
        return moved / (time.perf_counter() - started) / 1e9

    def p99_ms() -> float:
        small, took = buffer[:_SMALL_BYTES], []
        with open(through, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            for offset in offsets:
                started = time.perf_counter()
                os.preadv(file.fileno(), [small], int(offset))
                took.append(time.perf_counter() - started)
                if sum(took) > _SMALL_S:
                    break
        return float(np.percentile(took, 99)) * 1000

    def compare(phase: str, action: Callable[[], float], unit: str) -> tuple[Samples, str]:
        bench.note(phase)
        going: list[bool] = []

        def sample(*, prefetching: bool) -> float:
            value, still = beside(bench, action, prefetching=prefetching)
            if prefetching:
                going.append(still)
            return value

        alone, both = functools.partial(sample, prefetching=False), functools.partial(sample, prefetching=True)
        samples = alternate(alone, both, bench.rounds, warmup=False)
        return samples, f"left: no prefetch; it outlasted the reads in {sum(going)} of {len(going)} rounds"

    phase = f"a second loader beside a prefetch; read_ahead_kb {kb}"
    samples, note = compare(phase, speed, "GB/s")
    bench.report.compare(phase, samples, "GB/s", 0.8, "at least", note=note)
    phase = f"p99 of cold 64 KiB reads beside a prefetch; read_ahead_kb {kb}"
    samples, note = compare(phase, p99_ms, "ms")
    bench.report.compare(phase, samples, "ms", 1.5, "at most", note=note)


MEASURES: dict[str, Callable[[Bench, int], None]] = {
    "filler": measure_filler,
    "order": measure_order,
    "others": measure_others,
}


def options_of() -> argparse.Namespace:
    """The shared ones and these."""
    options = parser(__doc__ or "")
    options.add_argument("--transformers", type=int, default=0, metavar="PAIRS", help="pairs of from_pretrained, too")
    options.add_argument("--only", choices=["load", *MEASURES], help="only these rows")
    options.add_argument("--read-ahead-kb", type=int, help="one pass with this, instead of 128 and the machine's own")
    options.set_defaults(rounds=5, size=2304)
    return options.parse_args()


def main() -> None:
    """Run it."""
    options = options_of()
    report = Report("prefetching", options)
    if os.geteuid() or shutil.which("fio") is None:
        raise SystemExit("this needs root (drop_caches, read_ahead_kb) and fio")
    with workplace(options.folder) as place:
        source = os.path.join(place, "source")
        os.mkdir(source)
        llama = write_llama(os.path.join(source, "llama"), options.size * MIB)
        gpt = write_gpt(os.path.join(source, "gpt"), options.size * MIB)
        other = os.path.join(source, "other.bin")
        write_file(other, max(64, options.size // 4) * MIB)
        own = read_ahead_kb(source) or STOCK_KB
        passes = [options.read_ahead_kb] if options.read_ahead_kb else sorted({STOCK_KB, own})
        whole_at = {"state": "state-whole", "prefetch": "whole", "point": "whole"}
        with mounted(source, place) as layers, mounted(source, place, **whole_at) as whole:
            bench = Bench(report, options.rounds, source, layers, whole, llama, gpt, other)
            for kb in passes:
                with read_ahead(source, kb):
                    report.describe(layers)
                    if options.only in (None, "load"):
                        measure_loading(bench, kb, is_stock=kb == STOCK_KB)
                    for name, measure in MEASURES.items():
                        if options.only in (None, name):
                            measure(bench, kb)
                    if options.transformers:
                        measure_transformers(bench, kb, options.transformers)
    report.finish()


if __name__ == "__main__":
    main()
