"""How fast CRIU's images become recipes, and what is left of them for chunks.

Made up like the images of a server on a GPU: of `--size` MiB a twelfth heap, a tenth zeros, and the rest tensors at
multiples of 512 bytes. Or the images of a snapshot, `--images FOLDER` with `--weights FILE` for each file of weights.
Chunks are given BLAKE3's keyed digest as a store would, and forgotten: compressing and sealing are not in it. The
control is one thread that reads the same images once. Everything is in the page cache.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Final

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

import blake3
import numpy as np
from _harness import MIB, Report, alternate, parser, read_through, touched, warm, workplace, write_safetensors

from checkpoint.extents import ChunkBytes, Recipe, WeightBytes, Zero, encode
from checkpoint.ingest import ingest
from checkpoint.weightfinding import Anchors, opened

_KEY: Final = bytes(range(32))
_TENSOR_BYTES: Final = 16 * MIB
_APART_BYTES: Final = 512
_GB: Final = 1e9


@dataclass
class Chunks:
    """A store that knows which chunks it has seen."""

    nbytes: int = 0
    seen: dict[bytes, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, content: memoryview) -> bytes:
        """Digest it."""
        found = blake3.blake3(content, key=_KEY).digest()
        with self.lock:
            self.seen[found] = len(content)
            self.nbytes += len(content)
        return found


def made_up(folder: str, size_mib: int) -> tuple[list[str], list[str]]:
    """An image and a weight file."""
    weights, image = os.path.join(folder, "model.safetensors"), os.path.join(folder, "pages-1.img")
    heap_bytes, zero_bytes = size_mib * MIB // 12, size_mib * MIB // 10
    count = max(1, (size_mib * MIB - heap_bytes - zero_bytes) // _TENSOR_BYTES)
    extents = write_safetensors(weights, count, _TENSOR_BYTES)
    random = np.random.default_rng(5)
    with open(image, "wb") as file, open(weights, "rb", buffering=0) as source:
        heap = np.cumsum(random.integers(0, 9, heap_bytes // 8, dtype=np.uint64) * np.uint64(16))  # like pointers
        file.write(heap.tobytes()[: heap_bytes // _APART_BYTES * _APART_BYTES])
        for offset, nbytes in extents.values():
            file.write(os.pread(source.fileno(), nbytes, offset))
            file.write(bytes(_APART_BYTES))
        file.write(bytes(zero_bytes - (file.tell() + zero_bytes) % 4096))
    warm(image)
    return [image], [weights]


def all_at_once(images: list[str], weights: list[str], threads: int) -> tuple[dict[str, Recipe], Chunks, float]:
    """Take all images in; gives how long the anchors took as well."""
    chunks = Chunks()
    with opened(weights) as files:
        began = time.perf_counter()
        anchors = Anchors(files, threads=threads)
        took = time.perf_counter() - began
        recipes = {os.path.basename(path): ingest(path, anchors, chunks.add, threads=threads) for path in images}
    return recipes, chunks, took


def shares(report: Report, recipes: dict[str, Recipe], chunks: Chunks, nbytes: int) -> None:
    """What the images are made of."""
    extents = [extent for recipe in recipes.values() for extent in recipe.extents]
    for name, kind in (("weights", WeightBytes), ("zeros", Zero), ("chunks", ChunkBytes)):
        of_kind = [extent.nbytes for extent in extents if isinstance(extent, kind)]
        part = 100 * sum(of_kind) / nbytes
        report.value(f"{name}: share of the images", part, "%", note=f"{len(of_kind)} extents")
    report.value("chunks, each once", sum(chunks.seen.values()) / MIB, "MiB")
    report.value("recipes, coded", len(encode(recipes)) / 1024, "KiB")


def main() -> None:
    """Run it."""
    options = parser(__doc__ or "")
    options.set_defaults(size=1024)
    cores = len(os.sched_getaffinity(0))
    options.add_argument("--threads", type=int, default=cores, help="default: one a processor")
    options.add_argument("--images", default=None, metavar="FOLDER", help="images of a snapshot instead")
    options.add_argument("--weights", action="append", default=[], metavar="FILE", help="that its processes had read")
    given = options.parse_args()
    report = Report("ingest", given)
    with workplace(given.folder) as folder:
        if given.images is None:
            images, weights = made_up(folder, given.size)
        else:
            images, weights = _images(given), given.weights
        nbytes = sum(os.path.getsize(path) for path in images)
        _measure(report, images, weights, nbytes, given, cores)
    report.finish()


def _measure(
    report: Report, images: list[str], weights: list[str], nbytes: int, given: argparse.Namespace, cores: int
) -> None:
    buffer = touched(4 * MIB)
    anchors_ms, processor_s = [], []

    def bare() -> float:
        began = time.perf_counter()
        for path in images:
            with open(path, "rb", buffering=0) as file:
                read_through(file.fileno(), buffer)
        return nbytes / _GB / (time.perf_counter() - began)

    def taken() -> float:
        began, before = time.perf_counter(), time.process_time()
        _, _, anchors_s = all_at_once(images, weights, given.threads)
        took = time.perf_counter() - began
        anchors_ms.append(1000 * anchors_s)
        processor_s.append(time.process_time() - before)
        return nbytes / _GB / took

    recipes, chunks, _ = all_at_once(images, weights, given.threads)
    samples = alternate(bare, taken, given.rounds)
    target = 2.0 if cores >= 16 else None
    report.measure(f"images taken in, {given.threads} threads", samples, "GB/s", target, "at least")
    report.value("the same by processor time", nbytes / _GB / sorted(processor_s)[len(processor_s) // 2], "GB/s a core")
    report.record("reading the anchors, of that", anchors_ms, "ms", None)
    for threads in (each for each in (1, 2, 4, 8, 16) if each <= cores and each != given.threads):
        rates = []
        for _ in range(given.rounds):
            began = time.perf_counter()
            all_at_once(images, weights, threads)
            rates.append(nbytes / _GB / (time.perf_counter() - began))
        report.record(f"with {threads} threads", rates, "GB/s", None)
    shares(report, recipes, chunks, nbytes)


def _images(given: argparse.Namespace) -> list[str]:
    found = [entry.path for entry in os.scandir(given.images) if entry.is_file() and entry.name.endswith(".img")]
    for path in (*found, *given.weights):
        warm(path)
    return sorted(found)


if __name__ == "__main__":
    main()
