"""Threads that use a mount in every way a program does, compare every byte with the source, and time every call."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
import os
import random
import signal
import subprocess
import sys
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, TypeVar

import numpy as np

from tests.helpers.models import model_tensors, write, write_safetensors, write_sharded
from weightfs.formats import encode_name, npy_header
from weightfs.model import open_model

T = TypeVar("T")

_SHARE_BYTES: Final = 256 << 10
"""Largest range read or compared at once."""
_MAP_BYTES: Final = 1 << 20

_libc = ctypes.CDLL(None)
_libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]

_LOADER: Final = """
import sys, time
from safetensors.torch import load_file
import torch
torch.set_num_threads(1)
bare = load_file(sys.argv[1])
print("ready", flush=True)
while True:
    started = time.perf_counter()
    seen = load_file(sys.argv[2])
    assert seen.keys() == bare.keys()
    for name, tensor in bare.items():
        assert torch.equal(seen[name].view(torch.uint8), tensor.view(torch.uint8)), name
    print(time.perf_counter() - started, flush=True)
"""


def write_samples(folder: str, *, rows: int = 4096) -> None:
    """A model in three shards (of `rows` * 128 bytes a tensor), one in a file, and small files in folders."""
    write_sharded(os.path.join(folder, "sharded"), model_tensors(4, seed=1, rows=rows), 3)
    write_safetensors(os.path.join(folder, "single", "model.safetensors"), model_tensors(2, seed=2, rows=rows))
    for number in range(40):
        data = random.Random(number).randbytes(number * 997 + 1)
        write(os.path.join(folder, "many", f"folder-{number % 5}", f"file-{number}"), data)


@dataclass(frozen=True, slots=True)
class View:
    """A tensor as a file of the mount: its path there, and where its bytes lie."""

    path: str
    file: str
    prefix: bytes
    offset: int
    nbytes: int


def views_of(source: str, folder: str) -> list[View]:
    """Every view of the model in a folder of the source, below the mount's root."""
    found = []
    for extent in open_model(os.path.join(source, folder)).tensors:
        file = os.path.join(folder, extent.file)
        raw = os.path.join(folder, ".tensors", "model", encode_name(extent.name))
        found.append(View(raw, file, b"", extent.offset, extent.nbytes))
        if (header := npy_header(extent.dtype, extent.shape)) is not None:
            npy = os.path.join(folder, ".npy", "model", encode_name(extent.name, ".npy"))
            found.append(View(npy, file, header, extent.offset, extent.nbytes))
    return found


def _differ(one: mmap.mmap, other: mmap.mmap, at: int, nbytes: int) -> bool:
    """By memcmp, which drops the interpreter's lock: a page that has to be waited for holds up one thread alone."""
    first, second = np.frombuffer(one, np.uint8), np.frombuffer(other, np.uint8)
    return bool(_libc.memcmp(first.ctypes.data + at, second.ctypes.data + at, nbytes))


class Load:
    """Runs from `with` to the end of the block.

    Attributes:
        latencies: seconds of each call, by operation.
        errors: how often an operation failed, by (operation, errno's name).
        wrong: what did not have the source's bytes.
    """

    def __init__(self, source: str, mountpoint: str, *, threads: int = 8, pause_s: float = 0.0) -> None:
        """Find out what there is to read.

        Args:
            source: a folder that does not change meanwhile.
            mountpoint: where it is shown.
            threads: how many work at once.
            pause_s: what each waits between two rounds.
        """
        self._source = source
        self._mountpoint = mountpoint
        self._pause_s = pause_s
        self._folders = [os.path.relpath(folder, source) for folder, _, _ in os.walk(source)]
        self._files = [
            os.path.relpath(os.path.join(folder, name), source)
            for folder, _, names in os.walk(source)
            for name in names
        ]
        models = [folder for folder in self._folders if any(n.endswith(".safetensors") for n in self._names(folder))]
        self._views = [view for folder in models for view in views_of(source, folder)]
        self._bare: dict[str, int] = {}
        self._ends = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(n,), daemon=True) for n in range(threads)]
        self._lock = threading.Lock()
        self.latencies: dict[str, array[float]] = {}
        self.errors: Counter[tuple[str, str]] = Counter()
        self.wrong: list[str] = []

    def _names(self, folder: str) -> list[str]:
        return os.listdir(os.path.join(self._source, folder))

    @property
    def operations(self) -> int:
        """How many calls were made."""
        return sum(map(len, self.latencies.copy().values()))

    @property
    def slowest_s(self) -> float:
        """The slowest call of all."""
        return max((max(times) for times in self.latencies.values() if times), default=0.0)

    def quantile(self, operation: str, share: float) -> float:
        """Seconds that `share` of an operation's calls took at most."""
        times = sorted(self.latencies[operation])
        return times[min(int(share * len(times)), len(times) - 1)]

    def must_be_spotless(self, slowest_s: float) -> None:
        """Nothing failed, no byte was wrong, nothing took longer than `slowest_s`."""
        assert not self.errors, dict(self.errors)
        assert not self.wrong, self.wrong[:10]
        assert self.operations
        assert self.slowest_s < slowest_s, {name: max(times) for name, times in self.latencies.items()}

    def __enter__(self) -> Load:
        self._bare = {file: os.open(os.path.join(self._source, file), os.O_RDONLY) for file in self._files}
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join(60)
        hung = [thread.name for thread in self._threads if thread.is_alive()]
        for fd in () if hung else self._bare.values():
            os.close(fd)
        assert not hung, "a thread did not come back within 60 s"

    def _do(self, operation: str, call: Callable[[], T]) -> T:
        started = time.perf_counter()
        try:
            return call()
        except OSError as e:
            with self._lock:
                self.errors[operation, errno.errorcode.get(e.errno or 0, str(e.errno))] += 1
            raise
        finally:
            took = time.perf_counter() - started
            with self._lock:
                self.latencies.setdefault(operation, array("d")).append(took)

    def _work(self, number: int) -> None:
        chosen = random.Random(number)
        rounds = [self._read, self._map, self._look, self._list, self._view, self._view, self._absent]
        while not self._ends.wait(self._pause_s):
            try:
                chosen.choice(rounds)(chosen)
            except OSError:
                continue  # is counted
            except Exception as e:  # noqa: BLE001 - a thread's end must show
                self.wrong.append(repr(e))

    @contextlib.contextmanager
    def _opened(self, operation: str, path: str) -> Iterator[int]:
        place = os.path.join(self._mountpoint, path)
        fd = self._do(operation, lambda: os.open(place, os.O_RDONLY))
        try:
            yield fd
        finally:
            self._do("close", lambda: os.close(fd))

    def _compare(self, path: str, seen: bytes, wanted: bytes) -> None:
        if seen != wanted:
            self.wrong.append(f"{path}: {len(seen)} bytes instead of {len(wanted)}, or others")

    def _read(self, chosen: random.Random) -> None:
        path = chosen.choice(self._files)
        with self._opened("open", path) as fd:
            size = self._do("fstat", lambda: os.fstat(fd).st_size)
            if chosen.random() < 0.5:  # else the portable engine's reads would end in the kernel's cache
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            for _ in range(4):
                at, nbytes = chosen.randrange(size), chosen.randrange(1, _SHARE_BYTES)
                seen = self._do("pread", lambda at=at, nbytes=nbytes: os.pread(fd, nbytes, at))  # type: ignore[misc]
                self._compare(path, seen, os.pread(self._bare[path], nbytes, at))

    def _map(self, chosen: random.Random) -> None:
        path = chosen.choice(self._files)
        with self._opened("open", path) as fd:
            size = os.fstat(self._bare[path]).st_size
            mapped = self._do("mmap", lambda: mmap.mmap(fd, size, prot=mmap.PROT_READ))
        with mapped, mmap.mmap(self._bare[path], size, prot=mmap.PROT_READ) as bare:
            at = chosen.randrange(size)
            nbytes = min(size - at, _MAP_BYTES)
            differs = self._do("touch mmap", functools.partial(_differ, mapped, bare, at, nbytes))
            if differs:
                self.wrong.append(f"{path}: mapped bytes differ")

    def _look(self, chosen: random.Random) -> None:
        path = chosen.choice(self._files)
        place = os.path.join(self._mountpoint, path)
        seen = self._do("stat", lambda: os.stat(place))
        wanted = os.fstat(self._bare[path])
        if (seen.st_size, seen.st_mtime_ns, seen.st_mode) != (wanted.st_size, wanted.st_mtime_ns, wanted.st_mode):
            self.wrong.append(f"{path}: stat differs")

    def _list(self, chosen: random.Random) -> None:
        folder = chosen.choice(self._folders)
        place = os.path.join(self._mountpoint, folder)
        seen = self._do("listdir", lambda: os.listdir(place))
        if sorted(seen) != sorted(self._names(folder)):
            self.wrong.append(f"{folder}: listing differs: {sorted(seen)}")

    def _view(self, chosen: random.Random) -> None:
        view = chosen.choice(self._views)
        with self._opened("open view", view.path) as fd:
            if chosen.random() < 0.5:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            at = chosen.randrange(len(view.prefix) + view.nbytes)
            seen = self._do("pread view", lambda: os.pread(fd, _SHARE_BYTES, at))
        start = max(at - len(view.prefix), 0)
        head = view.prefix[at : at + _SHARE_BYTES]
        rest = os.pread(self._bare[view.file], min(view.nbytes - start, _SHARE_BYTES - len(head)), view.offset + start)
        self._compare(view.path, seen, head + rest)

    def _absent(self, chosen: random.Random) -> None:
        place = os.path.join(self._mountpoint, f"absent-{chosen.randrange(1000)}")
        if self._do("stat absent", lambda: os.path.exists(place)):
            self.wrong.append(f"{place}: exists")


class Loader:
    """A process that loads a file with safetensors over and over and compares it with the source's.

    Attributes:
        rounds_s: seconds of each round, once the block has ended.
        fault: what ended it before that; empty when nothing did.
    """

    def __init__(self, bare: str, through: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _LOADER, bare, through],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.rounds_s: list[float] = []
        self.fault = ""

    def __enter__(self) -> Loader:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n", self._process.communicate()[1]
        return self

    def __exit__(self, *_: Any) -> None:
        if self._process.poll() is not None:
            self.fault = f"ended with {self._process.returncode}"
        self._process.send_signal(signal.SIGKILL)
        said, complaints = self._process.communicate()
        self.rounds_s = [float(line) for line in said.splitlines()]
        if self.fault:
            self.fault += f": {complaints[-1000:]}"
