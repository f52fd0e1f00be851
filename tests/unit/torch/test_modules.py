"""load_model against safetensors' own, into modules of every kind: tied, cast, on no device, divided, overlapping."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from tests.unit.support import open_descriptors
from tests.unit.torch.conftest import same
from weightfs.errors import UsageError
from weightfs.torch import Shard, load_model, memory, modules


class Tiny(nn.Module):  # type: ignore[misc]
    """Tied embedding and head, a buffer, one that is not saved, and numbers of other kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(12))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 32, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.arange(4))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def random(module: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in module.parameters():
            one.copy_(torch.randn(one.shape, generator=generator))
    return module


def saved(module: nn.Module, path: Path) -> str:
    safetensors.torch.save_model(module, str(path))
    return str(path)


def equal(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(same(mine[name], theirs[name]) for name in mine)


def both(model: nn.Module, path: str, **options: Any) -> tuple[nn.Module, nn.Module, Any, Any]:
    """The same load by us and by safetensors: two modules and what came of it."""
    mine, theirs = copy.deepcopy(model), copy.deepcopy(model)
    outcomes: list[Any] = []
    loads: tuple[Callable[..., Any], ...] = (load_model, safetensors.torch.load_model)
    for load, module in zip(loads, (mine, theirs), strict=True):
        try:
            outcomes.append(load(module, path, **options))
        except RuntimeError as error:
            outcomes.append(str(error))
    return mine, theirs, *outcomes


def test_as_safetensors_does(tmp_path: Path) -> None:
    path = saved(random(Tiny(), 1), tmp_path / "m.safetensors")
    before = open_descriptors()
    model = random(Tiny(), 2)
    kept = {name: one.data_ptr() for name, one in model.named_parameters()}
    mine, theirs, found, wanted = both(model, path)
    assert open_descriptors() == before
    assert found == wanted == (set(), [])
    assert equal(mine, theirs)
    assert equal(mine, random(Tiny(), 1))
    assert load_model(model, path) == wanted
    assert {name: one.data_ptr() for name, one in model.named_parameters()} == kept
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("change", ["missing", "unexpected", "both", "both tied names", "neither tied name", "shape"])
def test_what_does_not_fit(tmp_path: Path, change: str, strict: bool) -> None:
    source = random(Tiny(), 1)
    weights = {name: one.clone() for name, one in source.state_dict().items()}
    if change != "both tied names":
        del weights["head.weight"]
    if change == "neither tied name":
        del weights["embed.weight"]
    if change in ("missing", "both"):
        del weights["layers.3.bias"], weights["steps"]
    if change in ("unexpected", "both"):
        weights |= {"layers.12.weight": torch.ones(2), "a": torch.ones(1)}
    if change == "shape":
        weights["norm.weight"] = torch.ones(9)
    path = str(tmp_path / "m.safetensors")
    safetensors.torch.save_file(weights, path)
    model = random(Tiny(), 2)
    mine, theirs, found, wanted = both(model, path, strict=strict)
    assert found == wanted
    if isinstance(wanted, str):
        assert equal(mine, model)  # which safetensors has filled by now
    else:
        assert equal(mine, theirs)


def test_values_are_cast_to_what_the_module_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "ARENA_BYTES", 1024)
    path = saved(random(Tiny(), 1), tmp_path / "m.safetensors")
    model = random(Tiny(), 2).to(torch.bfloat16)
    model.norm.float()
    mine, theirs, found, wanted = both(model, path)
    assert found == wanted
    assert equal(mine, theirs)


def test_the_dtype_that_was_asked_for(tmp_path: Path) -> None:
    path = saved(random(Tiny(), 1), tmp_path / "m.safetensors")
    model = random(Tiny(), 2)
    parameters = dict(model.named_parameters())
    load_model(model, path, dtype=torch.float16)
    assert equal(model, random(Tiny(), 1).to(torch.float16))
    assert dict(model.named_parameters()) == parameters
    assert model.head.weight is model.embed.weight
    assert model.steps.dtype is torch.int64


def test_modules_on_no_device(tmp_path: Path) -> None:
    path = saved(random(Tiny(), 1), tmp_path / "m.safetensors")
    with torch.device("meta"):
        model = Tiny()
    model.embed.weight.note = "kept"
    model.norm.weight.requires_grad_(False)
    assert load_model(model, path, dtype=torch.bfloat16) == (set(), [])
    assert equal(model, random(Tiny(), 1).to(torch.bfloat16))
    assert model.head.weight is model.embed.weight
    assert model.embed.weight.note == "kept"
    assert not model.norm.weight.requires_grad
    assert model.layers[0].weight.requires_grad
    assert isinstance(model.layers[0].weight, nn.Parameter)
    assert model.scratch.is_meta


def test_what_the_file_lacks_stays_on_no_device(tmp_path: Path) -> None:
    source = random(Tiny(), 1)
    weights = {name: one for name, one in source.state_dict().items() if name.startswith("layers")}
    safetensors.torch.save_file(weights, str(tmp_path / "m.safetensors"))
    with torch.device("meta"):
        model = Tiny()
    missing, _ = load_model(model, tmp_path / "m.safetensors", strict=False)
    assert missing == {"embed.weight", "norm.weight", "norm.bias", "steps"}
    assert model.embed.weight.is_meta
    assert same(model.layers[3].weight, source.layers[3].weight)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_part_of_each_tensor(tmp_path: Path, rank: int) -> None:
    source = nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8), "norm": nn.LayerNorm(8)})
    path = saved(random(source, 1), tmp_path / "m.safetensors")
    part = nn.ModuleDict({"up": nn.Linear(8, 6), "down": nn.Linear(6, 8), "norm": nn.LayerNorm(8)})
    dims = {"up.*": 0, "down.weight": -1}
    load_model(part, path, shard=(rank, 2, dims))
    rows = slice(rank * 6, rank * 6 + 6)
    state = source.state_dict()
    wanted = {**state, "up.weight": state["up.weight"][rows], "up.bias": state["up.bias"][rows]}
    wanted["down.weight"] = state["down.weight"][:, rows]
    assert all(same(one, wanted[name]) for name, one in part.state_dict().items())
    half = copy.deepcopy(part)
    load_model(half, path, dtype=torch.float16, shard=Shard(rank, 2, dims))
    assert all(same(one, wanted[name].half()) for name, one in half.state_dict().items())


@pytest.mark.parametrize(("shard", "words"), [
    ((0, 5, {"weight": 0}), "can't be divided by 5"),
    ((0, 2, {"weight": 2}), "dimension 2"),
    ((2, 2, {"weight": 0}), "no rank 2 of 2"),
])  # fmt: skip
def test_parts_that_there_are_not(tmp_path: Path, shard: Any, words: str) -> None:
    path = saved(nn.Linear(8, 12), tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match=words):
        load_model(nn.Linear(8, 6), path, shard=shard)


class Halves(nn.Module):  # type: ignore[misc]
    """A tensor, and one that is a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Parameter(torch.zeros(4, 3))
        self.part = nn.Parameter(self.whole.data[2:])


class Renaming(nn.Linear):  # type: ignore[misc]
    """Takes an old name for its weight."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        state_dict[prefix + "weight"] = state_dict[prefix + "weight"] * 2
        super()._load_from_state_dict(state_dict, prefix, *rest)


def test_parts_of_others_and_modules_that_load_their_own_way(tmp_path: Path) -> None:
    values = {"whole": torch.arange(12.0).reshape(4, 3), "part": torch.full((2, 3), 7.0)}
    path = str(tmp_path / "h.safetensors")
    safetensors.torch.save_file(values, path)
    mine, theirs, found, wanted = both(Halves(), path, strict=False)
    assert found == wanted
    assert equal(mine, theirs)
    path = saved(random(nn.Linear(3, 2), 4), tmp_path / "r.safetensors")
    mine, theirs, _, _ = both(Renaming(3, 2), path)
    assert equal(mine, theirs)
    assert not equal(mine, random(nn.Linear(3, 2), 4))
    norm = nn.BatchNorm1d(4)
    norm.running_mean += 1
    mine, theirs, _, _ = both(nn.BatchNorm1d(4), saved(norm, tmp_path / "n.safetensors"))
    assert equal(mine, theirs)


def test_strides_of_its_own_and_no_numbers_at_all(tmp_path: Path) -> None:
    model = nn.Module()
    model.turned = nn.Parameter(torch.randn(3, 5).t())
    model.none = nn.Parameter(torch.empty(0, 4))
    model.one = nn.Parameter(torch.tensor(3.0))
    path = str(tmp_path / "m.safetensors")
    safetensors.torch.save_file({name: one.contiguous() for name, one in model.state_dict().items()}, path)
    other = copy.deepcopy(model)
    other.turned.data.zero_()
    other.one.data.zero_()
    load_model(other, path)
    assert equal(other, model)
    assert other.turned.stride() == (1, 5)


def test_most_of_it_takes_no_second_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(random(Tiny(), 1), tmp_path / "m.safetensors")

    def refuse(*_: Any) -> None:
        raise AssertionError("a copy was made")

    monkeypatch.setattr(modules, "load_stored", refuse)
    model = random(Tiny(), 2)
    load_model(model, path)
    assert equal(model, random(Tiny(), 1))
