"""Page cache to GPU through prefetch.staging, against what the bus gives from pinned memory in the same run.

    tools/gpu/run tools/bench/staging.py --gigabytes 7 --json FILE    on the GPU machine, below 90 s
    python tools/bench/staging.py --double --gigabytes 0.1            a trial anywhere, against the tests' driver double

Shards of random bytes are written and stay in memory; every setting copies all of them to the GPU: once with a new pool
("first", what a program that has just started sees, pinning of memory included), then --rounds times ("best",
"median"); the device's memory is cleared before and compared with the files, every byte, after. From the bare folder
all settings are tried, from a mount the default ones. Rows:
    ceiling        from one pinned buffer of 256 MiB, again and again
    reads alone    as many threads read into buffers of as many bytes, and nothing is copied
    ring           the pool's pinned buffers: threads x buffers x size of each
    windows        parts of the files pinned where they are: threads x size of each
    both           both at once; the columns are those of the ring, and behind + are the windows
    ... no GIL     the same, and the calls that only begin something give the GIL away as well
    default        the pool as it is without being told anything; also through a mount
    cold           one shard that is not in memory, past the page cache and through it, and read past it by as many
                   threads with nothing copied
"pinning" is how long it takes to have the memory of a ring, all threads at once: huge pages that the threads touch and
register, which is what the pool has, and cuMemHostAlloc.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import mmap
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Final, Protocol

import numpy as np

from prefetch.pinned import Driver as PinnedDriver
from prefetch.staging import Copied, Driver, Piece, Staging, StagingConfig, StagingError
from tests.helpers.driver_double import DriverDouble

MIB: Final = 1 << 20
SHARDS: Final = 3
TENSOR_BYTES: Final = 48 * MIB + 4096
"""About that of a 7B model's larger matrices, and no multiple of a buffer."""
BASE_BYTES: Final = 64 * MIB
CEILING_BYTES: Final = 256 * MIB
CHECK_BYTES: Final = 32 * MIB
COMMAND: Final = [sys.executable, "-c", "from weightfs.cli.main import main; main()"]
RINGS: Final = [
    (threads, buffers, mib << 20)
    for threads, buffers, mib in ((12, 3, 4), (12, 2, 4), (14, 2, 4), (12, 3, 2), (14, 2, 2), (14, 3, 1), (12, 3, 16))
]
WINDOWS: Final = [(threads, mib << 20) for threads, mib in ((4, 64), (4, 128), (8, 128))]
BOTH: Final = [
    (threads, 2, mib << 20, windows, window_mib << 20)
    for threads, mib, windows, window_mib in (
        (12, 4, 4, 64), (12, 2, 4, 64), (10, 2, 4, 64), (8, 2, 6, 64), (12, 2, 3, 128), (14, 2, 2, 64), (12, 2, 4, 32),
        (12, 1, 4, 64),
    )
]  # fmt: skip
OPTIONAL: Final = ("way", "windows", "first_gb_s", "waited_share", "same_bytes", "past_cache_share")


class Gpu(Protocol):
    """Memory of the device, beside what staging asks for."""

    def allocate(self, nbytes: int) -> int: ...

    def clear(self, address: int, nbytes: int) -> None: ...

    def read(self, address: int, buffer: int, nbytes: int) -> None: ...


class RealGpu:
    """The first GPU; its context is current in the thread that makes this, and wherever `enter` was called."""

    def __init__(self, driver: PinnedDriver) -> None:
        from cuda.bindings import driver as cuda

        self._cuda = cuda
        self._driver = driver
        driver.retain(0)

    def _call(self, name: str, *arguments: Any) -> Any:
        self._driver.use(0)
        number, *given = getattr(self._cuda, name)(*arguments)
        if int(number):
            raise SystemExit(f"{name}: {number}")
        return given[0] if given else None

    def allocate(self, nbytes: int) -> int:
        return int(self._call("cuMemAlloc", nbytes))

    def clear(self, address: int, nbytes: int) -> None:
        self._call("cuMemsetD8", address, 0, nbytes)
        self._call("cuCtxSynchronize")

    def read(self, address: int, buffer: int, nbytes: int) -> None:
        self._call("cuMemcpyDtoH", buffer, address, nbytes)


class DoubleGpu:
    """The tests' double."""

    def __init__(self, driver: DriverDouble) -> None:
        self._driver = driver

    def allocate(self, nbytes: int) -> int:
        return self._driver.device_memory(nbytes)

    def clear(self, address: int, nbytes: int) -> None:
        ctypes.memset(address, 0, nbytes)

    def read(self, address: int, buffer: int, nbytes: int) -> None:
        ctypes.memmove(buffer, address, nbytes)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One setting."""

    what: str
    way: str | None
    source: str
    threads: int
    buffers: int
    buffer_mib: float
    windows: str | None
    first_gb_s: float | None
    best_gb_s: float
    median_gb_s: float
    of_ceiling: float | None
    waited_share: float | None
    samples: list[float]
    same_bytes: bool | None
    past_cache_share: float | None


def write_shards(folder: str, nbytes: int) -> list[str]:
    """Files of random bytes, each part of them another one, in memory and on the disk."""
    base = np.frombuffer(np.random.default_rng(7).bytes(BASE_BYTES), dtype=np.uint64)
    paths = [os.path.join(folder, f"model-{number + 1:05}-of-{SHARDS:05}.safetensors") for number in range(SHARDS)]
    shard_bytes = nbytes // SHARDS // 4096 * 4096
    fds = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644) for path in paths]

    def write(task: tuple[int, int]) -> None:
        shard, at = task
        part = (base + np.uint64(shard << 40 | at)).view(np.uint8)[: min(BASE_BYTES, shard_bytes - at)]
        os.pwrite(fds[shard], part.data, at)

    tasks = [(shard, at) for shard in range(SHARDS) for at in range(0, shard_bytes, BASE_BYTES)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, tasks))
        list(pool.map(os.fsync, fds))
    for fd in fds:
        os.close(fd)
    return paths


@contextlib.contextmanager
def mounted(source: str, place: str) -> Iterator[str]:
    """A mount of the folder, and its end."""
    point = os.path.join(place, "mount")
    os.mkdir(point)
    time.sleep(2.2)  # younger files are not recorded
    options = ["--state-dir", os.path.join(place, "state"), "--prefetch", "off", "--predict", "off", "--json"]
    done = subprocess.run([*COMMAND, "mount", source, point, *options], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"mount: {done.stdout}{done.stderr}")
    try:
        yield point
    finally:
        subprocess.run([*COMMAND, "umount", point], check=False, stdout=subprocess.DEVNULL)


def pieces_of(paths: list[str], fds: list[int], address: int) -> list[Piece]:
    """Every byte of the files, as tensors would be."""
    pieces = []
    for path, fd in zip(paths, fds, strict=True):
        size = os.stat(path).st_size
        for at in range(0, size, TENSOR_BYTES):
            length = min(TENSOR_BYTES, size - at)
            pieces.append(Piece(fd, at, length, address))
            address += length
    return pieces


def holds(gpu: Gpu, paths: list[str], address: int) -> bool:
    """Whether the device has the files, byte for byte."""
    parts = []
    for path in paths:
        size = os.stat(path).st_size
        parts += [(path, at, min(CHECK_BYTES, size - at), address + at) for at in range(0, size, CHECK_BYTES)]
        address += size
    own = threading.local()

    def same(part: tuple[str, int, int, int]) -> bool:
        path, at, length, where = part
        if not hasattr(own, "buffers"):
            own.buffers = np.empty(CHECK_BYTES, np.uint8), np.empty(CHECK_BYTES, np.uint8)
        found, wanted = own.buffers
        gpu.read(where, found.ctypes.data, length)
        with open(path, "rb", buffering=0) as file:
            file.seek(at)
            file.readinto(memoryview(wanted)[:length])
        return bool(np.array_equal(found[:length], wanted[:length]))

    with ThreadPoolExecutor(8) as pool:
        return all(pool.map(same, parts))


def ceiling(driver: Driver, address: int, nbytes: int) -> list[float]:
    """GB/s from pinned memory, of several rounds."""
    driver.use(0)
    size = min(CEILING_BYTES, nbytes)
    buffer, stream = driver.allocate(size), driver.open_stream()
    ctypes.memset(buffer, 1, size)
    rates = []
    for _ in range(4):
        started = time.perf_counter()
        for at in range(0, nbytes - size + 1, size):
            driver.copy(address + at, buffer, size, stream)
        driver.wait_stream(stream)
        rates.append(nbytes // size * size / (time.perf_counter() - started) / 1e9)
    driver.close_stream(stream)
    driver.free(buffer)
    return rates[1:]


def reads_alone(paths: list[str], threads: int, buffer_bytes: int) -> list[float]:
    """GB/s of threads that read all files into a few buffers."""
    fds = [os.open(path, os.O_RDONLY) for path in paths]
    sizes = [os.fstat(fd).st_size for fd in fds]
    tasks = [(fd, at) for fd, size in zip(fds, sizes, strict=True) for at in range(0, size, buffer_bytes)]
    own = threading.local()

    def read(task: tuple[int, int]) -> None:
        if not hasattr(own, "buffers"):
            own.buffers = [memoryview(bytearray(buffer_bytes)) for _ in range(3)]
        own.buffers.append(own.buffers.pop(0))
        os.preadv(task[0], [own.buffers[0]], task[1])

    rates = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(3):
            started = time.perf_counter()
            list(pool.map(read, tasks))
            rates.append(sum(sizes) / (time.perf_counter() - started) / 1e9)
    for fd in fds:
        os.close(fd)
    return rates[1:]


def pinning(driver: PinnedDriver, threads: int, each_bytes: int, parts: int) -> dict[str, float]:
    """Seconds until every thread has its memory, by either call."""
    found = {}
    for name, allocate in (("huge", driver.allocate_huge), ("cuMemHostAlloc", driver.allocate_plain)):
        barrier = threading.Barrier(threads + 1)
        addresses: list[int] = []

        def work(
            allocate: Callable[[int], int] = allocate,
            barrier: threading.Barrier = barrier,
            addresses: list[int] = addresses,
        ) -> None:
            driver.use(0)
            barrier.wait()
            with contextlib.suppress(StagingError):  # a driver that does not take it
                addresses.extend(allocate(each_bytes) for _ in range(parts))
            barrier.wait()

        workers = [threading.Thread(target=work) for _ in range(threads)]
        for worker in workers:
            worker.start()
        barrier.wait()
        started = time.perf_counter()
        barrier.wait()
        found[name] = round(time.perf_counter() - started, 4)
        for worker in workers:
            worker.join()
        driver.use(0)
        for address in addresses:
            driver.free(address)
        if len(addresses) < threads * parts:
            found[name] = float("nan")
    return found


def gives_gil_away(driver: PinnedDriver) -> None:
    """Have the driver give the GIL away in every call, as it does not."""
    library = ctypes.CDLL("libcuda.so.1")
    for name, kept in list(driver._functions.items()):
        function = getattr(library, name)
        function.argtypes, function.restype = kept.argtypes, kept.restype
        driver._functions[name] = function
    driver._copy = driver._functions["cuMemcpyHtoDAsync_v2"]
    driver._reached = driver._functions["cuEventQuery"]


class Bench:
    """All rows, each said as it comes."""

    def __init__(self, driver: Driver, gpu: Gpu, address: int, rounds: int) -> None:
        self.driver, self.gpu, self.address, self.rounds = driver, gpu, address, rounds
        self.ceiling_gb_s: float | None = None
        self.rows: list[Row] = []

    def add(self, what: str, source: str, samples: list[float], **more: Any) -> None:
        best = max(samples)
        said: dict[str, Any] = {**dict.fromkeys(OPTIONAL), **more}
        row = Row(
            what=what,
            source=source,
            samples=[round(one, 2) for one in samples],
            best_gb_s=round(best, 2),
            median_gb_s=round(statistics.median(samples), 2),
            of_ceiling=round(statistics.median(samples) / self.ceiling_gb_s, 3) if self.ceiling_gb_s else None,
            **said,
        )
        self.rows.append(row)
        print(
            f"{row.what:12} {row.source:6} {row.threads:2} x {row.buffers} x {row.buffer_mib:5.1f} MiB"
            f" + {row.windows or '-':12}"
            f"  first {row.first_gb_s or '-':>6}  best {row.best_gb_s:6.2f}  median {row.median_gb_s:6.2f} GB/s"
            f"  of ceiling {row.of_ceiling or '-'}  waited {row.waited_share}  bytes {row.same_bytes}",
            flush=True,
        )

    def pool(self, what: str, source: str, paths: list[str], config: StagingConfig) -> None:
        """One setting of the pool."""
        fds = [os.open(path, os.O_RDONLY) for path in paths]
        pieces = pieces_of(paths, fds, self.address)
        nbytes = sum(piece.nbytes for piece in pieces)
        self.gpu.clear(self.address, nbytes)
        pool = Staging(self.driver, config=config)
        started = time.perf_counter()
        pool.copy(pieces)
        first = nbytes / (time.perf_counter() - started) / 1e9
        samples: list[float] = []
        found: Copied | None = None
        for _ in range(self.rounds):
            self.gpu.clear(self.address, nbytes)
            time.sleep(0.15)  # windows of the copy before are given up beside what comes next, which is no copy
            started = time.perf_counter()
            found = pool.copy(pieces)
            samples.append(nbytes / (time.perf_counter() - started) / 1e9)
        assert found is not None
        same = holds(self.gpu, paths, self.address)
        pool.close()
        for fd in fds:
            os.close(fd)
        self.add(
            what,
            source,
            samples,
            threads=found.threads - (config.window_threads if found.way == "both" else 0),
            buffers=1 if found.way == "windows" else config.buffers,
            buffer_mib=(config.window_bytes if found.way == "windows" else config.buffer_bytes) / MIB,
            windows=f"{config.window_threads} x {config.window_bytes / MIB:g} MiB" if found.way == "both" else None,
            way=found.way,
            first_gb_s=round(first, 2),
            waited_share=round(found.waited_s / found.seconds, 3),
            same_bytes=same,
        )

    def cold(self, path: str, cpus: int) -> None:
        """One shard from the disk: past the page cache, through it, and read past it alone."""
        fd = os.open(path, os.O_RDONLY)
        pieces = pieces_of([path], [fd], self.address)
        nbytes = sum(piece.nbytes for piece in pieces)
        for what, past_cache in (("cold past", True), ("cold through", False)):
            pool = Staging(self.driver)
            pool.copy(pieces[:1])
            samples = []
            for _ in range(2):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                started = time.perf_counter()
                found = pool.copy(pieces, past_cache=past_cache)
                samples.append(nbytes / (time.perf_counter() - started) / 1e9)
            self.add(
                what,
                "bare",
                samples,
                threads=found.threads,
                buffers=3,
                buffer_mib=StagingConfig().buffer_bytes / MIB,
                way=found.way,
                waited_share=round(found.waited_s / found.seconds, 3),
                same_bytes=holds(self.gpu, [path], self.address),
                past_cache_share=round(found.past_cache_bytes / nbytes, 3),
            )
            pool.close()
        os.close(fd)
        os.posix_fadvise(fd := os.open(path, os.O_RDONLY | os.O_DIRECT), 0, 0, os.POSIX_FADV_DONTNEED)
        threads = max(1, min(12, cpus * 3 // 4))
        buffers = [mmap.mmap(-1, 16 * MIB) for _ in range(threads)]
        offsets = iter(range(0, nbytes, 16 * MIB))
        turn = threading.Lock()

        def read(buffer: mmap.mmap) -> None:
            while True:
                with turn:
                    at = next(offsets, None)
                if at is None:
                    return
                os.preadv(fd, [buffer], at)

        started = time.perf_counter()
        with ThreadPoolExecutor(threads) as executor:
            list(executor.map(read, buffers))
        rate = nbytes / (time.perf_counter() - started) / 1e9
        self.add("disk alone", "bare", [rate], threads=threads, buffers=1, buffer_mib=16)
        os.close(fd)


class Overhead:
    """The most host memory that is held beyond what was when it began, besides the page cache; a sample each 2 ms."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._before = self._now()
        self.most_bytes = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @staticmethod
    def _now() -> int:
        """Memory of nobody's file, and page tables. What the driver pins for itself counts as neither: see `end`."""
        with open("/proc/self/status") as file:
            lines = dict(line.split(":", 1) for line in file)
        return sum(int(lines[key].split()[0]) << 10 for key in ("RssAnon", "RssShmem", "VmPTE"))

    def _run(self) -> None:
        while not self._ended.wait(0.002):
            self.most_bytes = max(self.most_bytes, self._now() - self._before)

    def end(self, config: StagingConfig, threads: int) -> float:
        """MiB, with the pool's buffers."""
        self._ended.set()
        self._thread.join()
        return round((self.most_bytes + threads * config.buffers * config.buffer_bytes) / MIB, 1)


def timed(what: str, action: Callable[[], Any]) -> Any:
    started = time.perf_counter()
    result = action()
    print(f"{what}: {time.perf_counter() - started:.2f} s", flush=True)
    return result


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--gigabytes", type=float, default=7.0)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--folder", default=None, help="where the shards go (default: the folder for temp files)")
    options.add_argument("--json", default=None, metavar="FILE")
    options.add_argument("--double", action="store_true", help="no GPU: the driver double of the tests")
    options.add_argument("--no-mount", action="store_true")
    given = options.parse_args()
    began = time.perf_counter()
    double = DriverDouble()
    driver: Driver = double if given.double else PinnedDriver()
    gpu: Gpu = DoubleGpu(double) if given.double else RealGpu(driver)  # type: ignore[arg-type]
    driver.retain(0)
    with tempfile.TemporaryDirectory(prefix="weightfs-staging-", dir=given.folder) as place:
        source = os.path.join(place, "source")
        os.mkdir(source)
        paths = timed("write", lambda: write_shards(source, int(given.gigabytes * 1e9)))
        nbytes = sum(os.stat(path).st_size for path in paths)
        address = gpu.allocate(nbytes)
        bench = Bench(driver, gpu, address, given.rounds)
        rates = ceiling(driver, address, nbytes)
        bench.add("ceiling", "-", rates, threads=1, buffers=1, buffer_mib=CEILING_BYTES / MIB)
        bench.ceiling_gb_s = max(rates)
        pinned = {}
        if isinstance(driver, PinnedDriver):
            for count, mib, parts in ((12, 4, 3), (12, 16, 3), (1, 4, 3)):
                pinned[f"{count} threads x {parts} x {mib} MiB"] = pinning(driver, count, mib * MIB, parts)
        print("pinning, s:", json.dumps(pinned), flush=True)
        for threads, buffer_bytes in ((12, 16 * MIB), (16, 16 * MIB), (12, 4 * MIB), (16, 4 * MIB)):
            rates = reads_alone(paths, threads, buffer_bytes)
            bench.add("reads alone", "bare", rates, threads=threads, buffers=3, buffer_mib=buffer_bytes / MIB)
        for threads, window_bytes in WINDOWS:
            config = StagingConfig(way="windows", window_threads=threads, window_bytes=window_bytes)
            bench.pool("windows", "bare", paths, config)
        for threads, buffers, buffer_bytes, windows, window_bytes in BOTH:
            config = StagingConfig(
                way="both",
                threads=threads,
                buffers=buffers,
                buffer_bytes=buffer_bytes,
                window_threads=windows,
                window_bytes=window_bytes,
            )
            bench.pool("both", "bare", paths, config)
        for threads, buffers, buffer_bytes in RINGS:
            config = StagingConfig(way="ring", threads=threads, buffers=buffers, buffer_bytes=buffer_bytes)
            bench.pool("ring", "bare", paths, config)
        if isinstance(driver, PinnedDriver):
            gives_gil_away(driver)
            bench.driver = driver
            for way in ("ring", "both"):
                bench.pool(f"{way} no GIL", "bare", paths, StagingConfig(way=way))
            bench.driver = PinnedDriver()
        bench.pool("default", "bare", paths, StagingConfig())
        if not given.no_mount:
            with mounted(source, place) as point:
                through = [os.path.join(point, os.path.basename(path)) for path in paths]
                bench.pool("default", "mount", through, StagingConfig())
                bench.pool("both", "mount", through, StagingConfig(way="both"))
        probed = Staging(bench.driver)
        rates = timed("probe", probed.probe)
        with contextlib.ExitStack() as opened:
            files = [opened.enter_context(open(path, "rb")) for path in paths]
            overhead = Overhead()
            found = probed.copy(pieces_of(paths, [file.fileno() for file in files], address))
            overhead_mib = overhead.end(StagingConfig(), found.threads)
        print(f"host memory beside the page cache: {overhead_mib} MiB for {nbytes / 1e9:.1f} GB", flush=True)
        probed.close()
        print(f"probe: {rates}", flush=True)
        bench.cold(paths[0], os.cpu_count() or 1)
    document = {
        "schema": 1,
        "name": "staging",
        "command": " ".join(sys.argv),
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "gpu": "double" if given.double else driver.pci_address(0),
        "nbytes": nbytes,
        "pinning_s": pinned,
        "probe_gb_s": {way: round(rate / 1e9, 2) for way, rate in rates.bytes_per_s.items()},
        "overhead_mib": overhead_mib,
        "seconds": round(time.perf_counter() - began, 1),
        "rows": [asdict(row) for row in bench.rows],
    }
    print(f"{document['seconds']} s in all", flush=True)
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
            file.write("\n")
    if not all(row.same_bytes is not False for row in bench.rows):
        raise SystemExit("the GPU has other bytes than the files")


if __name__ == "__main__":
    main()
