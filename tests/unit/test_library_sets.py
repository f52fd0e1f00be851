"""Sets of weight files, their views, and the faults of those that have none."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.models import (
    Tensor,
    every_quantisation,
    model_tensors,
    safetensors_bytes,
    write,
    write_gguf,
    write_hub_cache,
    write_safetensors,
    write_sharded,
)
from tests.unit.formats.samples import Gguf
from tests.unit.support import Later
from tests.unit.test_library import TENSORS, check
from weightfs import library as module
from weightfs.errors import ShortReadError, StaleError
from weightfs.index.store import IndexStore
from weightfs.library import Library, ParsedFile
from weightfs.source.base import SourceStat
from weightfs.source.local import LocalSource


@pytest.fixture
def root(tmp_path: Path) -> str:
    (tmp_path / "models").mkdir()
    return str(tmp_path / "models")


@pytest.fixture
def source(root: str) -> Iterator[LocalSource]:
    opened = LocalSource(root)
    yield opened
    opened.close()


@pytest.fixture
def library(source: LocalSource, index: IndexStore) -> Library:
    return Library(source, index)


# Sets


@pytest.mark.usefixtures("settled")
def test_a_sharded_model_is_one_set(root: str, library: Library) -> None:
    tensors = model_tensors(3)
    write_sharded(f"{root}/llama", tensors, 3)
    check(library, b"llama", "model", tensors)
    assert library.headers_parsed == 3
    check(library, b"llama", "model", tensors)
    assert library.headers_parsed == 3
    assert library.view_set(b"llama", "other") is None
    assert list(library.sets(library._source.names(b"llama"))) == ["model"]


@pytest.mark.usefixtures("settled")
def test_the_index_file_decides_between_two_shards_with_one_tensor(root: str, library: Library) -> None:
    one, two = TENSORS["a"], Tensor("F32", (4, 2), bytes(32))
    for number, data in ((1, one), (2, two)):
        write_safetensors(f"{root}/m-0000{number}-of-00002.safetensors", {"a": data, f"own{number}": TENSORS["b"]})
    assert library.view_set(b"", "m") is None, "nothing says which counts"
    for number, data in ((1, one), (2, two)):
        weight_map = {"weight_map": {"a": f"m-0000{number}-of-00002.safetensors"}}
        write(f"{root}/m.safetensors.index.json", json.dumps(weight_map).encode())
        check(library, b"", "m", {"a": data, "own1": TENSORS["b"], "own2": TENSORS["b"]})


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize(
    "text", [b"", b"[]", b'{"weight_map": {"a": 1}}', b"\xff\xfe", b'{"weight_map": {"x": "m.safetensors"}}']
)
def test_an_index_file_that_lies_leaves_no_views(root: str, library: Library, text: bytes) -> None:
    write_safetensors(f"{root}/m.safetensors", TENSORS)
    write(f"{root}/m.safetensors.index.json", text)
    assert library.view_set(b"", "m") is None
    os.unlink(f"{root}/m.safetensors.index.json")
    check(library, b"", "m", TENSORS)


@pytest.mark.usefixtures("settled")
def test_an_index_file_is_bounded(root: str, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    write_safetensors(f"{root}/m.safetensors", TENSORS)
    write(f"{root}/m.safetensors.index.json", b"")
    os.truncate(f"{root}/m.safetensors.index.json", 1 << 40)
    assert library.view_set(b"", "m") is None


@pytest.mark.usefixtures("settled")
def test_an_index_file_that_is_a_fifo_stops_nothing(root: str, library: Library) -> None:
    write_safetensors(f"{root}/m.safetensors", TENSORS)
    os.mkfifo(f"{root}/m.safetensors.index.json")
    library.view_set(b"", "m")
    os.unlink(f"{root}/m.safetensors.index.json")
    check(library, b"", "m", TENSORS)


@pytest.mark.usefixtures("settled")
def test_a_hub_cache_is_read_through_its_symlinks(root: str, library: Library) -> None:
    snapshot = os.fsencode(os.path.relpath(write_hub_cache(root, TENSORS), root))
    check(library, snapshot, "model", TENSORS)
    views = library.view_set(snapshot, "model")
    assert views is not None
    parsed, _ = views.raw[b"a"]
    assert parsed.name == "model.safetensors"
    assert b"blobs" in parsed.path


@pytest.mark.usefixtures("settled")
def test_symlinks_that_lead_nowhere_or_out_have_no_views(root: str, library: Library, tmp_path: Path) -> None:
    write_safetensors(str(tmp_path / "outside.safetensors"), TENSORS)
    os.symlink("nowhere", f"{root}/a.safetensors")
    os.symlink(tmp_path / "outside.safetensors", f"{root}/b.safetensors")
    os.symlink("c.safetensors", f"{root}/c.safetensors")
    os.mkdir(f"{root}/d.safetensors")
    os.mkfifo(f"{root}/e.safetensors")
    assert [library.view_set(b"", name) for name in "abcde"] == [None] * 5
    assert library.headers_parsed == 0


@pytest.mark.usefixtures("settled")
def test_gguf_tensors_and_their_npy_forms(root: str, library: Library) -> None:
    tensors = every_quantisation()
    write_gguf(f"{root}/q.gguf", tensors)
    check(library, b"", "q", tensors)
    views = library.view_set(b"", "q")
    assert views is not None
    assert {name.split(b".")[2] for name in views.npy} >= {b"F32", b"F16", b"I8"}
    assert not any(b"Q4_K" in name for name in views.npy)


@pytest.mark.usefixtures("settled")
def test_a_big_endian_file_has_npy_views_only(root: str, library: Library) -> None:
    spell = Gguf(">")
    write(f"{root}/big.gguf", spell.file([], [spell.tensor("t", [4], 0, 0)], 16))
    views = library.view_set(b"", "big")
    assert views is not None
    assert not views.raw
    assert set(views.npy) == {b"t.npy"}


@pytest.mark.usefixtures("settled")
def test_last_change_tells_of_folder_and_files(root: str, library: Library) -> None:
    write_sharded(f"{root}/llama", model_tensors(1), 2)
    before = library.last_change_ns(b"llama", "model")
    now = os.stat(f"{root}/llama").st_mtime_ns + 5_000_000_000
    os.utime(f"{root}/llama/model-00002-of-00002.safetensors", ns=(now, now))
    assert library.last_change_ns(b"llama", "model") == library.last_change_ns(b"llama", None) == now > before
    assert library.last_change_ns(b"llama", "other") < now


def test_a_set_found_a_moment_ago_is_not_asked_for_again(root: str, library: Library, settled: Later) -> None:
    write_safetensors(f"{root}/m.safetensors", TENSORS)
    assert library.recent_view_set(b"", "m") is None
    found = library.view_set(b"", "m")
    assert library.recent_view_set(b"", "m") is found
    settled.passed_s += 1.1
    assert library.recent_view_set(b"", "m") is None


# Faults


@pytest.mark.usefixtures("settled")
def test_a_fault_is_remembered_like_a_layout_and_cleared_with_its_file(
    root: str, source: LocalSource, library: Library, index: IndexStore
) -> None:
    good = safetensors_bytes(TENSORS)
    write(f"{root}/m.safetensors", good[:-1])
    assert library.view_set(b"", "m") is None
    (fault,) = library.current_faults()
    assert fault.path == "m.safetensors"
    assert fault.reason
    assert "m.safetensors" in str(fault)
    index.flush()
    another = Library(source, index)
    assert another.view_set(b"", "m") is None
    assert another.headers_parsed == 0
    (again,) = another.current_faults()
    assert (again.reason, again.message, again.offset, again.path) == (
        fault.reason, fault.message, fault.offset, fault.path,
    )  # fmt: skip
    write(f"{root}/m.safetensors", good)
    assert library.current_faults() == [], "it is not that file any more"
    check(library, b"", "m", TENSORS)
    assert library.current_faults() == []


@pytest.mark.usefixtures("settled")
def test_the_fault_of_a_removed_file_is_not_told(root: str, library: Library) -> None:
    write(f"{root}/m.safetensors", b"\xff" * 100)
    library.view_set(b"", "m")
    assert len(library.current_faults()) == 1
    os.unlink(f"{root}/m.safetensors")
    assert library.current_faults() == []


@pytest.mark.usefixtures("settled")
def test_faults_are_bounded(root: str, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_FAULTS", 3)
    for number in range(5):
        write(f"{root}/{number}.safetensors", b"\xff" * 100)
        library.view_set(b"", str(number))
    assert [fault.path for fault in library.current_faults()] == [f"{number}.safetensors" for number in (2, 3, 4)]


@pytest.mark.usefixtures("settled")
def test_one_faulty_shard_leaves_the_others_their_views(root: str, library: Library) -> None:
    write_safetensors(f"{root}/m-00001-of-00002.safetensors", {"a": TENSORS["a"]})
    write(f"{root}/m-00002-of-00002.safetensors", b"\xff" * 100)
    check(library, b"", "m", {"a": TENSORS["a"]})
    assert [fault.path for fault in library.current_faults()] == ["m-00002-of-00002.safetensors"]


@pytest.mark.parametrize("error", [ShortReadError("short"), StaleError("changed")])
def test_a_file_being_written_is_tried_again(
    root: str, library: Library, monkeypatch: pytest.MonkeyPatch, settled: Later, error: Exception
) -> None:
    write_safetensors(f"{root}/m.safetensors", TENSORS)

    def failing(*_: object) -> ParsedFile:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(library, "parsed", failing)
        assert library.view_set(b"", "m") is None
    check(library, b"", "m", TENSORS)
    settled.passed_s += 2


@pytest.mark.usefixtures("settled")
def test_a_shard_that_vanishes_while_the_set_is_put_together(
    root: str, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sharded(f"{root}/llama", model_tensors(1), 2)
    lstat = library._source.lstat

    def vanished(path: bytes, *, cached_only: bool = False) -> SourceStat:
        if path.endswith(b"00002-of-00002.safetensors"):
            raise FileNotFoundError
        return lstat(path, cached_only=cached_only)

    monkeypatch.setattr(library._source, "lstat", vanished)
    os.unlink(f"{root}/llama/model.safetensors.index.json")
    views = library.view_set(b"llama", "model")
    assert views is not None
    assert 0 < len(views.raw) < len(model_tensors(1))
    assert library.last_change_ns(b"llama", "model")


def test_a_folder_that_is_gone(library: Library) -> None:
    with pytest.raises(FileNotFoundError):
        library.view_set(b"gone", "m")
