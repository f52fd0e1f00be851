"""What chunks cost: compressing at several levels, both ciphers, adding and reading chunks of several sizes.

The sample is memory as a snapshot has it where it is no weights: the private anonymous pages of a Python process that
has imported what is installed here, without its zero pages. What one thread does is given per second of processor time,
so that whoever else works on the machine changes little; what two threads do at once, in seconds of the clock.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Final

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

import zstandard
from _harness import Report, parser, workplace

from checkpoint.chunks import pack
from checkpoint.chunks.keys import MasterKey
from checkpoint.chunks.packs import Packs
from checkpoint.chunks.sealing import Cipher, Sealer

_LEVELS: Final = (-5, -1, 1, 2, 3, 6)
_SIZES_KIB: Final = (64, 128, 256, 512, 1024)
_CHUNK: Final = 256 << 10
_MODULES: Final = (
    "asyncio",
    "email",
    "http.server",
    "numpy",
    "trio",
    "rich",
    "typer",
    "hypothesis",
    "unittest",
    "gguf",
)
_PAGE: Final = 4096


def memory(most_bytes: int) -> bytes:
    """The pages of this process that hold something, up to so many bytes, and 4096 bytes at a time."""
    for name in _MODULES:
        try:
            importlib.import_module(name)
        except ImportError:
            continue
    found = bytearray()
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", buffering=0) as content:
        for line in maps.read().splitlines():
            match = re.fullmatch(r"(\w+)-(\w+) rw-p \w+ 00:00 0\s+(\[heap\]|\[anon:.*\])?", line)
            if match is None or len(found) >= most_bytes:
                continue
            start, end = int(match[1], 16), int(match[2], 16)
            content.seek(start)
            try:
                region = content.read(min(end - start, most_bytes))
            except OSError:
                continue
            for at in range(0, len(region), _PAGE):
                if any(page := region[at : at + _PAGE]):
                    found += page
    return bytes(found[:most_bytes])


def per_core(action: Callable[[], int], rounds: int) -> list[float]:
    """GB/s of processor time, a value a round; a round takes at least 0.1 s of it."""
    found = []
    for _ in range(rounds):
        began, nbytes = time.process_time(), 0
        while (took := time.process_time() - began) < 0.1:
            nbytes += action()
        found.append(nbytes / took / 1e9)
    return found


def at_once(action: Callable[[], int], threads: int, rounds: int) -> list[float]:
    """GB/s by the clock that threads do together, a value a round."""
    found = []
    for _ in range(rounds):
        counts = [0] * threads
        until = time.perf_counter() + 0.3

        def work(number: int, counts: list[int] = counts, until: float = until) -> None:
            while time.perf_counter() < until:
                counts[number] += action()

        began = time.perf_counter()
        workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        found.append(sum(counts) / (time.perf_counter() - began) / 1e9)
    return found


def let_others_run(action: Callable[[], object]) -> float:
    """How often another thread got the GIL in each call; 0 where the call keeps it.

    Python itself does not give it up meanwhile. Unlike the speed of two threads, this says the same on a busy machine.
    """
    calls, counts, is_done = 300, [0], threading.Event()

    def count() -> None:
        while not is_done.is_set():
            counts[0] += 1
            time.sleep(0)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    other = threading.Thread(target=count)
    other.start()
    time.sleep(0.01)
    before = counts[0]
    for _ in range(calls):
        action()
    after = counts[0]
    is_done.set()
    other.join()
    sys.setswitchinterval(interval)
    return (after - before) / calls


def measure_levels(report: Report, pieces: list[memoryview], rounds: int) -> None:
    """What each level of zstd gains and costs."""
    nbytes = sum(piece.nbytes for piece in pieces)
    for level in _LEVELS:
        compressor, decompressor = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()
        small = [compressor.compress(piece) for piece in pieces]

        def compress(compressor: zstandard.ZstdCompressor = compressor) -> int:
            return sum(len(piece) for piece in pieces if compressor.compress(piece))

        def decompress(decompressor: zstandard.ZstdDecompressor = decompressor, small: list[bytes] = small) -> int:
            return sum(len(decompressor.decompress(piece)) for piece in small)

        report.value(f"zstd {level}: stored of each byte", sum(map(len, small)) / nbytes, "", None)
        report.record(f"zstd {level}: compress, per core", per_core(compress, rounds), "GB/s", None)
        report.record(f"zstd {level}: decompress, per core", per_core(decompress, rounds), "GB/s", None)


def measure_ciphers(report: Report, piece: memoryview, rounds: int) -> None:
    """What sealing and opening 256 KiB cost, and what keeps the GIL; `piece` is 256 KiB of the sample."""
    content = memoryview(os.urandom(_CHUNK))
    for cipher in Cipher:
        sealer = Sealer(cipher, bytes(32))
        sealed = sealer.seal(bytes(12), content, b"")

        def seal(sealer: Sealer = sealer) -> int:
            return len(sealer.seal(bytes(12), content, b""))

        def unseal(sealer: Sealer = sealer, sealed: bytes = sealed) -> int:
            return len(sealer.open(bytes(12), sealed, b"", ""))

        report.record(f"{cipher.name}: seal, per core", per_core(seal, rounds), "GB/s", None)
        report.record(f"{cipher.name}: open, per core", per_core(unseal, rounds), "GB/s", None)
        for threads in (1, 2):
            report.record(f"{cipher.name}: open, {threads} threads", at_once(unseal, threads, rounds), "GB/s", None)
    compressor, decompressor = zstandard.ZstdCompressor(level=pack.LEVEL), zstandard.ZstdDecompressor()
    small = compressor.compress(piece)
    sealer = Sealer(Cipher.AES_256_GCM, bytes(32))
    for name, action in (
        ("seal", lambda: sealer.seal(bytes(12), content, b"")),
        ("ids", lambda: pack.digest(bytes(32), content)),
        ("zstd, compress", lambda: compressor.compress(piece)),
        ("zstd, decompress", lambda: decompressor.decompress(small)),
        ("Python", lambda: sum(range(2000))),
    ):
        report.value(f"{name}: turns of another thread in each call", let_others_run(action), "", None)
    ids = per_core(lambda: len(content) * bool(pack.digest(bytes(32), content)), rounds)
    report.record("ids, per core", ids, "GB/s", None)


def measure_sizes(report: Report, folder: str, sample: bytes, rounds: int) -> None:
    """What adding and reading cost with chunks of some size."""
    master = MasterKey(secret=os.urandom(32))
    for kib in _SIZES_KIB:
        nbytes = kib << 10
        pieces = [memoryview(sample)[at : at + nbytes] for at in range(0, len(sample), nbytes)]
        added = []
        for number in range(rounds):
            packs = Packs(os.path.join(folder, f"{kib}-{number}"), master)
            with packs.begin(threads=0) as writer:
                began = time.process_time()
                ids = [writer.add(piece) for piece in pieces]
                added.append(len(sample) / (time.process_time() - began) / 1e9)
                done = writer.commit()
        report.value(f"{kib} KiB: stored of each byte", done.stored_nbytes / len(sample), "", None)
        report.record(f"{kib} KiB: add, per core", added, "GB/s", None)
        known = list(zip(ids, (piece.nbytes for piece in pieces), strict=True))

        def read_all(packs: Packs = packs, known: list[tuple[bytes, int]] = known, nbytes: int = nbytes) -> int:
            into = memoryview(bytearray(nbytes))
            for id_, length in known:
                packs.read(id_, into[:length])
            return len(sample)

        report.record(f"{kib} KiB: read, per core", per_core(read_all, rounds), "GB/s", None)
        for threads in (1, 2):
            report.record(f"{kib} KiB: read, {threads} threads", at_once(read_all, threads, rounds), "GB/s", None)


def main() -> None:
    """Run it."""
    options = parser(__doc__ or "")
    options.set_defaults(size=48)
    given = options.parse_args()
    report = Report("packs", given)
    sample = memory(given.size << 20)
    pieces = [memoryview(sample)[at : at + _CHUNK] for at in range(0, len(sample), _CHUNK)]
    report.value("sample", len(sample) / (1 << 20), "MiB", None)
    report.value("load average before", os.getloadavg()[0], "", None)
    measure_levels(report, pieces, given.rounds)
    measure_ciphers(report, pieces[len(pieces) // 2], given.rounds)
    with workplace(given.folder) as folder:
        measure_sizes(report, folder, sample, given.rounds)
    report.value("load average after", os.getloadavg()[0], "", None)
    report.finish()


if __name__ == "__main__":
    main()
