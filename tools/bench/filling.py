"""How fast the page server fills memory from weights, chunks and zeros, without CRIU and without a GPU.

A process of `--size` MiB, of which most are parts of a weight file on a mount, as a transformers server's are that CUDA
brought to the host; beside these a heap of `--heap` MiB in chunks of 84 KiB on average, and zeros between them. It
hands its userfaultfd over as CRIU does. Rows: all of it, from chunks encrypted and open; then each kind alone.
Everything is in the page cache. In the first round the process digests its memory.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from _harness import MIB, Report, mounted, parser, workplace, write_file

from checkpoint.chunks import keys
from checkpoint.chunks.openers import Openers
from checkpoint.chunks.packs import Packs
from checkpoint.digests import Identity
from checkpoint.extents import ChunkBytes, Extent, Recipe, WeightBytes, Zero
from checkpoint.pages import RecipePages, Sources
from checkpoint.pageserver import SOCKET, PageServer

_PAGE: Final = 4096
_TARGET: Final = """
import ctypes, hashlib, json, mmap, os, socket, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(what, result):
    if result < 0:
        raise OSError(ctypes.get_errno(), what)
    return result
link = socket.socket(fileno=int(sys.argv[1]))
fd = call("userfaultfd", libc.syscall(282 if os.uname().machine == "aarch64" else 323, os.O_CLOEXEC | os.O_NONBLOCK))
request = ctypes.create_string_buffer(struct.pack("<QQQ", 0xAA, 0x4E, 0), 24)
call("UFFDIO_API", libc.ioctl(fd, ctypes.c_ulong(0xC018AA3F), request))
held, told = [], []
for size in json.loads(sys.argv[2]):
    held.append(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    start = ctypes.addressof(ctypes.c_char.from_buffer(held[-1]))
    request = ctypes.create_string_buffer(struct.pack("<QQQQ", start, size, 1, 0), 32)
    call("UFFDIO_REGISTER", libc.ioctl(fd, ctypes.c_ulong(0xC020AA00), request))
    told.append(start)
socket.send_fds(link, [json.dumps(told).encode()], [fd])
os.close(fd)
while link.recv(1):
    digest = hashlib.blake2b()
    for one in held:
        digest.update(one)
    link.send(digest.digest())
os._exit(0)
"""
_RESTORED: Final = struct.pack("<I", 0x52535446)
_LIMIT_S: Final = 60.0


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Memory to be filled in.

    Attributes:
        mappings: what each is made of, whole pages.
        digest: of all of it.
    """

    mappings: Sequence[Sequence[Extent]]
    digest: bytes

    @property
    def sizes(self) -> list[int]:
        """Bytes of each mapping."""
        return [sum(one.nbytes for one in mapping) for mapping in self.mappings]


@dataclass(frozen=True, kw_only=True)
class Maker:
    """What samples are made from."""

    weights: str
    packs: Packs
    size: int
    heap: int

    def sample(self, kinds: str) -> Sample:
        """Memory of these kinds: `w`eights, `c`hunks, `z`eros."""
        digest = hashlib.blake2b()
        chance = random.Random(1)
        heap: list[Extent] = []
        large: list[Extent] = []
        if "c" in kinds:
            heap = self._heap(chance, digest, "z" in kinds)
        left = self.size - sum(one.nbytes for one in heap)
        at = 1000  # as behind a header: never a multiple of a page
        with open(self.weights, "rb") as file:
            available = os.fstat(file.fileno()).st_size - at
            file.seek(at)
            while "w" in kinds and left >= _PAGE:
                nbytes = min(left, chance.randrange(2 * MIB, 50 * MIB) // _PAGE * _PAGE, available // _PAGE * _PAGE)
                if nbytes < _PAGE:
                    break
                large.append(WeightBytes(0, at, nbytes))
                digest.update(file.read(nbytes))
                at, left, available = at + nbytes, left - nbytes, available - nbytes
                if "z" in kinds and left > MIB:
                    large.append(Zero(MIB))
                    digest.update(bytes(MIB))
                    left -= MIB
        if kinds == "z":
            large.append(Zero(left))
            digest.update(bytes(left))
        return Sample(mappings=[one for one in (heap, large) if one], digest=digest.digest())

    def _heap(self, chance: random.Random, digest: hashlib.blake2b, with_zeros: bool) -> list[Extent]:
        words = [chance.randbytes(5).hex().encode() for _ in range(4096)]
        pool = b" ".join(words[chance.randrange(4096)] + b"%d" % number for number in range(200_000))
        found: list[Extent] = []
        left = self.heap
        with self.packs.begin() as writer:
            while left >= 64 * _PAGE:
                nbytes = chance.randrange(8, 35) * _PAGE
                start = chance.randrange(len(pool) - nbytes)
                content = pool[start : start + nbytes - 8] + chance.randbytes(8)
                found.append(ChunkBytes(writer.add(memoryview(content)), nbytes))
                digest.update(content)
                left -= nbytes
                if with_zeros and chance.random() < 0.3:
                    found.append(Zero(nbytes := chance.randrange(4, 24) * _PAGE))
                    digest.update(bytes(nbytes))
                    left -= nbytes
            writer.commit()
        return found


class Filled:
    """Fills a fresh process with a sample, again and again.

    Args:
        sample: its memory.
        maker: what that was made from.
        threads: of the page server; None for its own choice.
    """

    def __init__(self, sample: Sample, maker: Maker, threads: int | None) -> None:
        self._sample = sample
        self._maker = maker
        self._threads = threads
        self.cpu_s: list[float] = []

    def once(self, *, verify: bool = False) -> float:
        """Seconds from CRIU's mark to the last page."""
        with tempfile.TemporaryDirectory() as folder, _process(self._sample.sizes) as (pid, starts, fd, link):
            placed = sorted(zip(starts, self._sample.mappings, strict=True))
            images = _images(folder, pid, [(start, sum(one.nbytes for one in mapping)) for start, mapping in placed])
            identity = {self._maker.weights: Identity.of(os.stat(self._maker.weights))}
            recipe = Recipe([one for _, mapping in placed for one in mapping])
            openers = Openers(self._maker.packs)
            openers.begin()
            with contextlib.closing(openers), Sources(identity, openers) as sources:
                pages = RecipePages(images, recipe, sources)
                with (
                    PageServer(folder, folder, threads=self._threads, opened=lambda _: {images: pages}) as server,
                    socket.socket(socket.AF_UNIX) as criu,
                ):
                    criu.connect(os.path.join(folder, SOCKET))
                    criu.sendall(struct.pack("<i", pid))
                    socket.send_fds(criu, [b"\0"], [fd])
                    os.close(fd)
                    used = time.process_time()
                    criu.sendall(_RESTORED)
                    seconds = server.finish(_LIMIT_S).seconds
                    self.cpu_s.append(time.process_time() - used)
            if verify:
                link.send(b"?")
                if link.recv(64, socket.MSG_WAITALL) != self._sample.digest:
                    raise SystemExit("memory is not what it was")
        return seconds


@contextlib.contextmanager
def _process(sizes: Sequence[int]) -> Iterator[tuple[int, list[int], int, socket.socket]]:
    """A process with empty mappings: its pid, where they are, its userfaultfd, and the link to it."""
    ours, its = socket.socketpair()
    argv = [sys.executable, "-I", "-c", _TARGET, str(its.fileno()), json.dumps(sizes)]
    with subprocess.Popen(argv, pass_fds=[its.fileno()]) as process:
        its.close()
        with ours:
            said, fds, _, _ = socket.recv_fds(ours, 1 << 16, 1)
            if not said:
                raise SystemExit("userfaultfd is not to be had here")
            yield process.pid, json.loads(said), fds[0], ours


def _images(folder: str, pid: int, mapped: Sequence[tuple[int, int]]) -> str:
    """What a page server reads of CRIU's images; gives the path of the pages.

    `mapped`: start and bytes of each mapping, ascending.
    """
    vmas = [(14, _message((1, start), (2, start + nbytes), (6, 0x22))) for start, nbytes in mapped]
    runs = [_message((1, start), (2, 1), (4, 6), (5, nbytes // _PAGE)) for start, nbytes in mapped]
    _write(folder, "pstree", 0x50273030, _message((1, pid), (2, 0)))
    _write(folder, f"mm-{pid}", 0x57492820, _message((5, 0), (6, 0), (7, 0), *vmas))
    _write(folder, f"pagemap-{pid}", 0x56084025, _message((1, 1)), *runs)
    path = os.path.join(folder, "pages-1.img")
    with open(path, "wb") as file:
        file.truncate(sum(nbytes for _, nbytes in mapped))
    return path


def _write(folder: str, name: str, magic: int, *messages: bytes) -> None:
    with open(os.path.join(folder, f"{name}.img"), "wb") as file:
        file.write(struct.pack("<II", 0x54564319, magic))
        for one in messages:
            file.write(struct.pack("<I", len(one)) + one)


def _message(*fields: tuple[int, int | bytes]) -> bytes:
    out = bytearray()
    for number, value in fields:
        is_bytes = isinstance(value, bytes)
        out += _varint(number << 3 | (2 if is_bytes else 0))
        out += _varint(len(value)) + value if isinstance(value, bytes) else _varint(value)
    return bytes(out)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def measure(report: Report, makers: Mapping[str, Maker], given: argparse.Namespace) -> None:
    """All rows."""
    rows = [("all, encrypted", "encrypted", "wcz"), ("all, open", "open", "wcz")]
    rows += [("weights", "open", "w"), ("chunks, encrypted", "encrypted", "c"), ("zeros", "open", "z")]
    filled: dict[str, tuple[Filled, int, list[float]]] = {}
    for name, kept, kinds in rows:
        if not given.rows or name in given.rows.split(";"):
            sample = makers[kept].sample(kinds)
            filled[name] = Filled(sample, makers[kept], given.threads), sum(sample.sizes), []
            filled[name][0].once(verify=True)
    for _ in range(given.rounds):
        for one, _, took in filled.values():
            took.append(one.once())
    for name, (one, nbytes, took) in filled.items():
        report.record(f"{name}, {nbytes / 1e9:.2f} GB", [nbytes / seconds / 1e9 for seconds in took], "GB/s", None)
        cpu_s = sorted(one.cpu_s[1:])[given.rounds // 2]
        report.value(f"{name}: processor time of the page server", cpu_s / nbytes * 1e9, "s/GB")


def main() -> None:
    """Run it."""
    options = parser(__doc__ or "")
    options.set_defaults(size=1024, rounds=3)
    options.add_argument("--heap", type=int, default=128, metavar="MIB", help="of it, in chunks (default 128 MiB)")
    options.add_argument("--threads", type=int, default=None, help="that copy (default: the page server's own choice)")
    options.add_argument("--rows", default="", help="only these, with ; between them")
    given = options.parse_args()
    report = Report("filling", given)
    with workplace(given.folder) as place:
        source = os.path.join(place, "source")
        os.mkdir(source)
        write_file(os.path.join(source, "weights.bin"), given.size * MIB)
        key = os.path.join(place, "key")
        with open(os.open(key, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
            file.write(os.urandom(32))
        with mounted(source, place, prefetch="off") as mount:
            report.describe(mount)
            weights = os.path.join(mount.path, "weights.bin")
            masters = {"encrypted": keys.from_file(key), "open": None}
            makers = {
                name: Maker(
                    weights=weights,
                    packs=Packs(os.path.join(place, name), master),
                    size=given.size * MIB,
                    heap=given.heap * MIB,
                )
                for name, master in masters.items()
            }
            measure(report, makers, given)
    report.finish()


if __name__ == "__main__":
    main()
