"""Every tensor as a file of its own: bytes, names, attributes, sets."""

from __future__ import annotations

import concurrent.futures
import filecmp
import os
import random
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.helpers.models import (
    Tensor,
    every_dtype,
    every_quantisation,
    model_tensors,
    safetensors_bytes,
    tensor,
    write,
    write_gguf,
    write_hub_cache,
    write_safetensors,
    write_sharded,
)
from tests.helpers.mounting import ENGINES, Mount, Mounter, both_engines, wait_until
from weightfs.formats import encode_name

NUMPY_DTYPES = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8",
    "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8", "C64": "<c8",
}  # fmt: skip
ODD_NAMES = [
    "a/b", "..", ".", "../../etc/passwd", "nul\0nul", "n" * 300, "ü" * 200, "%2F", "%", "new\nline", "", "\x7f", " ",
    "-rf", "\u202eright-to-left", "emoji 🦙",
]  # fmt: skip


def read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def check_views(folder: str, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Listing, sizes and bytes of one set's raw tensors."""
    views = os.path.join(folder, ".tensors", name)
    assert set(os.listdir(views)) == {encode_name(one) for one in tensors}
    for one, expected in tensors.items():
        path = os.path.join(views, encode_name(one))
        assert os.stat(path).st_size == len(expected.data)
        assert read(path) == expected.data


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = str(tmp_path_factory.mktemp("source"))
    write_safetensors(f"{root}/dtypes/model.safetensors", every_dtype())
    write_safetensors(f"{root}/odd/model.safetensors", {n: tensor("F32", (4,), at) for at, n in enumerate(ODD_NAMES)})
    write_sharded(f"{root}/sharded", model_tensors(6), 3)
    write_gguf(f"{root}/gguf/quantised.gguf", every_quantisation())
    write_hub_cache(f"{root}/hub", model_tensors(1))
    write_safetensors(
        f"{root}/big/big.safetensors", {"small": tensor("U8", (7,), 1), "big": tensor("U8", (9_999_991,), 2)}
    )
    write_safetensors(f"{root}/two/one.safetensors", {"a": tensor("F32", (3,), 3)})
    write_gguf(f"{root}/two/other.gguf", {"b": Tensor("F32", (1, 16), bytes(16))})
    write(f"{root}/two/notes.txt", b"no weights")
    return root


@pytest.fixture(scope="module", params=ENGINES)
def mount(request: pytest.FixtureRequest, source: str, module_mounter: Mounter) -> Mount:
    return module_mounter(source, request.param)


def test_every_safetensors_dtype(mount: Mount) -> None:
    check_views(mount.path("dtypes"), "model", every_dtype())


def test_every_gguf_type(mount: Mount) -> None:
    tensors = every_quantisation()
    check_views(mount.path("gguf"), "quantised", tensors)
    reader = gguf.GGUFReader(os.path.join(mount.source, "gguf/quantised.gguf"))
    assert {one.name for one in reader.tensors} == set(tensors)
    for one in reader.tensors:
        assert read(mount.path("gguf/.tensors/quantised", encode_name(one.name))) == one.data.tobytes()


def test_odd_names(mount: Mount) -> None:
    check_views(mount.path("odd"), "model", {n: tensor("F32", (4,), at) for at, n in enumerate(ODD_NAMES)})
    names = os.listdir(mount.path("odd/.npy/model"))
    assert len(names) == len(ODD_NAMES)
    assert all(len(os.fsencode(name)) <= 255 for name in names)
    for at, name in enumerate(ODD_NAMES):
        loaded = np.load(mount.path("odd/.npy/model", encode_name(name, ".npy")))
        assert loaded.tobytes() == tensor("F32", (4,), at).data


def test_shards_are_one_set(mount: Mount) -> None:
    assert os.listdir(mount.path("sharded/.tensors")) == ["model"]
    check_views(mount.path("sharded"), "model", model_tensors(6))
    files = {os.getxattr(mount.path("sharded/.tensors/model", name), "user.weightfs.file") for name in model_tensors(6)}
    assert files == {f"model-{number:05}-of-00003.safetensors".encode() for number in (1, 2, 3)}


def test_hub_cache_through_symlinks(mount: Mount) -> None:
    snapshot = mount.path("hub/models--org--tiny/snapshots/a1b2c3")
    assert sorted(os.listdir(snapshot)) == ["config.json", "model.safetensors"]
    assert os.path.islink(os.path.join(snapshot, "model.safetensors"))
    check_views(snapshot, "model", model_tensors(1))
    bare = os.path.join(mount.source, "hub/models--org--tiny/snapshots/a1b2c3/model.safetensors")
    assert filecmp.cmp(os.path.join(snapshot, "model.safetensors"), bare, shallow=False)
    # The set's file has the name that a reader knows it by, not that of the blob.
    assert os.getxattr(f"{snapshot}/.tensors/model/lm_head.weight", "user.weightfs.file") == b"model.safetensors"


def test_folder_of_one_gguf(mount: Mount) -> None:
    assert os.listdir(mount.path("gguf")) == ["quantised.gguf"]
    assert os.listdir(mount.path("gguf/.tensors")) == ["quantised"]


def test_several_sets_in_a_folder(mount: Mount) -> None:
    assert sorted(os.listdir(mount.path("two/.tensors"))) == ["one", "other"]
    for absent in ("three", "notes", "one.safetensors", ".", "one/nothing"):
        if absent != ".":
            assert not os.path.exists(mount.path("two/.tensors", absent))


def test_numpy_maps_them(mount: Mount) -> None:
    tensors = every_dtype()
    listed = {name.removesuffix(".npy") for name in os.listdir(mount.path("dtypes/.npy/model"))}
    assert listed == {name for name, one in tensors.items() if one.dtype in NUMPY_DTYPES}
    for name in listed:
        loaded = np.load(mount.path("dtypes/.npy/model", name + ".npy"), mmap_mode=None if name == "empty" else "r")
        assert loaded.dtype == np.dtype(NUMPY_DTYPES[tensors[name].dtype])
        assert loaded.shape == tensors[name].shape
        assert loaded.tobytes() == tensors[name].data


def test_attributes(mount: Mount) -> None:
    folder = mount.path("sharded/.tensors/model")
    views = {
        name: {
            key: os.getxattr(os.path.join(folder, name), key).decode()
            for key in os.listxattr(os.path.join(folder, name))
        }
        for name in os.listdir(folder)
    }
    for name, seen in views.items():
        assert set(seen) == {f"user.weightfs.{key}" for key in ("dtype", "shape", "layer", "offset", "nbytes", "file")}
        assert seen["user.weightfs.dtype"] == "F32"
        assert seen["user.weightfs.shape"] == "64,32"
        assert seen["user.weightfs.nbytes"] == "8192"
        offset = int(seen["user.weightfs.offset"])
        file = read(mount.path("sharded", seen["user.weightfs.file"]))
        assert file[offset : offset + 8192] == model_tensors(6)[name].data
    assert views["model.layers.3.mlp.up_proj.weight"]["user.weightfs.layer"] == "3"
    assert views["lm_head.weight"]["user.weightfs.layer"] == ""


def test_attributes_like_the_files(mount: Mount) -> None:
    file = os.stat(mount.path("big/big.safetensors"))
    view = os.stat(mount.path("big/.tensors/big/big"))
    assert view.st_mtime_ns == file.st_mtime_ns
    assert (view.st_uid, view.st_gid, view.st_nlink) == (file.st_uid, file.st_gid, 1)
    assert view.st_mode & 0o7777 == file.st_mode & 0o444


@pytest.mark.parametrize("form", [".tensors/big/big", ".npy/big/big.npy"])
def test_random_reads(mount: Mount, form: str) -> None:
    """Any range, from eight threads on one descriptor, equals the reference; so does the way past the end."""
    data = tensor("U8", (9_999_991,), 2).data
    path = mount.path("big", form)
    prefix = os.stat(path).st_size - len(data)
    reference = read(path)[:prefix] + data
    fd = os.open(path, os.O_RDONLY)

    def read_some(seed: int) -> int:
        chosen = random.Random(seed)
        for _ in range(60):
            offset = chosen.choice([0, prefix, chosen.randrange(len(reference) + 100), len(reference) - 1])
            length = chosen.choice([1, 7, 4096, 65536, 1 << 20, chosen.randrange(3 << 20)])
            assert os.pread(fd, length, offset) == reference[offset : offset + length]
        return seed

    try:
        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            assert list(threads.map(read_some, range(8))) == list(range(8))
    finally:
        os.close(fd)


def test_not_a_folder_not_a_file(mount: Mount) -> None:
    with pytest.raises(NotADirectoryError):
        os.listdir(mount.path("big/.tensors/big/big"))
    with pytest.raises(IsADirectoryError):
        read(mount.path("big/.tensors/big"))
    with pytest.raises(FileNotFoundError):
        read(mount.path("big/.tensors/big/absent"))
    with pytest.raises(FileNotFoundError):
        read(mount.path("big/.tensors/big/.tensors"))


@both_engines
def test_link_to_weights_outside_has_no_views(tmp_path: Path, mounter: Mounter, engine: str) -> None:
    write_safetensors(f"{tmp_path}/outside/model.safetensors", every_dtype())
    os.makedirs(f"{tmp_path}/source")
    os.symlink(f"{tmp_path}/outside/model.safetensors", f"{tmp_path}/source/model.safetensors")
    mount = mounter(f"{tmp_path}/source", engine)
    assert os.listdir(mount.path(".tensors")) == []
    assert not os.path.exists(mount.path(".tensors/model/scalar"))


@both_engines
def test_a_model_of_many_tensors(tmp_path: Path, mounter: Mounter, engine: str) -> None:
    """20,000 tensors are listed completely, and `find` on the mount doesn't meet one of them."""
    names = {f"model.layers.{n // 100}.part.{n}": Tensor("U8", (1,), bytes([n & 255])) for n in range(20_000)}
    write_safetensors(f"{tmp_path}/model.safetensors", names)
    mount = mounter(str(tmp_path), engine)
    assert set(os.listdir(mount.path(".tensors/model"))) == set(names)
    assert len(os.listdir(mount.path(".npy/model"))) == 20_000
    assert [files for _, _, files in os.walk(mount.mountpoint)] == [["model.safetensors"]]
    assert read(mount.path(".tensors/model/model.layers.77.part.7777")) == bytes([7777 & 255])


@both_engines
def test_shards_arrive_one_by_one(tmp_path: Path, mounter: Mounter, engine: str) -> None:
    """A download in progress shows what is there, then all of it."""
    tensors = model_tensors(4)
    paths = write_sharded(f"{tmp_path}/next", tensors, 3)
    os.makedirs(f"{tmp_path}/model")
    mount = mounter(str(tmp_path), engine)
    for path in paths:
        os.rename(path, f"{tmp_path}/model/{os.path.basename(path)}")
        for name in os.listdir(mount.path("model/.tensors")):
            for view in os.listdir(mount.path("model/.tensors", name)):
                assert read(mount.path("model/.tensors", name, view)) == tensors[view].data
    listing = mount.path("model/.tensors/model")
    wait_until(lambda: len(os.listdir(listing)) == len(tensors), "all tensors listed")
    check_views(mount.path("model"), "model", tensors)


@both_engines
def test_download_in_place(tmp_path: Path, mounter: Mounter, engine: str) -> None:
    """A file that grows under its final name: no views at first, then all; the folder's own times don't change."""
    data = safetensors_bytes(model_tensors(2))
    write(f"{tmp_path}/model.safetensors", data[:1000])
    mount = mounter(str(tmp_path), engine)
    assert os.listdir(mount.path(".tensors")) == []
    assert not os.path.exists(mount.path(".tensors/model"))
    with open(f"{tmp_path}/model.safetensors", "ab") as file:
        file.write(data[1000:])
    wait_until(lambda: os.path.exists(mount.path(".tensors/model/lm_head.weight")), "found by name")
    wait_until(lambda: os.listdir(mount.path(".tensors")) == ["model"], "set listed")
    check_views(mount.mountpoint, "model", model_tensors(2))
    # Other tensors under the same name.
    other = {"only": tensor("F32", (5,), 1)}
    write(f"{tmp_path}/model.safetensors", safetensors_bytes(other))
    wait_until(lambda: os.listdir(mount.path(".tensors/model")) == ["only"], "new tensors listed")
    check_views(mount.mountpoint, "model", other)
