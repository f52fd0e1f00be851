"""Where a tensor of a model may have come from."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("torch", reason="this machine lacks torch")

import torch

from tests.helpers.models import Tensor, write_safetensors
from weightfs.errors import UsageError, WeightfsError
from weightfs.torch.fused import LEAST_BYTES, parts_of
from weightfs.torch.origins import Origin, Origins, paths_of


def _write(path: Path, **lengths: int) -> str:
    content = {name.replace("__", "."): Tensor("U8", (length,), os.urandom(length)) for name, length in lengths.items()}
    return write_safetensors(str(path), content)


def _named(origin: Origin | None) -> tuple[str, int] | None:
    return (os.path.basename(origin.path), origin.nbytes) if origin else None


def test_by_name_then_by_the_longest_ending(tmp_path: Path) -> None:
    _write(tmp_path / "model-00001-of-00002.safetensors", text__layers__0__w=64, vision__layers__0__w=64)
    _write(tmp_path / "model-00002-of-00002.safetensors", norm=64, text__layers__1__w=32, lm__head__w=64)
    origins = Origins([str(tmp_path)])
    assert [origin.rank for origin in origins] == [0, 0, 1, 1, 1]
    one = origins.find(["text.layers.0.w"], 64)
    assert one is not None
    assert one.path == str(tmp_path / "model-00001-of-00002.safetensors")
    assert origins.find(["text.layers.0.w"], 32) is None, "of another length"
    assert origins.find(["model.text.layers.0.w"], 64) == one
    assert origins.find(["layers.0.w"], 64) is None, "of two towers"
    assert origins.find(["layers.1.w"], 32) is not None
    assert origins.find(["model.norm"], 64) is not None, "all of the file's name"
    assert origins.find(["other.w"], 64) is None, "one component says too little"
    assert origins.find(["nowhere", "lm.head.w"], 64) is not None, "a tied tensor has several names"


def test_of_two_sets_of_a_folder_the_first_counts(tmp_path: Path) -> None:
    first = _write(tmp_path / "consolidated.safetensors", w=8)
    _write(tmp_path / "model.safetensors", w=8)
    found = Origins([str(tmp_path)]).find(["w"], 8)
    assert found is not None
    assert found.path == first


def test_a_file_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path / "some.safetensors", w=8)
    monkeypatch.chdir(tmp_path)
    found = Origins(["some.safetensors"]).find(["w"], 8)
    assert found is not None
    assert found.path == path
    with pytest.raises(WeightfsError, match="missing"):
        Origins([str(tmp_path / "missing.safetensors")])


class Model:
    def __init__(self, name: object) -> None:
        self.name_or_path = name


def test_transformers_says_where_a_model_is_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "huggingface_hub", raising=False)
    assert paths_of([Model(str(tmp_path))]) == [str(tmp_path)]
    for name in ("", None, "some/model"):
        with pytest.raises(UsageError, match="does not say"):
            paths_of([Model(name)])

    def snapshot_download(name: str, *, local_files_only: bool) -> str:
        assert local_files_only
        if name != "some/model":
            raise ValueError(name)
        return str(tmp_path)

    hub: Any = ModuleType("huggingface_hub")
    hub.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert paths_of([Model("some/model")]) == [str(tmp_path)]
    with pytest.raises(UsageError, match="does not say"):
        paths_of([Model("other/model")])


def _origins(path: Path, *contents: bytes) -> list[Origin]:
    path.write_bytes(b"".join(contents))
    begins = [sum(len(one) for one in contents[:number]) for number in range(len(contents))]
    return [
        Origin(path=str(path), rank=0, offset=begin, nbytes=len(content))
        for begin, content in zip(begins, contents, strict=True)
    ]


def _bytes(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def test_joined_parts_are_found_by_their_first_bytes(tmp_path: Path) -> None:
    q, k, v = os.urandom(4 * LEAST_BYTES), os.urandom(LEAST_BYTES), os.urandom(LEAST_BYTES)
    origins = _origins(tmp_path / "f", v, q, k)
    (found,) = parts_of([_bytes(q + k + v)], origins)
    assert found == [(0, origins[1]), (4 * LEAST_BYTES, origins[2]), (5 * LEAST_BYTES, origins[0])]


def test_the_part_of_one_gpu_is_found_in_what_all_have(tmp_path: Path) -> None:
    q, k, v = os.urandom(4 * LEAST_BYTES), os.urandom(2 * LEAST_BYTES), os.urandom(2 * LEAST_BYTES)
    (whole_q, whole_k, whole_v) = _origins(tmp_path / "f", q, k, v)
    second = _bytes(q[2 * LEAST_BYTES :] + k[LEAST_BYTES:] + v[LEAST_BYTES:])
    (found,) = parts_of([second], [whole_q, whole_k, whole_v])
    expected = [(0, q[2 * LEAST_BYTES :]), (2 * LEAST_BYTES, k[LEAST_BYTES:]), (3 * LEAST_BYTES, v[LEAST_BYTES:])]
    assert [(at, _content(origin)) for at, origin in found] == expected


def test_what_no_file_has_lies_between(tmp_path: Path) -> None:
    known = os.urandom(2 * LEAST_BYTES)
    origins = _origins(tmp_path / "f", known)
    (found,) = parts_of([_bytes(os.urandom(LEAST_BYTES) + known + os.urandom(LEAST_BYTES))], origins)
    assert found == [(LEAST_BYTES, origins[0])]


def test_of_steps_that_begin_alike_the_longest_run_is_taken(tmp_path: Path) -> None:
    zeros, known = bytes(LEAST_BYTES), os.urandom(LEAST_BYTES)
    first, second = _origins(tmp_path / "f", zeros + zeros, zeros + known)
    (found,) = parts_of([_bytes(zeros + known)], [first, second])
    assert found == [(0, second)]


def test_where_lengths_have_no_step_in_common_nothing_is_looked_for(tmp_path: Path) -> None:
    odd = os.urandom(LEAST_BYTES + 1)
    assert parts_of([_bytes(odd)], _origins(tmp_path / "f", odd, os.urandom(LEAST_BYTES))) == [[]]
    assert parts_of([_bytes(odd)], _origins(tmp_path / "f", b"small")) == [[]]


def test_an_odd_tensor_is_looked_at_in_the_steps_of_the_files(tmp_path: Path) -> None:
    known = os.urandom(LEAST_BYTES)
    origins = _origins(tmp_path / "f", known)
    assert parts_of([_bytes(known + b"odd")], origins) == [[(0, origins[0])]]


def _content(origin: Origin) -> bytes:
    with open(origin.path, "rb") as file:
        return os.pread(file.fileno(), origin.nbytes, origin.offset)
