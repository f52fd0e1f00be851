"""Whatever a model's tensors are, they come back as they were: bytes, shapes, and what shares memory with what."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch", reason="this machine lacks torch")
pytest.importorskip("safetensors", reason="this machine lacks safetensors")

import torch
from safetensors.torch import save_file

from tests.helpers.memory_double import MemoryDouble
from weightfs.torch import proof
from weightfs.torch.released import _released

DTYPES = [torch.bfloat16, torch.float32, torch.uint8, torch.int64]

# A tensor: its elements, its dtype, what of it is registered (all, a part, turned, or as a buffer beside it), and
# whether a file has it (as it is, with another byte, under a longer name, or not at all).
TENSORS = st.lists(
    st.tuples(
        st.integers(0, 3000),
        st.sampled_from(DTYPES),
        st.sampled_from(["all", "part", "turned", "twice"]),
        st.sampled_from(["same", "other", "longer", "none"]),
    ),
    min_size=1,
    max_size=8,
)


def _model(tensors: list[Any], folder: str, draw: Any) -> torch.nn.Module:
    model = torch.nn.Module()
    content: dict[str, torch.Tensor] = {}
    for number, (length, dtype, shape, file) in enumerate(tensors):
        whole = torch.randint(0, 255, (length * dtype.itemsize,), dtype=torch.uint8, generator=draw).view(dtype)
        registered = whole
        if shape == "part":
            registered = whole[length // 3 :]
        elif shape == "turned" and length >= 4:
            registered = whole[: length // 2 * 2].view(2, -1).T
        name = f"of.layer.t{number}"
        owner = model
        for part in name.split(".")[:-1]:
            if not hasattr(owner, part):
                owner.add_module(part, torch.nn.Module())
            owner = getattr(owner, part)
        setattr(owner, f"t{number}", torch.nn.Parameter(registered, requires_grad=False))
        if shape == "twice":
            owner.register_buffer(f"u{number}", whole[: length // 2])
        stored = registered.contiguous().clone()
        if file == "other" and length:
            stored.view(torch.uint8).view(-1)[-1:] ^= 1
        if file != "none":
            content[name if file != "longer" else f"model.{name}"] = stored
    save_file(content, f"{folder}/model.safetensors")
    return model


def _seen(model: torch.nn.Module) -> list[Any]:
    named = [*model.named_parameters(), *model.named_buffers()]
    base = {name: one.untyped_storage().data_ptr() for name, one in named if one.numel()}
    together = sorted([name for name in base if base[name] == at] for at in set(base.values()))
    content = [(name, one.dtype, one.shape, one.stride(), one.contiguous().view(-1).tolist()) for name, one in named]
    return [str(content), together]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors=TENSORS, seed=st.integers(0, 1000), block=st.sampled_from([64 << 10, 1 << 20]))
def test_they_come_back_as_they_were(
    tensors: list[Any], seed: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "BLOCK_BYTES", block)
    memory = MemoryDouble()
    with tempfile.TemporaryDirectory() as folder:
        model = _model(tensors, folder, torch.Generator().manual_seed(seed))
        before = _seen(model)
        for _ in range(2):
            with _released(model, folder, lambda _: memory) as report:
                assert not memory.mapped
            assert _seen(model) == before
            assert report.nbytes == report.file_bytes + sum(report.kept.values())
