"""load_file gives what safetensors.torch.load_file gives; folders, lists of shards and GGUF files beside it."""

from __future__ import annotations

import ctypes
import io
import json
import os
import struct
from pathlib import Path
from typing import Any

import gguf
import pytest
import safetensors
import safetensors.torch
import torch

from tests.helpers.models import (
    Tensor,
    every_dtype,
    every_quantisation,
    model_tensors,
    tensor,
    write,
    write_gguf,
    write_safetensors,
    write_sharded,
)
from tests.unit.support import open_descriptors
from tests.unit.torch.conftest import same
from weightfs.errors import FormatError, ShortReadError, UnfitError, WeightfsError
from weightfs.torch import load_file, load_files, load_gguf, loader, memory
from weightfs.torch.errors import BadHeaderError, NotInTorchError
from weightfs.torch.files import Stored, WeightFile, stored

both_backends = pytest.mark.parametrize("backend", ["mmap", "pread"])


@both_backends
def test_every_dtype_is_what_safetensors_gives(every: str, backend: Any) -> None:
    wanted = safetensors.torch.load_file(every)
    before = open_descriptors()
    found = load_file(every, backend=backend)
    assert open_descriptors() == before
    assert list(found) == list(wanted)
    assert len(found) == len(every_dtype()) - 2
    for name, one in found.items():
        assert same(one, wanted[name]), name
        assert one.device == wanted[name].device
        assert one.is_contiguous()
        assert not one.requires_grad
        assert one.untyped_storage().nbytes() == wanted[name].untyped_storage().nbytes()


@both_backends
def test_tensors_can_be_written_to_and_the_file_stays(every: str, backend: Any) -> None:
    with open(every, "rb") as file:
        before = file.read()
    one, other = (load_file(every, backend=backend)["t.F32"] for _ in range(2))
    kept = other.clone()
    one.fill_(7)
    assert same(other, kept)
    with open(every, "rb") as file:
        assert file.read() == before


@both_backends
def test_tensors_outlive_the_file(every: str, backend: Any) -> None:
    wanted = {name: one.clone() for name, one in safetensors.torch.load_file(every).items()}
    found = load_file(every, backend=backend)
    os.unlink(every)
    assert all(same(one, wanted[name]) for name, one in found.items())


@both_backends
def test_a_saved_tensor_is_as_large_as_it_is(every: str, backend: Any) -> None:
    """torch.save writes the storage of a tensor; the memory behind it may be that of many."""
    target = io.BytesIO()
    torch.save(load_file(every, backend=backend)["t.F64"], target)
    assert len(target.getvalue()) < 4096
    again = load_file(every, backend=backend)
    again.pop("t.F4")  # safetensors.torch 0.8 knows no size of it
    assert safetensors.torch.save(again)


@both_backends
def test_numbers_that_lie_anywhere(tmp_path: Path, backend: Any) -> None:
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    text = json.dumps(header).encode()
    path = write(
        str(tmp_path / "odd.safetensors"), struct.pack("<Q", len(text)) + text + b"abc" + struct.pack("<2f", 1, 2)
    )
    found = load_file(path, backend=backend)["b"]
    assert found.tolist() == [1, 2]
    assert found.data_ptr() % 4 == 0


def test_a_name_without_a_suffix(every: str, tmp_path: Path) -> None:
    blob = str(tmp_path / "5f3c")
    os.link(every, blob)
    assert len(load_file(Path(blob))) == len(load_file(every))


def test_what_torch_can_not_hold(tmp_path: Path) -> None:
    path = write_safetensors(str(tmp_path / "six.safetensors"), every_dtype())
    with pytest.raises(safetensors.SafetensorError, match="F6_E2M3"):
        safetensors.torch.load_file(path)
    with pytest.raises(NotInTorchError, match="F6_E2M3") as caught:
        load_file(path)
    assert isinstance(caught.value, safetensors.SafetensorError)
    odd = write_safetensors(str(tmp_path / "odd.safetensors"), {"t": Tensor("F4", (2, 2, 1), b"ab")})
    with pytest.raises(NotInTorchError, match="two to a byte"):
        load_file(odd)


def test_no_such_file(tmp_path: Path) -> None:
    for load in (load_file, safetensors.torch.load_file):
        with pytest.raises(FileNotFoundError):
            load(str(tmp_path / "absent.safetensors"))
        with pytest.raises(OSError, match="No such device"):
            load(str(tmp_path))


def test_a_header_that_lies_is_both_errors(tmp_path: Path) -> None:
    path = write(str(tmp_path / "bad.safetensors"), struct.pack("<Q", 2) + b"{}" + b"more")
    before = open_descriptors()
    with pytest.raises(BadHeaderError, match="after the last tensor") as caught:
        load_file(path)
    assert isinstance(caught.value, FormatError)
    assert isinstance(caught.value, safetensors.SafetensorError)
    assert caught.value.path == path
    assert open_descriptors() == before


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(OSError, match="No such device"):
        load_file(tmp_path / "pipe.safetensors")


def test_a_file_that_ends_while_it_is_read(every: str) -> None:
    with WeightFile(every) as file:
        os.truncate(every, file.size_bytes - 100)
        with pytest.raises(ShortReadError, match="early"):
            loader.load_stored([stored(file, name) for name in file.tensors], torch.device("cpu"))


@both_backends
def test_shards_as_a_folder_and_as_a_list(tmp_path: Path, backend: Any) -> None:
    paths = write_sharded(str(tmp_path), model_tensors(5), 3)
    wanted = {name: one for path in paths for name, one in safetensors.torch.load_file(path).items()}
    for meant in (str(tmp_path), tmp_path, paths, iter(paths)):
        found = load_files(meant, backend=backend)
        assert found.keys() == wanted.keys()
        assert all(same(one, wanted[name]) for name, one in found.items())


def test_a_folder_that_is_not_whole(tmp_path: Path) -> None:
    paths = write_sharded(str(tmp_path), model_tensors(5), 3)
    os.unlink(paths[1])
    with pytest.raises(FormatError, match="00002-of-00003"):
        load_files(tmp_path)
    os.unlink(tmp_path / "model.safetensors.index.json")
    with pytest.raises(FormatError, match="missing"):
        load_files(tmp_path)
    write_safetensors(str(tmp_path / "other.safetensors"), model_tensors(1))
    os.unlink(paths[0])
    os.unlink(paths[2])
    assert len(load_files(tmp_path)) == 5
    write_safetensors(str(tmp_path / "third.safetensors"), model_tensors(1))
    with pytest.raises(WeightfsError, match="several sets"):
        load_files(tmp_path)


def test_an_index_leads_nowhere_else(tmp_path: Path) -> None:
    outside = write_safetensors(str(tmp_path / "outside.safetensors"), model_tensors(1))
    write_safetensors(str(tmp_path / "in" / "model.safetensors"), model_tensors(1))
    index = {"weight_map": {"x": f"../{os.path.basename(outside)}"}}
    write(str(tmp_path / "in" / "model.safetensors.index.json"), json.dumps(index).encode())
    with pytest.raises(FormatError, match="is not there"):
        load_files(tmp_path / "in")


def test_two_files_with_one_name(tmp_path: Path) -> None:
    paths = [write_safetensors(str(tmp_path / f"{n}.safetensors"), model_tensors(1, seed=n)) for n in range(2)]
    with pytest.raises(FormatError, match="as well"):
        load_files(paths)


def test_gguf_blocks_are_what_its_own_reader_gives(tmp_path: Path) -> None:
    path = write_gguf(str(tmp_path / "model.gguf"), every_quantisation())
    reader = gguf.GGUFReader(path)
    wanted = {one.name: one for one in reader.tensors}
    found = load_gguf(path)
    assert found.keys() == wanted.keys()
    for name, one in found.items():
        theirs = wanted[name]
        assert one.kind == theirs.tensor_type.name
        assert one.shape == tuple(reversed(theirs.shape.tolist()))
        assert one.data.reshape(-1).view(torch.uint8).numpy().tobytes() == theirs.data.tobytes()
        if one.data.dtype is torch.uint8:
            assert tuple(one.data.shape) == theirs.data.shape
    assert found["blk.0.F32.weight"].data.dtype is torch.float32
    assert load_file(path).keys() == found.keys()
    reader.data._mmap.close()


def test_what_is_no_gguf_has_no_blocks(every: str) -> None:
    with pytest.raises(WeightfsError, match="GGUF"):
        load_gguf(every)


class Pool:
    """Stands in for the pool of pinned memory: copies to addresses, and remembers in which order."""

    def __init__(self) -> None:
        self.copied: list[Any] = []

    def copy(self, pieces: Any) -> None:
        for piece in pieces:
            ctypes.memmove(piece.address, os.pread(piece.fd, piece.nbytes, piece.offset), piece.nbytes)
            self.copied.append(piece)


def test_to_a_gpu_in_the_order_of_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way through pinned memory, with main memory as the GPU's."""
    tensors = model_tensors(12)
    backwards = dict(reversed(list(tensors.items())))
    paths = write_sharded(str(tmp_path), backwards, 2)
    pool = Pool()
    waited: list[Any] = []
    monkeypatch.setattr("prefetch.staging.shared", lambda device: pool if device == 0 else None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: _Stream(device, waited))
    with WeightFile(paths[0]) as one, WeightFile(paths[1]) as two:
        wanted = [stored(file, name) for file in (one, two) for name in file.tensors]
        order = loader.in_order(wanted)
        ordered = [wanted[number] for number in order]
        layers = [part.extent.layer for part in ordered]
        assert layers == [None, *(layer for layer in range(12) for _ in range(2)), None, None]
        assert [part.extent.name for part in ordered[-2:]] == ["model.norm.weight", "lm_head.weight"]
        made = memory.placed(ordered, torch.device("cpu"))
        device = torch.device("cuda", 0)
        assert memory._staged(ordered, made, device)
        assert waited == [device, "synchronised"]
        assert [piece.offset for piece in pool.copied] == [part.offset for part in ordered]
    theirs = safetensors.torch.load_file(paths[0]) | safetensors.torch.load_file(paths[1])
    assert all(same(mine, theirs[part.extent.name]) for mine, part in zip(made, ordered, strict=True))


class _Stream:
    def __init__(self, device: Any, waited: list[Any]) -> None:
        waited.append(device)
        self._waited = waited

    def synchronize(self) -> None:
        self._waited.append("synchronised")


def test_without_pinned_memory_torch_copies(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(device: int) -> None:
        raise UnfitError("no package to use it by", mend="pip install 'weightfs[torch]'")

    monkeypatch.setattr("prefetch.staging.shared", refuse)
    assert not memory._staged([], [], torch.device("cuda", 0))
    assert "pip install" in caplog.text


def test_tensors_share_allocations_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "ARENA_BYTES", 4096)
    tensors = {f"t{n}": tensor("U8", (size,), n) for n, size in enumerate((100, 3000, 1, 513, 9000, 0, 4096, 1))}
    with WeightFile(write_safetensors(str(tmp_path / "some.safetensors"), tensors)) as file:
        wanted: list[Stored] = [stored(file, name) for name in tensors]
        groups = [[one.nbytes for one in wanted[run]] for run in memory.arenas([one.nbytes for one in wanted])]
        assert groups == [[100, 3000, 1], [513], [9000], [0, 4096], [1]]
        made = memory.placed(wanted, torch.device("cpu"))
        memory.fill(wanted, made, torch.device("cpu"))
    starts = [one.data_ptr() for one in made]
    assert starts[1] - starts[0] == 512
    assert [one.numpy().tobytes() for one in made] == [one.data for one in tensors.values()]
    assert [one.untyped_storage().nbytes() for one in made] == [one.nbytes for one in wanted]


def test_devices_are_named_as_with_safetensors() -> None:
    assert loader.torch_device(1) == torch.device("cuda", 1)
    assert loader.torch_device("cpu") == loader.torch_device(torch.device("cpu"))
    with pytest.raises(RuntimeError):
        loader.torch_device("weird")


def test_any_other_device(every: str) -> None:
    found = load_file(every, "meta")
    assert {name: one.shape for name, one in found.items()} == {
        name: one.shape for name, one in load_file(every).items()
    }
