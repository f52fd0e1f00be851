"""weightfs.torch on a real GPU: the same bytes as safetensors, in the memory that was meant, and given back."""

from __future__ import annotations

import gc
import importlib.util
import io
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.models import Tensor, every_dtype, every_quantisation, model_tensors, write_gguf, write_safetensors

if importlib.util.find_spec("torch") is None or importlib.util.find_spec("safetensors") is None:
    pytest.skip("this machine lacks torch or safetensors", allow_module_level=True)

import safetensors
import safetensors.torch
import torch

from tests.unit.torch.conftest import same
from weightfs.torch import accelerate, load_file, load_files, load_gguf, load_model, memory, safe_open, vllm

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries, on what they have yet to change
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    torch.cuda.init()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    yield
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before


def known() -> dict[str, Tensor]:
    return {name: one for name, one in every_dtype().items() if not one.dtype.startswith("F6_")}


def large(folder: Path, shards: int = 3) -> list[str]:
    """600 MB of random weights, more than one allocation holds; names as transformers has them."""
    paths = []
    for shard in range(shards):
        tensors = {
            f"model.layers.{(layer * 7 + shard) % 20}.mlp.{part}.{shard}.weight": torch.randn(1031, 4096).to(
                torch.bfloat16
            )
            for layer in range(8)
            for part in ("up_proj", "down_proj", "gate_proj")
        }
        tensors[f"odd.{shard}"] = torch.randint(0, 255, (1_000_003,), dtype=torch.uint8)
        paths.append(str(folder / f"{shard}.safetensors"))
        safetensors.torch.save_file(tensors, paths[-1])
    return paths


def test_every_dtype(tmp_path: Path) -> None:
    path = write_safetensors(str(tmp_path / "every.safetensors"), known())
    wanted = safetensors.torch.load_file(path)
    for device in ("cuda", "cuda:0", 0, torch.device("cuda")):
        found = load_file(path, device)
        assert list(found) == list(wanted)
        for name, one in found.items():
            assert one.device == torch.device("cuda", 0)
            assert same(one.cpu(), wanted[name]), name
            assert one.untyped_storage().nbytes() == one.nbytes
            assert one.data_ptr() % 16 == 0


def test_shards_of_600_mb(tmp_path: Path) -> None:
    paths = large(tmp_path)
    wanted = {name: one for path in paths for name, one in safetensors.torch.load_file(path).items()}
    for _ in range(3):
        started = time.perf_counter()
        found = load_files(paths, "cuda")
        seconds = time.perf_counter() - started
        print(f"{sum(one.nbytes for one in found.values()) / seconds / 1e9:.1f} GB/s")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(one, wanted[name].to("cuda")) for name, one in found.items())


def test_one_that_stays_keeps_no_more_than_its_allocation(tmp_path: Path) -> None:
    before = torch.cuda.memory_allocated()
    found = load_files(large(tmp_path), "cuda")
    assert torch.cuda.memory_allocated() - before > memory.ARENA_BYTES
    kept = next(iter(found.values()))
    found.clear()
    gc.collect()
    assert 0 < torch.cuda.memory_allocated() - before <= memory.ARENA_BYTES + 2 * MIB
    target = io.BytesIO()
    torch.save(kept, target)
    assert len(target.getvalue()) < kept.nbytes + 4096
    kept.add_(1)


def test_memory_that_a_kernel_still_writes_is_not_filled_yet(tmp_path: Path) -> None:
    """Freed memory is given out again at once, while what was asked of it before is still going on."""
    path = str(tmp_path / "m.safetensors")
    safetensors.torch.save_file({"w": torch.randint(0, 255, (256 * MIB,), dtype=torch.uint8)}, path)
    wanted = safetensors.torch.load_file(path)["w"].to("cuda")
    for _ in range(5):
        busy = torch.zeros(256 * MIB, dtype=torch.uint8, device="cuda")
        for _ in range(40):
            busy.add_(3)
        del busy
        assert torch.equal(load_file(path, "cuda")["w"], wanted)


def test_slices(tmp_path: Path) -> None:
    path = write_safetensors(str(tmp_path / "m.safetensors"), model_tensors(2))
    indices: tuple[Any, ...] = (
        ...,
        slice(3, 9),
        (slice(2, 40), slice(None, None, 3)),
        5,
        -1,
        (slice(0, 64), 4),
        [1, 2],
    )
    with safetensors.safe_open(path, "pt") as theirs, safe_open(path, "pt", device="cuda") as mine:
        for name in theirs.keys():  # noqa: SIM118
            for index in indices:
                found = mine.get_slice(name)[index]
                assert found.device.type == "cuda"
                assert same(found.cpu(), theirs.get_slice(name)[index])
        assert all(one.device.type == "cuda" for one in mine.get_tensors().values())


def test_gguf(tmp_path: Path) -> None:
    path = write_gguf(str(tmp_path / "m.gguf"), every_quantisation())
    wanted = load_gguf(path)
    for name, one in load_gguf(path, "cuda").items():
        assert same(one.data.cpu(), wanted[name].data)
        assert one.kind == wanted[name].kind


@pytest.mark.parametrize("start", ["meta", "cpu", "cuda"])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_modules(tmp_path: Path, start: str, dtype: Any) -> None:
    def make() -> Any:
        model = torch.nn.Sequential(torch.nn.Embedding(1000, 256), *(torch.nn.Linear(256, 256) for _ in range(12)))
        model.append(torch.nn.Linear(256, 1000, bias=False))
        model[-1].weight = model[0].weight
        return model.to(torch.bfloat16)

    source = make()
    path = str(tmp_path / "m.safetensors")
    safetensors.torch.save_model(source, path)
    with torch.device(start):
        model = make()
    assert load_model(model, path, device="cuda", dtype=dtype) == (set(), [])
    assert model[-1].weight is model[0].weight
    for name, one in model.state_dict().items():
        assert one.device.type == "cuda"
        assert same(one.cpu(), source.state_dict()[name].to(dtype or torch.bfloat16))


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_parts_of_a_model(tmp_path: Path, rank: int) -> None:
    source = torch.nn.ModuleDict({"up": torch.nn.Linear(64, 256), "down": torch.nn.Linear(256, 64)})
    path = str(tmp_path / "m.safetensors")
    safetensors.torch.save_model(source, path)
    part = torch.nn.ModuleDict({"up": torch.nn.Linear(64, 64), "down": torch.nn.Linear(64, 64)}).to("cuda")
    load_model(part, path, shard=(rank, 4, {"up.*": 0, "down.weight": 1}))
    rows = slice(rank * 64, rank * 64 + 64)
    assert torch.equal(part["up"].weight.cpu(), source["up"].weight[rows])
    assert torch.equal(part["up"].bias.cpu(), source["up"].bias[rows])
    assert torch.equal(part["down"].weight.cpu(), source["down"].weight[:, rows])


def test_an_iterator_as_vllm_takes_it(tmp_path: Path) -> None:
    paths = large(tmp_path)
    wanted = {name: one for path in paths for name, one in safetensors.torch.load_file(path).items()}
    seen = set()
    for name, one in vllm.weights(paths, torch.device("cuda", 0)):
        assert torch.equal(one, wanted[name].to("cuda"))
        seen.add(name)
    assert seen == wanted.keys()


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="this machine lacks transformers")
@pytest.mark.parametrize("way", ["device_map", "block"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_from_pretrained(tmp_path: Path, way: str, dtype: Any) -> None:
    if way == "device_map" and importlib.util.find_spec("accelerate") is None:
        pytest.skip("this machine lacks the package accelerate, which device_map needs")
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4, vocab_size=4096
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="5MB")
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(tmp_path, dtype=dtype).to("cuda").eval()
    if way == "device_map":
        with accelerate():
            mine = load(tmp_path, dtype=dtype, device_map="cuda").eval()
    else:
        with accelerate("cuda"):
            mine = load(tmp_path, dtype=dtype)
        assert all(one.device.type == "cuda" for one in mine.parameters())
        mine = mine.to("cuda").eval()
    assert safetensors.safe_open.__module__.startswith(("safetensors", "builtins"))
    assert all(torch.equal(one, theirs.state_dict()[name]) for name, one in mine.state_dict().items())
    words = torch.arange(64, device="cuda")[None]
    with torch.no_grad():
        assert torch.equal(mine(words).logits, theirs(words).logits)


def test_no_descriptors_stay(tmp_path: Path) -> None:
    path = write_safetensors(str(tmp_path / "m.safetensors"), model_tensors(2))
    load_file(path, "cuda")
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        load_file(path, "cuda")
    assert len(set(os.listdir("/proc/self/fd"))) <= len(before)
