"""The load format for vLLM, against a double of vLLM 0.33.0's loader interface; and the real one where it is there."""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from tests.helpers import vllm_double as double
from tests.helpers.models import model_tensors, write_safetensors, write_sharded
from tests.unit.support import open_descriptors
from tests.unit.torch.conftest import same
from weightfs.errors import FormatError, UsageError, WeightfsError
from weightfs.torch import memory, vllm


class Model(nn.Module):  # type: ignore[misc]
    """Takes weights as models of vLLM do: an iterator in, the names of what was filled out."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.weights = nn.ParameterDict()
        for name, one in model_tensors(layers).items():
            self.weights[name.replace(".", "/")] = nn.Parameter(torch.zeros(one.shape), requires_grad=False)
        self.order: list[str] = []

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        filled = set()
        for name, tensor in weights:
            self.order.append(name)
            if (key := name.replace(".", "/")) in self.weights:
                self.weights[key].copy_(tensor)
                filled.add(f"weights.{key}")
        return filled


@pytest.fixture(autouse=True)
def _vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, module in double.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    vllm._loader.cache_clear()
    double.registered.clear()
    double.downloads.clear()
    vllm.register()
    vllm.register()
    assert double.registered == ["weightfs"]
    yield
    vllm._loader.cache_clear()


def load(model: nn.Module, path: str, **of_model: Any) -> nn.Module:
    loader = double.get_model_loader(double.LoadConfig(load_format="weightfs"))
    return loader.load_model(None, double.ModelConfig(path, make=lambda: model, **of_model))


def test_a_sharded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "ARENA_BYTES", 20_000)  # two tensors
    tensors = model_tensors(12)
    paths = write_sharded(str(tmp_path), dict(reversed(tensors.items())), 3)
    wanted = {name: one for path in paths for name, one in safetensors.torch.load_file(path).items()}
    gc.collect()  # or what an earlier test left is closed meanwhile
    before = open_descriptors()
    model = load(Model(12), str(tmp_path))
    assert open_descriptors() == before
    assert all(same(one.data, wanted[name.replace("/", ".")]) for name, one in model.weights.items())
    blocks = [int(name.split(".")[2]) for name in model.order if ".layers." in name]
    assert blocks == sorted(blocks)
    assert model.order[0] == "model.embed_tokens.weight"
    assert not model.training


def test_what_the_index_leaves_out_is_not_the_model(tmp_path: Path) -> None:
    write_sharded(str(tmp_path), model_tensors(3), 2)
    write_safetensors(str(tmp_path / "consolidated.safetensors"), model_tensors(3, seed=50))
    assert len(load(Model(), str(tmp_path)).order) == 9


def test_a_repository_is_downloaded(tmp_path: Path) -> None:
    write_safetensors(str(tmp_path / "model.safetensors"), model_tensors(3))
    double.download_folder[:] = [str(tmp_path)]
    loader = double.get_model_loader(double.LoadConfig(load_format="weightfs", download_dir="/cache"))
    loader.download_model(double.ModelConfig("org/model", revision="v1"))
    assert double.downloads[0] == ("org/model", "/cache", ["*.safetensors"], "v1", None, ["original/**/*"])
    assert load(Model(), "org/model").order
    assert load(Model(), "org/other", model_weights=str(tmp_path)).order


def test_what_a_model_asks_for(tmp_path: Path) -> None:
    write_safetensors(str(tmp_path / "main.safetensors"), model_tensors(3))
    write_safetensors(str(tmp_path / "not.safetensors"), model_tensors(9))
    write_safetensors(str(tmp_path / "more" / "deep" / "model.safetensors"), model_tensors(1))
    model = Model()
    model.allow_patterns_overrides = ["absent*", "main*"]
    model.is_unused_checkpoint_weight = lambda name: "layers.1" in name
    model.secondary_weights = [double.Source(str(tmp_path / "more"), None, subfolder="deep", prefix="second.")]
    with pytest.raises(ValueError, match=r"not initialized from checkpoint: .*layers/1"):
        load(model, str(tmp_path))
    assert len(model.order) == 7 + 5
    assert sum(name.startswith("second.") for name in model.order) == 5
    model.allow_patterns_overrides = ["absent*"]
    with pytest.raises(WeightfsError, match=r"no safetensors named absent\*"):
        load(model, str(tmp_path))


def test_what_is_missing_is_an_error_as_with_vllm(tmp_path: Path) -> None:
    tensors = model_tensors(3)
    del tensors["model.norm.weight"]
    write_safetensors(str(tmp_path / "model.safetensors"), tensors)
    with pytest.raises(ValueError, match="model/norm/weight"):
        load(Model(), str(tmp_path))
    load(Model(), str(tmp_path), quantization="fp8")
    model = Model()
    model.weights.quant_method = type("Method", (), {"process_weights_after_loading": print})()
    load(model, str(tmp_path))
    write_sharded(str(tmp_path / "part"), model_tensors(3), 2)
    (tmp_path / "part" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FormatError, match="is not there"):
        load(Model(), str(tmp_path / "part"))


def test_a_model_that_stops_early_leaves_nothing_open(tmp_path: Path) -> None:
    write_safetensors(str(tmp_path / "model.safetensors"), model_tensors(3))
    before = open_descriptors()
    some = vllm.weights([str(tmp_path / "model.safetensors")], torch.device("cpu"))
    next(some)
    some.close()  # type: ignore[attr-defined]
    assert open_descriptors() == before


def test_options_that_there_are_not() -> None:
    config = double.LoadConfig(load_format="weightfs", model_loader_extra_config={"concurrency": 4})
    with pytest.raises(UsageError, match="concurrency"):
        double.get_model_loader(config)


def test_where_a_model_is() -> None:
    config = double.LoadConfig()
    model = nn.Linear(2, 2)
    assert vllm._device_of(model, config) == torch.device("cpu")
    assert vllm._device_of(nn.Linear(2, 2, device="meta"), config).type in ("cpu", "cuda")
    assert vllm._device_of(model, double.LoadConfig(device="cuda:3")) == torch.device("cuda", 3)


def test_vllm_finds_it_by_its_entry_point() -> None:
    with open(Path(__file__).parents[3] / "pyproject.toml", "rb") as file:
        points = tomllib.load(file)["project"]["entry-points"]["vllm.general_plugins"]
    assert importlib.metadata.EntryPoint("weightfs", points["weightfs"], "vllm.general_plugins").load() is vllm.register


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="this machine lacks vllm")
def test_the_real_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    vllm._loader.cache_clear()
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    vllm.register()
    assert isinstance(get_model_loader(LoadConfig(load_format="weightfs")), BaseModelLoader)
