"""Weights that step aside, against a double of a GPU whose memory really is away meanwhile."""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="this machine lacks torch")
pytest.importorskip("safetensors", reason="this machine lacks safetensors")

import torch
from safetensors.torch import load_file, save_file

from tests.helpers.memory_double import MemoryDouble
from weightfs.errors import IntegrityError, UsageError, WeightfsError
from weightfs.torch import Released, movable, proof, released
from weightfs.torch.released import Weights, _released


class Block(torch.nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(96, 96, dtype=torch.bfloat16)
        self.norm = torch.nn.LayerNorm(96, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.linear(x))


class Model(torch.nn.Module):  # type: ignore[misc]
    """Tied weights, odd sizes, a buffer that no file has."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(301, 96, dtype=torch.bfloat16)
        self.layers = torch.nn.ModuleList([Block() for _ in range(3)])
        self.head = torch.nn.Linear(96, 301, bias=False, dtype=torch.bfloat16)
        self.head.weight = self.embedding.weight
        self.odd = torch.nn.Parameter(torch.arange(7, dtype=torch.uint8), requires_grad=False)
        self.register_buffer("scale", torch.rand(5), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x) * self.scale.sum() + self.odd.sum()


class Bench:
    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.memory = MemoryDouble()
        self.model = Model()
        self.folder = folder
        content = {name: tensor for name, tensor in self.model.state_dict().items() if name != "head.weight"}
        names = sorted(content)
        for number, some in enumerate((names[:8], names[8:])):
            save_file({name: content[name] for name in some}, self.shard(number))

    def shard(self, number: int) -> Path:
        return self.folder / f"model-{number + 1:05}-of-00002.safetensors"

    def released(self, weights: Weights | None = None) -> AbstractContextManager[Released]:
        return _released(self.model, self.folder if weights is None else weights, lambda _: self.memory)

    def answer(self) -> torch.Tensor:
        with torch.inference_mode():
            return self.model(torch.arange(16)).clone()

    def addresses(self) -> dict[str, int]:
        return {name: tensor.data_ptr() for name, tensor in self.model.state_dict(keep_vars=True).items()}


@pytest.fixture(params=[1 << 30, 64 << 10], ids=["one block", "many blocks"])
def bench(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(proof, "BLOCK_BYTES", request.param)
    return Bench(tmp_path)


def test_weights_leave_and_come_back_at_the_same_addresses(bench: Bench) -> None:
    before = bench.answer()
    with bench.released() as first:
        assert not bench.memory.mapped, "all memory is given up"
        assert len(bench.memory.reserved) == 1
        assert all(tensor.numel() == 0 for tensor in bench.model.parameters())
    assert torch.equal(bench.answer(), before)
    addresses = bench.addresses()
    assert first.kept == {"scale": 20}
    assert first.file_bytes == first.nbytes - 20
    with bench.released() as second:
        assert not bench.memory.mapped
    assert torch.equal(bench.answer(), before)
    assert bench.addresses() == addresses
    assert second.kept == first.kept
    assert set(second.phases) == {"prove", "drop", "map", "copy", "check", "place"}
    assert len(bench.memory.reserved) == 1, "no second range"


def test_tied_weights_stay_tied(bench: Bench) -> None:
    with bench.released():
        pass
    assert bench.model.head.weight is bench.model.embedding.weight


def test_a_second_time_reads_files_once(bench: Bench) -> None:
    with bench.released():
        bench.memory.pieces.clear()
    once = sum(piece.nbytes for piece in bench.memory.pieces)
    bench.memory.pieces.clear()
    with bench.released() as report:
        assert not bench.memory.pieces, "what it holds was proven before"
    assert sum(piece.nbytes for piece in bench.memory.pieces) == once == report.file_bytes


def test_a_shard_is_read_in_few_pieces(bench: Bench) -> None:
    for number in range(2):
        os.unlink(bench.shard(number))
    even = torch.nn.Sequential(*(torch.nn.Linear(256, 256, bias=False) for _ in range(8)))
    save_file(even.state_dict(), bench.folder / "model.safetensors")
    with _released(even, bench.folder, lambda _: bench.memory):
        bench.memory.pieces.clear()
    assert [piece.nbytes for piece in bench.memory.pieces] == [8 * 256 * 256 * 4]


def test_what_differs_from_its_file_is_kept(bench: Bench) -> None:
    with torch.no_grad():
        bench.model.layers[1].linear.weight[3, 5] += 1
    before = bench.answer()
    for _ in range(2):
        with bench.released() as report:
            pass
        assert "layers.1.linear.weight" in report.kept
        assert torch.equal(bench.answer(), before)


def test_weights_changed_between_two_blocks_are_not_undone(bench: Bench) -> None:
    with bench.released() as report:
        pass
    assert report.kept == {"scale": 20}
    with torch.no_grad():
        bench.model.layers[2].norm.weight += 1
    before = bench.answer()
    with bench.released() as report:
        pass
    assert report.kept == {"scale": 20, "layers.2.norm.weight": 192}
    assert torch.equal(bench.answer(), before)


def test_without_files_the_host_keeps_all(bench: Bench) -> None:
    before = bench.answer()
    with bench.released(()) as report:
        assert not bench.memory.mapped
    assert report.file_bytes == 0
    assert torch.equal(bench.answer(), before)


def test_names_may_differ_by_a_prefix(bench: Bench) -> None:
    for number in range(2):
        content = load_file(bench.shard(number))
        save_file({f"model.{name}": tensor for name, tensor in content.items()}, bench.shard(number))
    with bench.released() as report:
        pass
    assert report.kept == {"scale": 20}


def test_tensors_joined_of_several_are_found_by_their_bytes(bench: Bench) -> None:
    for number in range(2):
        os.unlink(bench.shard(number))
    names = [f"layers.0.experts.{expert}.{one}.weight" for expert in range(4) for one in ("w1", "w2", "w3")]
    content = {name: torch.randn(128, 256) for name in names}
    save_file(content, bench.folder / "model.safetensors")
    model = torch.nn.Module()
    pairs = [torch.cat([content[names[at]], content[names[at + 2]]]) for at in range(0, 12, 3)]
    model.gate_up = torch.nn.Parameter(torch.stack(pairs))
    model.down = torch.nn.Parameter(torch.stack([content[name] for name in names[1::3]]))
    model.transposed = torch.nn.Parameter(content[names[0]].T.contiguous())
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    for _ in range(2):
        with _released(model, bench.folder, lambda _: bench.memory) as report:
            bench.memory.pieces.clear()
        assert report.kept == {"transposed": 128 * 256 * 4}
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())
    assert [piece.offset for piece in bench.memory.pieces] == sorted(piece.offset for piece in bench.memory.pieces)


def test_parameters_made_in_inference_mode(bench: Bench) -> None:
    with torch.inference_mode():
        bench.model = Model()
    assert bench.model.odd.is_inference()
    before = bench.answer()
    with bench.released(()):
        pass
    assert torch.equal(bench.answer(), before)


def test_an_exception_in_the_block_brings_them_back(bench: Bench) -> None:
    before = bench.answer()
    with pytest.raises(KeyError), bench.released():
        raise KeyError
    assert torch.equal(bench.answer(), before)


def _changed(bench: Bench) -> None:
    content = bytearray(bench.shard(1).read_bytes())
    content[-1] ^= 1
    bench.shard(1).write_bytes(content)


def _cut(bench: Bench) -> None:
    os.truncate(bench.shard(1), bench.shard(1).stat().st_size - 1)


def _failing(bench: Bench) -> None:
    bench.memory.failing = True


def _astray(bench: Bench) -> None:
    bench.memory.astray = True


@pytest.mark.parametrize(
    ("deed", "kind", "said"),
    [
        (_changed, IntegrityError, "has other weights"),
        (_cut, IntegrityError, "bytes, not"),
        (_failing, WeightfsError, "can't be read again: Input/output error"),
        (_astray, IntegrityError, "has other weights"),
    ],
)
def test_a_model_with_wrong_weights_does_not_answer(
    bench: Bench, deed: object, kind: type[WeightfsError], said: str
) -> None:
    assert callable(deed)
    with pytest.raises(kind, match=said) as caught, bench.released():
        deed(bench)
    assert kind is WeightfsError or str(bench.folder) in str(caught.value.path)
    assert "no weights any more" in str(caught.value.mend)
    assert not _open_files(bench)
    assert not bench.memory.mapped
    with pytest.raises((RuntimeError, IndexError)):
        bench.answer()
    with bench.released(()):  # the next is not refused
        pass


def _open_files(bench: Bench) -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(path for path in found if path.startswith(str(bench.folder)))


def test_files_are_held_open_meanwhile_so_that_a_snapshot_notes_them(bench: Bench) -> None:
    before = bench.answer()
    with bench.released():
        assert _open_files(bench) == [str(bench.shard(number)) for number in range(2)]
        bench.shard(0).unlink()
        bench.shard(1).rename(bench.folder / "other")
    assert not _open_files(bench)
    assert torch.equal(bench.answer(), before)


def test_a_file_changed_while_they_are_there_is_found_before_they_leave(bench: Bench) -> None:
    with bench.released():
        pass
    before = bench.answer()
    _changed(bench)
    with bench.released() as report:
        pass
    assert len(report.kept) == 2
    assert torch.equal(bench.answer(), before)


def test_nested_use_is_refused(bench: Bench) -> None:
    with bench.released(), pytest.raises(UsageError, match="released already"), bench.released():
        pass
    assert bench.memory.mapped


def test_some_of_those_that_left_together_are_refused(bench: Bench) -> None:
    with bench.released():
        pass
    with (
        pytest.raises(UsageError, match="some are missing"),
        _released(bench.model.layers, bench.folder, lambda _: bench.memory),
    ):
        pass
    assert bench.memory.mapped


def test_graphs_with_the_addresses_of_before_are_refused(bench: Bench) -> None:
    bench.memory.captured = 2
    before = bench.addresses()
    with pytest.raises(UsageError, match="2 CUDA graphs"), bench.released():
        pass
    assert bench.addresses() == before
    bench.memory.captured = 0
    with bench.released():
        pass
    bench.memory.captured = 2
    with bench.released():  # these were captured with the addresses they keep
        pass


def test_with_the_model_its_addresses_go(bench: Bench) -> None:
    with bench.released():
        pass
    assert bench.memory.mapped
    bench.model = Model()
    gc.collect()
    assert not bench.memory.mapped
    assert not bench.memory.reserved


def test_a_part_of_the_model_may_go(bench: Bench) -> None:
    with bench.released(()) as whole:
        pass
    del bench.model.layers[1]
    gc.collect()
    before = bench.answer()
    for _ in range(2):
        with bench.released(()) as report:
            pass
        assert report.nbytes < whole.nbytes
        assert torch.equal(bench.answer(), before)


def test_what_something_else_holds_is_told(bench: Bench) -> None:
    view = bench.model.layers[0].linear.weight.data[:1]
    with bench.released() as report:
        pass
    assert report.elsewhere == ("layers.0.linear.weight",)
    assert torch.equal(view, bench.model.layers[0].linear.weight[:1])


def test_a_parameter_of_a_kind_of_its_own_stays(bench: Bench) -> None:
    class Odd(torch.nn.Parameter):  # type: ignore[misc]
        pass

    bench.model.odd = Odd(torch.arange(7, dtype=torch.uint8), requires_grad=False)
    before = bench.answer()
    with bench.released() as report:
        assert bench.model.odd.sum() == 21
    assert list(report.left) == ["odd"]
    assert torch.equal(bench.answer(), before)


def test_files_must_be_known(bench: Bench) -> None:
    with (
        pytest.raises(UsageError, match="Model does not say") as caught,
        _released(bench.model, None, lambda _: bench.memory),
    ):
        pass
    assert caught.value.mend is not None
    bench.model.name_or_path = str(bench.folder)
    with _released(bench.model, None, lambda _: bench.memory) as report:
        pass
    assert report.kept == {"scale": 20}


def test_too_little_memory_is_told_before_the_block(bench: Bench) -> None:
    bench.memory.refusals = 1
    with pytest.raises(WeightfsError, match="out of memory") as caught, bench.released():
        pytest.fail("the block began")
    assert caught.value.mend is not None
    assert "movable" in caught.value.mend


def test_where_there_is_no_room_for_some_the_others_come_back(bench: Bench) -> None:
    with bench.released():
        pass
    before = bench.answer()
    bench.memory.refusals = 1
    both = [bench.model, torch.nn.Linear(4, 4)]
    with pytest.raises(WeightfsError, match="out of memory"), _released(both, (), lambda _: bench.memory):
        pytest.fail("the block began")
    assert torch.equal(bench.answer(), before)


def test_on_a_cpu_nothing_happens_and_it_says_so(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    before = bench.answer(), bench.addresses()
    with caplog.at_level(logging.WARNING), released(bench.model) as report:
        assert torch.equal(bench.answer(), before[0])
    assert report.note
    assert report.note in caplog.text
    assert bench.addresses() == before[1]
    assert movable(bench.model).nbytes == 0


def test_the_name_is_that_of_the_function() -> None:
    importlib.import_module("weightfs.torch.released")
    assert getattr(importlib.import_module("weightfs.torch"), "released") is released  # noqa: B009
    assert callable(released)
