"""Weight files read directly: layouts and verdicts."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.helpers.models import (
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
from tests.unit.support import open_descriptors, within
from weightfs import model, open_model
from weightfs.errors import FormatError, ShortReadError, WeightfsError
from weightfs.formats.shards import MAX_INDEX_BYTES

TENSORS = {"a": tensor("F32", (4, 2), 1), "b": tensor("BF16", (3,), 2)}


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path)


def verdicts(path: str) -> dict[str, list[str]]:
    return {verdict.path: [fault.reason for fault in verdict.faults] for verdict in model.verify(path)}


# open_model


def test_a_file(root: str) -> None:
    path = write_safetensors(f"{root}/m.safetensors", TENSORS)
    for given in (path, Path(path)):
        layout = open_model(given)
        assert [t.name for t in layout.tensors] == ["a", "b"]
        assert layout.files == ("m.safetensors",)
    with open(path, "rb") as file:
        for extent in open_model(path).tensors:
            assert os.pread(file.fileno(), extent.nbytes, extent.offset) == TENSORS[extent.name].data


def test_a_folder_of_one_model(root: str) -> None:
    tensors = model_tensors(2)
    write_sharded(root, tensors, 3)
    write(f"{root}/config.json", b"{}")
    layout = open_model(root)
    assert {t.name for t in layout.tensors} == set(tensors)
    assert len(layout.files) == 3


def test_a_gguf_and_a_hub_cache(root: str) -> None:
    tensors = every_quantisation()
    assert {t.name for t in open_model(write_gguf(f"{root}/q.gguf", tensors)).tensors} == set(tensors)
    assert [t.name for t in open_model(write_hub_cache(f"{root}/hub", TENSORS)).tensors] == ["a", "b"]


def test_several_sets_are_named(root: str) -> None:
    for name in ("one", "two"):
        write_safetensors(f"{root}/{name}.safetensors", TENSORS)
    with pytest.raises(WeightfsError, match="several sets of weights: one, two") as caught:
        open_model(root)
    assert caught.value.mend
    assert set(model.folder_layouts(root)) == {"one", "two"}


def test_nothing_to_read(root: str) -> None:
    with pytest.raises(WeightfsError, match="no weight files"):
        open_model(root)
    assert model.folder_layouts(root) == {}
    write(f"{root}/notes.txt", b"")
    os.mkfifo(f"{root}/fifo.safetensors")
    os.mkdir(f"{root}/folder.safetensors")
    os.symlink("loop.gguf", f"{root}/loop.gguf")
    for name in ("nowhere.safetensors", "notes.txt", "fifo.safetensors", "loop.gguf", "notes.txt/m.gguf"):
        before = open_descriptors()
        with pytest.raises(WeightfsError) as caught:
            within(20, lambda name=name: open_model(f"{root}/{name}"))  # type: ignore[misc]
        assert caught.value.path == f"{root}/{name}"
        assert open_descriptors() == before
    with pytest.raises(WeightfsError, match="no weight files"):
        open_model(f"{root}/folder.safetensors")


def test_a_file_that_lies_is_named(root: str) -> None:
    path = write(f"{root}/m.safetensors", safetensors_bytes(TENSORS)[:-1])
    for call in (open_model, model.folder_layouts):
        with pytest.raises(FormatError) as caught:
            call(path if call is open_model else root)
        assert caught.value.path == path


def test_a_file_that_shrinks_while_it_is_read(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_safetensors(f"{root}/m.safetensors", TENSORS)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: pread(fd, length, offset) if offset < 8 else b"")
    with pytest.raises(ShortReadError) as caught:
        open_model(path)
    assert caught.value.path == path
    assert verdicts(root) == {path: ["short-read"]}


def test_a_file_that_can_not_be_read(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_safetensors(f"{root}/m.safetensors", TENSORS)

    def broken(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(WeightfsError, match="Input/output error") as caught:
        open_model(path)
    assert caught.value.path == path


def test_reads_in_pieces_are_put_together(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(f"{root}/file", bytes(range(200)))
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: pread(fd, min(length, 7), offset))
    with open(path, "rb") as file:
        read = model.read_exactly(file.fileno())
        assert read(3, 100) == bytes(range(3, 103))
        assert read(0, 0) == b""
        with pytest.raises(ShortReadError, match="ends at byte 200, 1 bytes early"):
            read(100, 101)


# verify


def test_everything_below_a_folder_is_verified(root: str) -> None:
    good = [
        *write_sharded(f"{root}/a/llama", model_tensors(1), 2),
        write_gguf(f"{root}/b/q.gguf", every_quantisation()),
    ]
    assert verdicts(root) == {path: [] for path in good}
    assert verdicts(good[0]) == {good[0]: []}
    bad = write(f"{root}/b/bad.safetensors", b"\xff" * 40)
    found = verdicts(root)
    assert {path for path, faults in found.items() if faults} == {bad}
    assert len(found) == 4
    (verdict,) = model.verify(bad)
    assert not verdict.ok
    assert verdict.faults[0].offset >= 0


def test_a_missing_shard_is_a_fault_of_its_folder(root: str) -> None:
    paths = write_sharded(root, model_tensors(1), 3)
    os.unlink(paths[1])
    os.unlink(f"{root}/model.safetensors.index.json")
    assert verdicts(root) == {paths[0]: [], paths[2]: [], root: ["missing-shard"]}


def test_a_missing_shard_is_told_beside_a_faulty_one(root: str) -> None:
    paths = write_sharded(root, model_tensors(1), 3)
    os.unlink(paths[1])
    write(paths[2], b"\xff" * 40)
    assert "missing-shard" in verdicts(root).get(root, [])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"{", "index-json"),
        (json.dumps({"weight_map": {"x": "m.safetensors"}}).encode(), "missing-tensor"),
    ],
)
def test_an_index_file_that_lies(root: str, text: bytes, reason: str) -> None:
    path = write_safetensors(f"{root}/m.safetensors", TENSORS)
    index = write(f"{root}/m.safetensors.index.json", text)
    found = verdicts(root)
    assert found.pop(path) == []
    ((where, reasons),) = found.items()
    assert where in (index, root)
    assert reasons == [reason]


def test_an_index_file_is_not_read_when_it_is_too_long(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be sparse and of a terabyte: memory stays bounded."""
    path = write_safetensors(f"{root}/m.safetensors", TENSORS)
    os.truncate(write(f"{root}/m.safetensors.index.json", b""), MAX_INDEX_BYTES + 1)
    read_exactly = model.read_exactly

    def bounded(fd: int) -> object:
        read = read_exactly(fd)

        def small(offset: int, length: int) -> bytes:
            assert length <= MAX_INDEX_BYTES, "reads it all before it looks"
            return read(offset, length)

        return small

    monkeypatch.setattr(model, "read_exactly", bounded)
    found = verdicts(root)
    assert found.pop(path) == []
    assert list(found.values()) == [["index-length"]]


def test_an_index_file_that_is_a_fifo(root: str) -> None:
    write_safetensors(f"{root}/m.safetensors", TENSORS)
    os.mkfifo(f"{root}/m.safetensors.index.json")
    with pytest.raises(WeightfsError, match="no regular file"):
        within(20, lambda: verdicts(root))


def test_a_tensor_in_two_shards(root: str) -> None:
    for number in (1, 2):
        write_safetensors(f"{root}/m-0000{number}-of-00002.safetensors", TENSORS)
    assert verdicts(root)[root] == ["duplicate-tensor"]
    with pytest.raises(FormatError) as caught:
        open_model(root)
    assert caught.value.path == root


def test_what_is_not_there(root: str) -> None:
    with pytest.raises(WeightfsError):
        list(model.verify(f"{root}/nowhere"))
    assert list(model.verify(root)) == []


def test_a_folder_that_can_not_be_listed(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: str) -> object:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(WeightfsError, match="Permission denied") as caught:
        list(model.verify(root))
    assert caught.value.path == root
    with pytest.raises(WeightfsError, match="can't be listed"):
        model.folder_layouts(root)
