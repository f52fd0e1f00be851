"""Files and entries made to do harm: readable as plain bytes, without views, named in status; nothing hangs."""

from __future__ import annotations

import errno
import json
import os
import random
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.models import every_dtype, write, write_safetensors
from tests.helpers.mounting import ENGINES, Daemon, Mount, Mounter, both_engines, errno_from, weightfs, within
from tests.unit.formats.samples import ARRAY, STRING, UINT32, Gguf, entry, safetensors

MIB = 1 << 20
G = Gguf()


def nested_arrays(depth: int) -> bytes:
    value = G.array(UINT32, 0, b"")
    for _ in range(depth):
        value = G.array(ARRAY, 1, value)
    return value


def gguf_of(*tensors: bytes, data_bytes: int = 64) -> bytes:
    return G.file(tensors=tensors, data_bytes=data_bytes)


def many_small_objects(nbytes: int) -> bytes:
    """A header within the limit that would be millions of Python objects."""
    return safetensors(b"{" + b",".join(b'"%d":{"a":{}}' % n for n in range(nbytes // 16)) + b"}")


HOSTILE: dict[str, Callable[[], bytes]] = {
    "empty.safetensors": lambda: b"",
    "length-cut.safetensors": lambda: b"\x10\0\0",
    "header-cut.safetensors": lambda: safetensors({"a": entry("F32", [4], 0, 16)}, 16)[:30],
    "data-cut.safetensors": lambda: safetensors({"a": entry("F32", [4], 0, 16)}, 8),
    "trailing.safetensors": lambda: safetensors({"a": entry("F32", [4], 0, 16)}, 17),
    "lying.safetensors": lambda: safetensors({"a": entry("F32", [5], 0, 16)}, 16),
    "overlapping.safetensors": lambda: safetensors({"a": entry("U8", [9], 0, 9), "b": entry("U8", [9], 8, 17)}, 17),
    "gap.safetensors": lambda: safetensors({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 5, 6)}, 6),
    "backwards.safetensors": lambda: safetensors({"a": entry("U8", [1], 6, 5)}, 6),
    "huge-offset.safetensors": lambda: safetensors({"a": entry("U8", [1 << 62], 0, 1 << 62)}, 6),
    "huge-shape.safetensors": lambda: safetensors({"a": entry("U8", [1 << 40] * 8, 0, 6)}, 6),
    "negative.safetensors": lambda: safetensors({"a": entry("U8", [-1], 0, 6)}, 6),
    "dtype.safetensors": lambda: safetensors({"a": entry("F1024", [1], 0, 4)}, 4),
    "length-2^63.safetensors": lambda: struct.pack("<Q", 1 << 63) + b"{}",
    "length-2^64.safetensors": lambda: b"\xff" * 8 + b"{}",
    "length-100MB.safetensors": lambda: struct.pack("<Q", 100_000_001) + b"{" + b" " * 100_000_000,
    "objects.safetensors": lambda: many_small_objects(20_000_000),
    "nested.safetensors": lambda: safetensors(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "duplicate.safetensors": lambda: safetensors(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', 2
    ),
    "not-utf8.safetensors": lambda: safetensors(b'{"\xff\xfe":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1),
    "not-json.safetensors": lambda: safetensors(b"{nonsense", 4),
    "random.safetensors": lambda: random.Random(1).randbytes(100_000),
    "magic.gguf": lambda: b"GGML" + bytes(100),
    "version.gguf": lambda: b"GGUF" + struct.pack("<IQQ", 99, 0, 0),
    "cut.gguf": lambda: b"GGUF\x03",
    "tensors-2^63.gguf": lambda: G.file(tensor_count=1 << 63),
    "keys-2^63.gguf": lambda: G.file(key_count=1 << 63),
    "counts-lie.gguf": lambda: G.file(tensor_count=100_000, key_count=100_000),
    "string-2^63.gguf": lambda: G.file([G.pack("Q", 1 << 63) + bytes(100)]),
    "array-2^63.gguf": lambda: G.file([G.key("a", ARRAY, G.array(STRING, 1 << 63, b""))]),
    "arrays-in-arrays.gguf": lambda: G.file([G.key("a", ARRAY, nested_arrays(10_000))]),
    "value-type.gguf": lambda: G.file([G.key("a", 77, bytes(8))]),
    "tensor-type.gguf": lambda: gguf_of(G.tensor("t", [8], 999, 0)),
    "misaligned.gguf": lambda: gguf_of(G.tensor("t", [8], 0, 4)),
    "alignment-0.gguf": lambda: G.file([G.key("general.alignment", UINT32, G.pack("I", 0))], data_bytes=64),
    "beyond.gguf": lambda: gguf_of(G.tensor("t", [1 << 40], 0, 0)),
    "overlap.gguf": lambda: gguf_of(G.tensor("t", [16], 0, 0), G.tensor("u", [8], 0, 32)),
    "twice.gguf": lambda: gguf_of(G.tensor("t", [8], 0, 0), G.tensor("t", [8], 0, 32)),
    "dimensions.gguf": lambda: gguf_of(G.tensor("t", [1] * 5, 0, 0)),
    "huge-dimensions.gguf": lambda: gguf_of(G.tensor("t", [1 << 62] * 4, 0, 0)),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = str(tmp_path_factory.mktemp("source"))
    for name, make in HOSTILE.items():
        write(f"{root}/{name}/{name}", make())
    write_safetensors(f"{root}/good/model.safetensors", every_dtype())
    yield root
    for folder in ("length-100MB.safetensors", "objects.safetensors"):
        os.unlink(f"{root}/{folder}/{folder}")


@pytest.fixture(scope="module", params=ENGINES)
def mount(request: pytest.FixtureRequest, source: str, module_mounter: Mounter) -> Mount:
    return module_mounter(source, request.param)


def read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_header(mount: Mount, name: str) -> None:
    stem = name.rpartition(".")[0]
    path = f"{name}/{name}"
    assert within(20, lambda: os.listdir(mount.path(name, ".tensors"))) == []
    assert errno_from(lambda: os.stat(mount.path(name, ".tensors", stem))) == errno.ENOENT
    assert errno_from(lambda: os.stat(mount.path(name, ".npy", stem, "a.npy"))) == errno.ENOENT
    assert within(20, lambda: read(mount.path(path))) == read(f"{mount.source}/{path}")
    faults = {fault["path"]: fault for fault in mount.live()["faults"]}
    assert faults[path]["code"]
    assert faults[path]["message"]
    # What the header points at may lie beyond the file, but the fault is where a reader can look.
    assert 0 <= faults[path]["offset"] <= os.path.getsize(f"{mount.source}/{path}")


def test_memory_stays_bounded(mount: Mount) -> None:
    """After every hostile header was read, several times: 100 MB of header may not stay, nor become ten times that."""
    for name in HOSTILE:
        within(20, lambda name=name: os.listdir(mount.path(name, ".tensors")))  # type: ignore[misc]
    assert Daemon(mount.daemon_pid()).rss_bytes() < 200 * MIB
    assert Daemon(mount.daemon_pid()).rss_bytes("VmHWM") < 600 * MIB
    assert len(os.listdir(mount.path("good/.tensors/model"))) == len(every_dtype())


@pytest.mark.parametrize("name", ["overlapping.safetensors", "tensors-2^63.gguf", "length-2^63.safetensors"])
def test_verify_names_the_fault(mount: Mount, name: str) -> None:
    """Mounted and bare alike, exit status 4."""
    for folder in (mount.mountpoint, mount.source):
        done = weightfs("verify", os.path.join(folder, name, name), "--json")
        assert done.returncode == 4, done.stderr
        (file,) = json.loads(done.stdout)["files"]
        assert not file["ok"]
        assert {"code", "offset", "message"} <= set(file["faults"][0])


def make_special(root: str) -> None:
    os.mkfifo(f"{root}/fifo.safetensors")
    os.mknod(f"{root}/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(f"{root}/disk.gguf", stat.S_IFBLK | 0o666, os.makedev(7, 200))
    folder = os.open(root, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(f"/proc/self/fd/{folder}/socket.safetensors")
    os.close(folder)


@both_engines
def test_special_files(tmp_path: Path, mounter: Mounter, engine: str) -> None:
    """They show as what they are; opening them fails at once, and they have no views."""
    make_special(str(tmp_path))
    mount = mounter(str(tmp_path), engine)
    assert sorted(within(20, lambda: os.listdir(mount.mountpoint))) == sorted(os.listdir(tmp_path))
    for name in os.listdir(tmp_path):
        mounted, bare = os.lstat(mount.path(name)), os.lstat(f"{tmp_path}/{name}")
        assert (mounted.st_mode, mounted.st_rdev, mounted.st_size) == (bare.st_mode, bare.st_rdev, bare.st_size)
    assert within(20, lambda: os.listdir(mount.path(".tensors"))) == []
    # Devices: nodev. Sockets: ENXIO, as on any filesystem. A FIFO is the kernel's own, and none of the source's writers
    # is at its other end: opened without waiting it is empty.
    for name, wanted in (("null", errno.EACCES), ("disk.gguf", errno.EACCES), ("socket.safetensors", errno.ENXIO)):
        assert errno_from(lambda name=name: os.open(mount.path(name), os.O_RDONLY), timeout_s=5) == wanted  # type: ignore[misc]

    def look_into_the_fifo() -> bytes:
        fd = os.open(mount.path("fifo.safetensors"), os.O_RDONLY | os.O_NONBLOCK)
        try:
            return os.read(fd, 100)
        finally:
            os.close(fd)

    assert within(20, look_into_the_fifo) == b""
    assert mount.live()["faults"] == []


@both_engines
def test_links(tmp_path: Path, mounter: Mounter, engine: str) -> None:
    source = f"{tmp_path}/source"
    write(f"{source}/folder/file", b"inside")
    write(f"{tmp_path}/outside", b"outside")
    targets = {
        "absolute-out": f"{tmp_path}/outside",
        "relative-out": "../outside",
        "sly-out": "folder/../../outside",
        "system": "/etc/passwd",
        "proc": "/proc/self/root/etc/passwd",
        "itself": "itself",
        "one": "other",
        "other": "one",
        "absolute-in": f"{source}/folder/file",
        "relative-in": "folder/../folder/file",
        "root": source,
        "above": "..",
        "dot": ".",
        "gone": "folder/nothing",
    }
    for name, target in targets.items():
        os.symlink(target, f"{source}/{name}")
    os.symlink(f"{source}/folder/file", f"{source}/folder/absolute-in")
    mount = mounter(source, engine)
    assert set(os.listdir(mount.mountpoint)) == {*targets, "folder"}
    for name in targets:
        assert stat.S_ISLNK(within(20, lambda name=name: os.lstat(mount.path(name))).st_mode)  # type: ignore[misc]
    for name in ("absolute-out", "relative-out", "sly-out", "system", "proc", "above"):
        assert errno_from(lambda name=name: os.readlink(mount.path(name))) == errno.EACCES, name  # type: ignore[misc]
        assert errno_from(lambda name=name: os.stat(mount.path(name))) == errno.EACCES, name  # type: ignore[misc]
        assert errno_from(lambda name=name: read(mount.path(name))) == errno.EACCES, name  # type: ignore[misc]
    for name in ("itself", "one", "other"):
        assert os.readlink(mount.path(name)) == targets[name]
        assert errno_from(lambda name=name: os.stat(mount.path(name))) == errno.ELOOP, name  # type: ignore[misc]
    assert errno_from(lambda: os.stat(mount.path("gone"))) == errno.ENOENT
    for name in ("absolute-in", "relative-in", "folder/absolute-in"):
        landing = os.path.realpath(mount.path(name))
        assert landing == mount.path("folder/file"), "an absolute link into the source stays on the mount"
        assert read(mount.path(name)) == b"inside"
    assert os.path.samefile(mount.path("root"), mount.mountpoint)
    assert os.path.samefile(mount.path("dot"), mount.mountpoint)


@both_engines
def test_link_chains_out_of_the_source(tmp_path: Path, mounter: Mounter, engine: str) -> None:
    """A link that stays inside by its own words, but goes over a folder link that leads out."""
    source = f"{tmp_path}/source"
    write(f"{tmp_path}/outside/secret", b"secret")
    write(f"{source}/file", b"inside")
    os.symlink(f"{tmp_path}/outside", f"{source}/out")
    os.symlink("out/secret", f"{source}/chained")
    mount = mounter(source, engine)
    for path in ("chained", "out/secret"):
        assert errno_from(lambda path=path: read(mount.path(path))) == errno.EACCES  # type: ignore[misc]
    for folder in (".tensors", ".npy"):
        assert errno_from(lambda folder=folder: os.stat(mount.path("out", folder))) == errno.EACCES  # type: ignore[misc]


@both_engines
def test_deep_folders(tmp_path: Path, mounter: Mounter, engine: str) -> None:
    """As deep as one path can name from the mountpoint, and by descriptor deeper."""
    folder, depth = os.open(tmp_path, os.O_RDONLY), 300
    for _ in range(depth):
        os.mkdir("deep-folder", dir_fd=folder)
        below = os.open("deep-folder", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    with open(os.open("file", os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=folder), "wb") as file:
        file.write(b"deep")
    os.close(folder)
    mount = mounter(str(tmp_path), engine)
    at = os.open(mount.mountpoint, os.O_RDONLY)
    for _ in range(depth):
        below = os.open("deep-folder", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    with open(os.open("file", os.O_RDONLY, dir_fd=at), "rb") as seen:
        assert seen.read() == b"deep"
    os.close(at)
    assert len(list(os.walk(mount.mountpoint))) == depth + 1
